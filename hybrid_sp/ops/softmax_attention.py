"""The AllGather-KV attention over a sequence that is cut over ranks (Llama 3, arXiv 2407.21783; LASP-2H, 2502.07563).

    forward              send group 0 | own keys | each group: wait, send the next; attend to it, merge by log-sum-exp
    backward, KV kept    each group: the others' dK, dV; wait for the last group's; send back | own keys | wait
    backward, not kept   send group 0 again | own keys | each group: wait, send the next; as above | wait

A group is the key heads that travel at a time: `kv_heads_per_gather` of them, or all. Its tensors are freed before the
group after the next is launched.

`exchange/kv.py` brings all keys, or the few that are visible under a window or packed documents. The mask is a list of
tiles (`exchange/visible.py`), over own keys and over received keys. Backward uses the merged output and its lse. Sums
are fp32 and rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import select_backend
from ..baselines.head_parallel import HEAD_PARALLEL, run_head_parallel
from ..baselines.ring_attention import ring_softmax
from ..checks import default_shard, operator_in_steps, require
from ..exchange.kv import columns
from ..exchange.visible import Mask, plan_mask
from ..kernels.softmax.attend import add_sinks, empty_output, select_kernel, sinks_backward
from ..kernels.softmax.tiled import attend_tiles, attend_tiles_backward
from ..overlap import Call
from ..recompute import recorded
from ..shard import Shard


@operator_in_steps
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: Tensor | None = None,
    shard: Shard | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Generator[None, None, Tensor]:
    """Compute softmax attention over the sequence of which `shard` holds this rank's tokens.

        o_t = (sum over s of exp(scale * q_t . k_s) v_s) / (exp(sink) + sum over s of exp(scale * q_t . k_s))

    The sums run over the tokens s of t's document; where causal, s <= t; with a window also s > t - window. Without
    sinks exp(sink) is 0.

    q       [B,T,Hq,D]
    k, v    [B,T,Hkv,D] and [B,T,Hkv,V], Hq a multiple of Hkv; query head h reads key head h // (Hq // Hkv). K and V
            travel before heads are repeated
    sinks   a logit per query head [Hq], a floating point tensor that every rank has; its gradient is this rank's part
    window  number of tokens that a token sees, itself included; needs causal. None sees all
    scale   a number, no tensor (its gradient would be lost); None is D**-0.5
    shard   this rank's part of the sequence, None for one device; there k and v may have their own length if
            causal=False
    backend "torch" on CUDA is torch's flash kernel for bf16 and fp16, its memory-efficient one for fp32; "flash_attn"
            is the package flash-attn (2.7 and newer) or flash-attn-4, for bf16 and fp16 on CUDA. "auto" is "torch"

    Returns o [B,T,Hq,V] in the dtype of q. The work of a window is T * window.

    By the all-gather (`SequenceParallel.softmax`) each rank receives (P-1) B T Hkv (D+V) numbers forward (dtype of k)
    and as many backward (fp32, or fp64). keep_kv=False receives those of the forward twice. With a window or packed
    documents a rank receives only the tokens that its spans see before them: forward at most B (window-1) Hkv (D+V)
    numbers for each span. Backward it receives gradients for the tokens that others see of its own. If some rank sees
    all others' tokens, all ranks use the all-gather.

    Raises ValueError for shapes, dtypes and windows that do not fit, and for heads that a baseline cannot cut. Raises
    ImportError for a backend that is not installed. Both come before any communication.

    Sources: AllGather-KV, arXiv 2407.21783, section 3.3.2; arXiv 2502.07563, algorithm 7. The window is that of Mistral
    (2310.06825, section 2), the sink that of gpt-oss (2508.10925) as a learned logit.
    """
    alone, shard = shard is None, default_shard(shard, q)
    _check(q, k, v, sinks, shard, causal, window, alone)
    backend = select_backend("softmax_attention", backend, q, q.shape[-1], v.shape[-1])
    select_kernel(q, backend)  # raises ImportError here, before any communication
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if shard.sp.softmax in HEAD_PARALLEL:
        one = functools.partial(softmax_attention, causal=causal, window=window, scale=scale, backend=backend)
        tokens: dict[str, Tensor | None] = {"q": q, "k": k, "v": v}
        return run_head_parallel("softmax_attention", one, shard, "softmax", tokens, None, {"sinks": sinks})
    if shard.sp.softmax == "ring":
        return ring_softmax(q, k, v, sinks, shard, causal, window, scale, backend)
    mask = shard.once(plan_mask, causal, window, k.shape[1])
    keep = shard.sp.keep_kv and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    with Call(shard, "softmax") as call:
        groups = _groups(q, k, shard.sp.kv_heads_per_gather)
        named = {"q": q, "k": k, "v": v, "sinks": sinks}
        wanted = [name for name, x in named.items() if x is not None and x.requires_grad and torch.is_grad_enabled()]
        note = f"grad of {' '.join(wanted)}" if wanted else "no grad"
        job = _Schedule(call, mask, groups, scale, keep, backend, note)
        token = _Send.apply(job, q, k, v)
        yield
        shared = "k" in wanted or "v" in wanted
        return _Attend.apply(job, token, q.detach(), k.detach(), v.detach(), sinks, shared)


_Grads = tuple[Tensor, Tensor, Tensor]  # gradients of q, k and v, in the precision of sums
_Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, o and lse


class _HeadGroup(NamedTuple):
    """The heads of one gather: these key heads, and the query heads that read them."""

    keys: slice
    queries: slice
    note: str


def _groups(q: Tensor, k: Tensor, at_a_time: int | None) -> list[_HeadGroup]:
    """Split the key heads into groups of `at_a_time`; the last group may be smaller."""
    heads, readers = k.shape[2], q.shape[2] // k.shape[2]
    size = min(at_a_time or heads, heads)
    bounds = [(first, min(first + size, heads)) for first in range(0, heads, size)]
    return [
        _HeadGroup(slice(a, b), slice(a * readers, b * readers), f"key heads {a}:{b}" if len(bounds) > 1 else "")
        for a, b in bounds
    ]


@dataclass(frozen=True)
class _Schedule:
    """The schedule of one call of the operator, forward and backward, on the chosen `backend`.

    `keep` keeps the received keys and values for backward. A group's tensors are the locals of one function, so that
    they are freed before the group after the next is launched. The backward of `_Attend` hands the gradients of keys
    and values to that of `_Send`, which adds the last ones and rounds once.
    """

    call: Call
    mask: Mask
    groups: list[_HeadGroup]
    scale: float
    keep: bool
    backend: str
    note: str
    handed: list[_Grads] = field(default_factory=list)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, ...]:
        """Return o, its lse, and if `keep` the keys and values received for each group."""
        o, lse = empty_output(q, v.shape[-1])
        kept: list[Tensor] = []
        # 1. The first group of key heads is in flight (`_Send`).
        # 2. Attend to this rank's own keys while it is in flight.
        with self.call.phase("own", "forward", q):
            attend_tiles(self.mask.own, o, lse, q, k, v, self.scale, self.backend)
        for i in range(len(self.groups)):
            # 3. Wait for a group, send the next, attend to it, and merge by log-sum-exp.
            kept += self._rest(i, o, lse, q, k, v)
        # 4. Let the sinks take their share of the denominator.
        if sinks is not None:
            add_sinks(o, lse, sinks)
        return o.to(q.dtype), lse, *kept

    def send(self, i: int, k: Tensor, v: Tensor, again: bool = False) -> None:
        """Launch group i, if there is one; `again` in backward."""
        if i < len(self.groups):
            heads = self.groups[i]
            note = "again" if again else self.note
            header = self.call.header("backward" if again else "forward", f"{note} {heads.note}".strip())
            rows = torch.cat([k[:, :, heads.keys].detach(), v[:, :, heads.keys].detach()], -1)
            launch = functools.partial(self.mask.keys.launch, header, rows)
            self.call.launch("again" if again else "forward", launch)

    def _rest(self, i: int, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Wait for group i, attend to it while the next is in flight, and merge."""
        (kv,) = recorded(self._received) if self.keep else self._received()
        self.send(i + 1, k, v)
        heads = self.groups[i].queries
        o, lse, q = (x[:, :, heads] for x in (o, lse, q))
        with self.call.phase("rest", "forward", q):
            k_, v_ = columns(kv, (k, v))
            attend_tiles(self.mask.rest, o, lse, q, k_, v_, self.scale, self.backend)
        return [kv] if self.keep else []

    def _received(self) -> tuple[Tensor]:
        return (self.call.result("forward"),)

    def backward(self, do: Tensor, saved: _Saved, kept: Sequence[Tensor], shared: bool) -> None:
        """Compute dq, dk and dv in the precision of sums, all but what returns for the last group, for `take`.

        `shared`: k or v needs a gradient, so the gradients of keys and values cross ranks too.
        """
        self.call.drain()  # an earlier pass over this graph may have launched, and failed before it waited
        q, k, v, o, lse = saved
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        grads = dq, dk, dv
        with self.call:
            # 1. If nothing was kept, gather the first group again while own keys get their gradients.
            if not self.keep:
                self.send(0, k, v, again=True)
                self._own_backward(grads, do, saved)
            for i in range(len(self.groups)):
                # 2. Compute a group's gradients, and send dK and dV back to their owners.
                self._rest_backward(i, grads, do, saved, kept, shared)
            # 3. If keys were kept, the gradients of own keys hide the last group's way back.
            if self.keep:
                self._own_backward(grads, do, saved)
        self.handed[:] = [grads]

    def take(self, shared: bool) -> _Grads:
        """Add the gradients that other ranks return for the last group, and return all."""
        grads = self.handed.pop()
        with self.call:
            self._add(len(self.groups) - 1, grads, shared)
        return grads

    def _own_backward(self, grads: _Grads, do: Tensor, saved: _Saved) -> None:
        q, k, v, o, lse = saved
        with self.call.phase("own", "backward", q):
            attend_tiles_backward(self.mask.own, grads, do, q, k, v, o, lse, self.scale, self.backend)

    def _rest_backward(
        self, i: int, grads: _Grads, do: Tensor, saved: _Saved, kept: Sequence[Tensor], shared: bool
    ) -> None:
        """Compute the gradients of group i, and launch their way back to the owners of its keys."""
        q, k, v, o, lse = saved
        kv = kept[i] if self.keep else self.call.result("again")
        if not self.keep:
            self.send(i + 1, k, v, again=True)
        d_kv = torch.zeros_like(kv, dtype=lse.dtype)
        heads = self.groups[i]
        dq_, do_, q_, o_, lse_ = (x[:, :, heads.queries] for x in (grads[0], do, q, o, lse))
        (k_, v_), (dk, dv) = columns(kv, (k, v)), columns(d_kv, (k, v))
        of_group = dq_, dk, dv
        with self.call.phase("rest", "backward", q):
            attend_tiles_backward(self.mask.rest, of_group, do_, q_, k_, v_, o_, lse_, self.scale, self.backend)
        del kv, k_, v_
        self._add(i - 1, grads, shared)
        if shared:
            header = self.call.header("backward", heads.note)
            self.call.launch("backward", lambda: self.mask.keys.launch_backward(header, d_kv))

    def _add(self, i: int, grads: _Grads, shared: bool) -> None:
        """Wait for the gradients that other ranks' queries give to group i of the own keys, and add them."""
        if shared and i >= 0:
            heads = self.groups[i].keys
            self.mask.keys.add((grads[1][:, :, heads], grads[2][:, :, heads]), self.call.result("backward"))


class _Send(torch.autograd.Function):
    """The node that launches the first group. Its backward, the last of the call, waits for the last group's way back.

    The nodes of operators that were started later lie between the two.
    """

    @staticmethod
    def forward(ctx: Any, job: _Schedule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.job, ctx.dtype = job, q.dtype
        job.send(0, k, v)
        return k.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor) -> tuple[Any, ...]:
        return None, *(grad.to(ctx.dtype) for grad in ctx.job.take(any(ctx.needs_input_grad[2:])))


class _Attend(torch.autograd.Function):
    """The node of the attention. It takes q, k and v without gradients: those go through `_Send`."""

    @staticmethod
    def forward(
        ctx: Any, job: _Schedule, token: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, shared: bool
    ) -> Tensor:
        ctx.job, ctx.shared = job, shared
        run = functools.partial(job.forward, q, k, v, sinks)
        if job.keep:
            o, lse, *kept = run()
        else:  # keys are not kept to attend to again, so a checkpoint records the result
            o, lse, *kept = recorded(run)
            o = o.clone()
        ctx.save_for_backward(q, k, v, o, lse, sinks, *kept)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, o, lse, sinks, *kept = ctx.saved_tensors
        d_sinks = sinks_backward(do, o, lse, sinks).to(sinks.dtype) if ctx.needs_input_grad[5] else None
        if not ctx.needs_input_grad[1]:
            return None, None, None, None, None, d_sinks, None
        ctx.job.backward(do, (q, k, v, o, lse), kept, ctx.shared)
        return None, do.new_empty(0), None, None, None, d_sinks, None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    shard: Shard,
    causal: bool,
    window: int | None,
    alone: bool,
) -> None:
    name = "softmax_attention"
    require(q.ndim == k.ndim == v.ndim == 4, name, "q, k and v must be [batch, tokens, heads, dim]")
    require(
        k.shape[:3] == v.shape[:3],
        name,
        f"k {tuple(k.shape)} and v {tuple(v.shape)} must share all dims but the last",
    )
    require(
        sinks is None or (sinks.shape == q.shape[2:3] and sinks.is_floating_point()),
        name,
        f"sinks must be a floating point number for each of the {q.shape[2]} query heads, got "
        f"{None if sinks is None else tuple(sinks.shape)}",
    )
    require(
        q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3],
        name,
        f"q {tuple(q.shape)} and k {tuple(k.shape)} must share batch and head dim",
    )
    require(
        q.shape[2] % k.shape[2] == 0, name, f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} key heads"
    )
    require(q.dtype == k.dtype == v.dtype, name, f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    require(q.dtype.is_floating_point, name, f"q, k, v must be floating point, got {q.dtype}")
    require(window is None or window >= 1, name, f"window must be at least 1 token, the token itself, got {window}")
    require(window is None or causal, name, "a window needs causal=True")
    shard.require_tokens(name, q=q.shape[1])
    shard.require_batch(name, q)
    if causal or not alone:
        shard.require_tokens(name, k=k.shape[1])
