"""The multi-head latent attention (MLA) over a sequence that is cut over ranks (DeepSeek-V2, arXiv 2405.04434).

All keys and values of a token are made from one latent vector. So the latent travels, and every rank makes the keys and
values of the heads from it, a few heads at a time:

    forward     send the latents | own: expand, attend | wait | each few heads: expand, attend, merge
    backward    each few heads: expand, attend backward, back to the latents | send back | own | wait

What a rank receives is the latents of the others forward, and as much of their gradients backward, by one
reduce-scatter. Expanded keys and values would be many times as much. They are never kept for backward, but made again.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import select_backend
from ..checks import default_shard, operator_in_steps, require
from ..exchange.visible import Mask, plan_mask
from ..kernels.softmax.attend import empty_output, select_kernel
from ..kernels.softmax.layout import wide
from ..kernels.softmax.tiled import attend_tiles, attend_tiles_backward
from ..kernels.softmax.tiles import Tile
from ..overlap import Call
from ..recompute import recorded
from ..shard import Shard
from .softmax_attention import softmax_attention

HEADS = 8  # heads whose keys and values exist at a time, unless kv_heads_per_gather says another number


@operator_in_steps
def latent_attention(
    q: Tensor,
    latent: Tensor,
    rope_k: Tensor | None,
    w_k: Tensor,
    w_v: Tensor,
    *,
    shard: Shard | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Generator[None, None, Tensor]:
    """Compute multi-head latent attention over the sequence of which `shard` holds this rank's tokens.

        k_s = [w_k c_s, r_s]          v_s = w_v c_s          o_t = sum over s of softmax_s(scale * q_t . k_s) v_s

    The sum runs over the tokens s of t's document; where causal, s <= t.

    q        [B,T,H,N+R]; the last R columns meet r
    latent   c [B,T,C]
    rope_k   r [B,T,R], the part of the keys that all heads share, rotated or not; None if R is 0
    w_k      [H,N,C], w_v [H,V,C]: every rank has them; a rank's gradient is its part
    scale    a number, no tensor; None is (N+R)**-0.5
    shard    this rank's part of the sequence, None for one device; there c and r may have their own length if
             causal=False
    backend  as in `softmax_attention`

    Returns o [B,T,H,V] in the dtype of q. By the all-gather a rank receives (P-1) B T (C+R) numbers forward (dtype of
    q) and as many backward (fp32, or fp64); keep_kv=False receives those of the forward twice. Packed documents receive
    only the tokens that are seen. The baselines of `SequenceParallel.softmax` exchange expanded keys and values.

    Raises ValueError for shapes and dtypes that do not fit, and ImportError for a backend that is not installed. Both
    come before any communication.

    Source: arXiv 2405.04434, section 2.1.2 and 2.1.3.
    """
    alone, shard = shard is None, default_shard(shard, q)
    rope_k = latent[..., :0] if rope_k is None else rope_k
    _check(q, latent, rope_k, w_k, w_v, shard, causal, alone)
    backend = select_backend("latent_attention", backend, q, q.shape[-1], w_v.shape[1])
    select_kernel(q, backend)  # raises ImportError here, before any communication
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if shard.sp.softmax != "all_gather":
        k, v = (x.to(q.dtype) for x in _expand(torch.cat([latent, rope_k], -1), w_k, w_v))
        own = None if alone else shard
        return softmax_attention(q, k, v, shard=own, causal=causal, scale=scale, backend=backend)
    mask = shard.once(plan_mask, causal, None, latent.shape[1])
    given = (q, latent, rope_k, w_k, w_v)
    keep = shard.sp.keep_kv and torch.is_grad_enabled() and any(x.requires_grad for x in given)
    with Call(shard, "softmax") as call:
        at_a_time = shard.sp.kv_heads_per_gather or HEADS
        wanted = [i for i, x in enumerate(given) if x.requires_grad and torch.is_grad_enabled()]
        note = f"grad of {wanted}" if wanted else "no grad"
        job = _Schedule(call, mask, at_a_time, scale, keep, backend, note)
        token = _Send.apply(job, *given)
        yield
        return _Attend.apply(job, token, *(x.detach() for x in given), 1 in wanted or 2 in wanted)


class _Weights(NamedTuple):
    k: Tensor  # [H,N,C]
    v: Tensor  # [H,V,C]


class _Grads(NamedTuple):
    """The gradients of q, of this rank's rows [latent, rope_k], and of the weights, in the precision of sums."""

    q: Tensor
    rows: Tensor
    w: _Weights


def _expand(rows: Tensor, w_k: Tensor, w_v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys [B,S,h,N+R] and values [B,S,h,V] of some heads, from rows [B,S,C+R].

    The kernels of a CPU compute in at least fp32, so there nothing is rounded to 16 bits between.
    """
    both = torch.cat([w_k, w_v], 1)
    if rows.device.type == "cpu":
        rows, both = wide(rows), wide(both)
    latent, shared = rows.split([w_k.shape[2], rows.shape[2] - w_k.shape[2]], -1)
    made = (latent @ both.flatten(0, 1).T).unflatten(-1, both.shape[:2])
    k, v = made.split([w_k.shape[1], w_v.shape[1]], -1)
    return torch.cat([k, shared.unsqueeze(2).expand(*k.shape[:3], -1)], -1), v


@dataclass(frozen=True)
class _Schedule:
    """The schedule of one call, forward and backward. `keep` keeps the received latents for backward.

    The backward of `_Attend` hands the gradients to that of `_Send`, which adds what returns and rounds once.
    """

    call: Call
    mask: Mask
    at_a_time: int
    scale: float
    keep: bool
    backend: str
    note: str
    handed: list[_Grads] = field(default_factory=list)

    def forward(self, q: Tensor, rows: Tensor, w: _Weights) -> tuple[Tensor, ...]:
        """Return o, its lse, and if `keep` the rows received."""
        o, lse = empty_output(q, w.v.shape[1])
        # 1. The latents are in flight, with the part of the keys that heads share (`_Send`).
        # 2. Attend to this rank's own tokens.
        with self.call.phase("own", "forward", q):
            self._attend(self.mask.own, o, lse, q, rows, w)
        # 3. Wait, attend to the other ranks' tokens, and merge.
        (others,) = recorded(self._received) if self.keep else self._received()
        with self.call.phase("rest", "forward", q):
            self._attend(self.mask.rest, o, lse, q, others, w)
        return (o.to(q.dtype), lse, others) if self.keep else (o.to(q.dtype), lse)

    def backward(
        self, do: Tensor, q: Tensor, rows: Tensor, w: _Weights, saved: tuple[Tensor, ...], shared: bool
    ) -> None:
        """Compute all gradients in the precision of sums, all but what returns, for `take`.

        `shared`: those of rows are wanted, so they cross ranks.
        """
        self.call.drain()  # an earlier pass over this graph may have launched, and failed before it waited
        o, lse, *kept = saved
        zeros = functools.partial(torch.zeros_like, dtype=lse.dtype)
        grads = _Grads(zeros(q), zeros(rows), _Weights(zeros(w.k), zeros(w.v)))
        own = functools.partial(self._attend_backward, self.mask.own, grads, do, q, rows, w, o, lse)
        with self.call:
            # 1. If the latents were not kept, gather them again while own tokens get their gradients.
            if not self.keep:
                self.send(rows, again=True)
                with self.call.phase("own", "backward", q):
                    own()
            others = kept[0] if self.keep else self.call.result("again")
            # 2. Compute the gradients of the other ranks' tokens, and send those of their latents back.
            of_others = grads._replace(rows=zeros(others))
            with self.call.phase("rest", "backward", q):
                self._attend_backward(self.mask.rest, of_others, do, q, others, w, o, lse)
            if shared:
                header = self.call.header("backward")
                self.call.launch("backward", lambda: self.mask.keys.launch_backward(header, of_others.rows))
            # 3. The gradients of own tokens hide the way back.
            if self.keep:
                with self.call.phase("own", "backward", q):
                    own()
        self.handed[:] = [grads]

    def take(self, shared: bool) -> _Grads:
        """Add the gradients that other ranks return, and return all."""
        grads = self.handed.pop()
        if shared:
            self.mask.keys.add((grads.rows,), self.call.result("backward"))
        return grads

    def send(self, rows: Tensor, again: bool = False) -> None:
        """Launch the gather of rows; `again` in backward."""
        header = self.call.header("backward" if again else "forward", "again" if again else self.note)
        self.call.launch("again" if again else "forward", lambda: self.mask.keys.launch(header, rows.detach()))

    def _received(self) -> tuple[Tensor]:
        return (self.call.result("forward"),)

    def _few(self, heads: int) -> list[slice]:
        return [slice(first, min(first + self.at_a_time, heads)) for first in range(0, heads, self.at_a_time)]

    def _attend(self, tiles: list[Tile], o: Tensor, lse: Tensor, q: Tensor, rows: Tensor, w: _Weights) -> None:
        """Merge the attention to these rows into o and lse, in place, a few heads at a time."""
        for few in self._few(q.shape[2]) if tiles else []:
            k, v = _expand(rows, w.k[few], w.v[few])
            attend_tiles(tiles, o[:, :, few], lse[:, :, few], q[:, :, few], k, v, self.scale, self.backend)

    def _attend_backward(
        self,
        tiles: list[Tile],
        grads: _Grads,
        do: Tensor,
        q: Tensor,
        rows: Tensor,
        w: _Weights,
        o: Tensor,
        lse: Tensor,
    ) -> None:
        """Add the gradients through the attention to these rows, in place: of q, of the rows, and of the weights."""
        width, latent = w.k.shape[1], rows[..., : w.k.shape[2]].to(lse.dtype)
        for few in self._few(q.shape[2]) if tiles else []:
            k, v = _expand(rows, w.k[few], w.v[few])
            dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
            dq, do_, q_, o_, lse_ = (x[:, :, few] for x in (grads.q, do, q, o, lse))
            attend_tiles_backward(tiles, (dq, dk, dv), do_, q_, k, v, o_, lse_, self.scale, self.backend)
            # From keys and values back to what they were made of: k = [w_k c, r], v = w_v c.
            d_made = torch.cat([dk[..., :width], dv], -1).flatten(2)
            both = torch.cat([w.k[few], w.v[few]], 1).flatten(0, 1).to(lse.dtype)
            grads.rows[..., : latent.shape[2]] += d_made @ both
            grads.rows[..., latent.shape[2] :] += dk[..., width:].sum(2)
            d_both = (d_made.flatten(0, 1).T @ latent.flatten(0, 1)).unflatten(0, (k.shape[2], -1))
            grads.w.k[few] += d_both[:, :width]
            grads.w.v[few] += d_both[:, width:]


class _Send(torch.autograd.Function):
    """The node that launches the gather. Its backward, the last of the call, waits for what returns."""

    @staticmethod
    def forward(
        ctx: Any, job: _Schedule, q: Tensor, latent: Tensor, rope_k: Tensor, w_k: Tensor, w_v: Tensor
    ) -> Tensor:
        ctx.job, ctx.dtype, ctx.widths = job, q.dtype, [latent.shape[-1], rope_k.shape[-1]]
        job.send(torch.cat([latent, rope_k], -1))
        return latent.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor) -> tuple[Any, ...]:
        grads = ctx.job.take(any(ctx.needs_input_grad[2:4]))
        found = grads.q, *grads.rows.split(ctx.widths, -1), *grads.w
        return None, *(grad.to(ctx.dtype) for grad in found)


class _Attend(torch.autograd.Function):
    """The node of the attention. Its inputs come without gradients: those go through `_Send`."""

    @staticmethod
    def forward(
        ctx: Any,
        job: _Schedule,
        token: Tensor,
        q: Tensor,
        latent: Tensor,
        rope_k: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        shared: bool,
    ) -> Tensor:
        ctx.job, ctx.shared = job, shared
        rows = torch.cat([latent, rope_k], -1)
        run = functools.partial(job.forward, q, rows, _Weights(w_k, w_v))
        saved = run() if job.keep else recorded(run)
        o = saved[0] if job.keep else saved[0].clone()
        ctx.save_for_backward(q, rows, w_k, w_v, o, *saved[1:])
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, rows, w_k, w_v, *saved = ctx.saved_tensors
        ctx.job.backward(do, q, rows, _Weights(w_k, w_v), tuple(saved), ctx.shared)
        return None, do.new_empty(0), *[None] * 6


def _check(
    q: Tensor,
    latent: Tensor,
    rope_k: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    shard: Shard,
    causal: bool,
    alone: bool,
) -> None:
    name = "latent_attention"
    require(q.ndim == 4, name, f"q must be [batch, tokens, heads, dim], got {tuple(q.shape)}")
    require(
        latent.ndim == rope_k.ndim == 3 and latent.shape[:2] == rope_k.shape[:2] and latent.shape[0] == q.shape[0],
        name,
        f"latent {tuple(latent.shape)} and rope_k {tuple(rope_k.shape)} must be [batch, tokens, dim], with the batch "
        f"of q {tuple(q.shape)}",
    )
    require(
        w_k.ndim == w_v.ndim == 3 and w_k.shape[::2] == w_v.shape[::2] == (q.shape[2], latent.shape[2]),
        name,
        f"w_k {tuple(w_k.shape)} and w_v {tuple(w_v.shape)} must be [heads, dim, latent dim], with the "
        f"{q.shape[2]} heads of q and the {latent.shape[2]} columns of latent",
    )
    require(
        q.shape[3] == w_k.shape[1] + rope_k.shape[2],
        name,
        f"q has {q.shape[3]} columns, w_k makes {w_k.shape[1]} and rope_k has {rope_k.shape[2]}",
    )
    dtypes = [x.dtype for x in (q, latent, rope_k, w_k, w_v)]
    require(len(set(dtypes)) == 1, name, f"q, latent, rope_k, w_k and w_v must share a dtype, got {dtypes}")
    require(q.dtype.is_floating_point, name, f"all tensors must be floating point, got {q.dtype}")
    shard.require_tokens(name, q=q.shape[1])
    shard.require_batch(name, q)
    if causal or not alone:
        shard.require_tokens(name, latent=latent.shape[1])
