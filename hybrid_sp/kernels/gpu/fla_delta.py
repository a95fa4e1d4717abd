"""The phases of the delta rule on CUDA, by the separately callable passes of fla-core. All that we know of its insides
is in this file.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

What of a span belongs to one document is a *run*, a sequence of its own to fla (`cu_seqlens`). Within a run everything
is affine in the state S_in that enters it. So phase 1 walks through the chunks once, with states [h | D] of V + K
columns, which begin as [0 | I] where S_in enters, as [0 | 0] elsewhere, and end as the summary [leaving | transition]:

    states   WY form of the chunks (w, u, A); with u' = [u | 0], per chunk  r' = u' - w h',  h' <- exp(P_C) h' + k^T r'
    intra    [o_intra | e] = what queries read of r' and h'                                 (scale is in both)
    inter    o = o_intra + e S_in

Backward mirrors it: dS_in = e^T do leaves at once; meanwhile the chunks' states are made again, now with S_in, and the
part of dr that needs no other rank; with the gradients of the leaving states follow all others. Where no state enters
and nobody reads a summary, phase 1 walks with V columns, phase 2 gives o, and phase 3 does nothing.

Units and layouts of fla 0.6: tensors contiguous, [B,T,H,D], or of all rows [1,B*T,H,D] with `cu_seqlens`; decays summed
from the chunk's start in units of log2; gradients of the sums are for natural logs; h in the dtype of k, states that
enter and leave fp32. `beta` may be fp32 beside bf16 or fp16. Chunks have 64 tokens. fla takes a decay between tokens
as the difference of two sums in fp32. Floored decays keep these under 1e4: strong ones cost the others of their chunk
1e-4 (measured, many of them), which is less than bf16 rounds.

Sources: WY form, arXiv 2406.06484, section 3.2; with decays, arXiv 2412.06464, section 3.3, and 2510.26692, section 3.
"""

from __future__ import annotations

import functools
import itertools
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens


PASSES = {  # what is called here, and where fla-core has it
    "chunk_local_cumsum": "fla.ops.utils.cumsum:chunk_local_cumsum",
    "prepare_chunk_indices": "fla.ops.utils.index:prepare_chunk_indices",
    "prepare_chunk_offsets": "fla.ops.utils.index:prepare_chunk_offsets",
    "chunk_gated_delta_rule_fwd_intra": "fla.ops.gated_delta_rule.chunk_fwd:chunk_gated_delta_rule_fwd_intra",
    "recompute_w_u_fwd": "fla.ops.gated_delta_rule.wy_fast:recompute_w_u_fwd",
    "prepare_wy_repr_bwd": "fla.ops.gated_delta_rule.wy_fast:prepare_wy_repr_bwd",
    "chunk_gated_delta_rule_fwd_h": "fla.ops.common.chunk_delta_h:chunk_gated_delta_rule_fwd_h",
    "chunk_gated_delta_rule_bwd_dhu": "fla.ops.common.chunk_delta_h:chunk_gated_delta_rule_bwd_dhu",
    "chunk_fwd_o": "fla.ops.common.chunk_o:chunk_fwd_o",
    "chunk_bwd_dv_local": "fla.ops.common.chunk_o:chunk_bwd_dv_local",
    "chunk_bwd_dqkwg": "fla.ops.common.chunk_o:chunk_bwd_dqkwg",
    "chunk_kda_fwd_intra": "fla.ops.kda.chunk_intra:chunk_kda_fwd_intra",
    "chunk_kda_bwd_intra": "fla.ops.kda.chunk_intra:chunk_kda_bwd_intra",
    "chunk_kda_recompute": "fla.ops.kda.wy_fast:recompute_w_u_fwd",
    "chunk_kda_bwd_dAv": "fla.ops.kda.chunk_bwd:chunk_kda_bwd_dAv",
    "chunk_kda_bwd_wy_dqkg_fused": "fla.ops.kda.chunk_bwd:chunk_kda_bwd_wy_dqkg_fused",
    "chunk_gla_fwd_o_gk": "fla.ops.gla.chunk:chunk_gla_fwd_o_gk",
}
VALUES = {
    "RCP_LN2": "fla.ops.utils.constant:RCP_LN2",
    "HOPPER": "fla.utils:IS_NVIDIA_HOPPER",
    "TRITON_3_4_0": "fla.utils:TRITON_ABOVE_3_4_0",
    "TRITON_3_7_1": "fla.utils:TRITON_ABOVE_3_7_1",
}


@functools.cache
def passes() -> SimpleNamespace:
    """PASSES and VALUES. Raises ImportError where they are missing."""
    try:
        return SimpleNamespace(**{name: pkgutil.resolve_name(where) for name, where in (PASSES | VALUES).items()})
    except (ImportError, AttributeError) as error:
        raise ImportError(
            'delta_rule: backend "fla" needs fla-core 0.6 and triton: pip install "hybrid_sp[fla]", or use '
            f'backend="torch" ({error})'
        ) from error


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of a rank, the same in every row of the batch, and how they are put to fla.

    count    runs in a row
    entered  of every span that a document does not begin with: its first run, start, stop (tokens) and the span
    last     of every span its last run
    tokens   arguments of a pass that works on tokens; none if a row is one run
    chain    arguments of a pass that goes from chunk to chunk
    """

    batch: int
    count: int
    entered: tuple[tuple[int, int, int, int], ...]
    last: tuple[int, ...]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    chain: dict[str, Tensor] = field(default_factory=dict)

    def flat(self, x: Tensor) -> Tensor:
        """x [B,T,...] as the passes take it."""
        x = x.contiguous()
        return x.flatten(0, 1).unsqueeze(0) if self.tokens else x

    def rows(self, x: Tensor) -> Tensor:
        """What a pass gave, [B,T,...] again."""
        return x if len(x) == self.batch else x.view(self.batch, -1, *x.shape[2:])

    def by_row(self, S: Tensor) -> Tensor:
        """States of all runs as [B,count,H,K,...]."""
        return S.unflatten(0, (self.batch, self.count))

    def identity(self, heads: int, key: int, width: int, device: torch.device) -> Tensor:
        """[0 | I] for runs that a state enters, [0 | 0] for the others."""
        S = torch.zeros(self.batch * self.count, heads, key, width + key, dtype=torch.float32, device=device)
        for run, *_ in self.entered:
            self.by_row(S)[:, run, :, :, width:] = torch.eye(key, device=device)
        return S

    def entering(self, S_in: Tensor | None) -> Tensor | None:
        """S_in [s,B,H,K,V], of the runs."""
        if S_in is None:
            return None
        S = S_in.new_zeros(self.batch * self.count, *S_in.shape[2:])
        for run, _, _, span in self.entered:
            self.by_row(S)[:, run] = S_in[span]
        return S

    def leaving(self, S: Tensor) -> Tensor:
        """What leaves the spans [s,B,H,K,...], of the states at the ends of all runs."""
        return torch.stack([self.by_row(S)[:, run] for run in self.last])

    def leaving_backward(self, d_leaving: Tensor | None) -> Tensor | None:
        """Its adjoint."""
        if d_leaving is None:
            return None
        S = d_leaving.new_zeros(self.batch * self.count, *d_leaving.shape[2:])
        for span, run in enumerate(self.last):
            self.by_row(S)[:, run] = d_leaving[span]
        return S


def cut(lengths: Sequence[int], batch: int, boundaries: Sequence[int], device: torch.device) -> Runs:
    """Cut spans of these lengths (tokens) at `boundaries`, the tokens of the rank at which documents begin."""
    return _cut(tuple(lengths), batch, tuple(boundaries), device, CHUNK)


@functools.lru_cache(maxsize=64)
def _cut(lengths: tuple[int, ...], batch: int, boundaries: tuple[int, ...], device: torch.device, chunk: int) -> Runs:
    starts: list[int] = []
    entered, last = [], []
    bounds = [0, *itertools.accumulate(lengths)]
    for span, (a, b) in enumerate(itertools.pairwise(bounds)):
        inside = [t for t in boundaries if a < t < b]
        if a not in boundaries:
            entered.append((len(starts), a, [*inside, b][0], span))
        starts += [a, *inside]
        last.append(len(starts) - 1)
    runs = Runs(batch, len(starts), tuple(entered), tuple(last))
    if len(starts) == 1:
        return runs
    fla, length = passes(), bounds[-1]
    edges = [row * length + t for row in range(batch) for t in starts] + [batch * length]
    host = torch.tensor(edges)
    cu_seqlens = host.to(device)
    indices = fla.prepare_chunk_indices(cu_seqlens, chunk, cu_seqlens_cpu=host)
    runs.tokens.update(cu_seqlens=cu_seqlens, chunk_indices=indices)
    runs.chain.update(runs.tokens, chunk_offsets=fla.prepare_chunk_offsets(host, chunk).to(device))
    return runs


def decay_of(g: Tensor | None, key: int) -> Tensor | None:
    """g as the passes can differentiate it here. Triton 3.4 ... 3.7.0 miscompile that of a decay per head on Hopper,
    where fla refuses it: there it becomes a decay of each key channel."""
    if g is None or g.ndim == 4:
        return g
    fla = passes()
    if not (fla.HOPPER and fla.TRITON_3_4_0 and not fla.TRITON_3_7_1):
        return g
    return g.unsqueeze(-1).expand(*g.shape, key)


class States(NamedTuple):
    """What the first phase gives."""

    h: Tensor  # [h | D] that enters the chunks
    leaving: Tensor | None  # states that leave the spans, each beginning empty [s,B,H,K,V]
    transitions: Tensor | None  # of the spans [s,B,H,K,K]
    r: Tensor  # r' of the tokens
    sums: Tensor | None  # of the decays, from the chunk's start
    A: Tensor  # the solved triangular system
    scores: Tensor | None  # scale * q k^T with decays [B,T,H,C], if these are vectors


class Local(NamedTuple):
    """What `intra_backward` hands to `states_backward`, as the passes take it; queries and keys as the states see them:
    decayed, if decays are vectors."""

    tokens: tuple[Tensor, ...]  # q, k, v, beta
    sums: Tensor | None
    A: Tensor
    queries: Tensor
    keys: Tensor
    w: Tensor
    h: Tensor
    r: Tensor
    do: Tensor
    dr: Tensor
    d_scores: Tensor | None


@dataclass(frozen=True)
class Phases:
    """The arithmetic of one call: q, k [B,T,G,K] and v [B,T,H,V] bf16 or fp16, beta [B,T,H] and g None | [B,T,H] |
    [B,T,H,K] fp32. `entered`: a state may enter the spans, or somebody reads their summaries."""

    runs: Runs
    scale: float
    entered: bool
    q_in_states: ClassVar = True

    def states_forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None
    ) -> tuple[States, tuple[Tensor, ...]]:
        fla, runs = passes(), self.runs
        key, width = k.shape[-1], v.shape[-1]
        with torch.cuda.device_of(q):
            sums = None
            if g is not None:
                sums = fla.chunk_local_cumsum(runs.flat(g), chunk_size=CHUNK, scale=fla.RCP_LN2, **runs.tokens)
            q, k, v, beta = (runs.flat(x) for x in (q, k, v, beta))
            system = {"k": k, "v": v, "beta": beta, "chunk_size": CHUNK, **runs.tokens}
            keys, scores = k, None
            if _vector(sums):
                w, u, _, keys, scores, A = fla.chunk_kda_fwd_intra(q=q, gk=sums, scale=self.scale, **system)
            else:
                w, u, A = fla.chunk_gated_delta_rule_fwd_intra(g=sums, **system)
            initial = None
            if self.entered:
                u = F.pad(u, (0, key))
                initial = runs.identity(v.shape[2], key, width, k.device)
            h, r, final = self._chain(keys, w, u, sums, initial, final=self.entered)
        leaving = transitions = None
        if self.entered:
            leaving, transitions = runs.leaving(final[..., :width]), runs.leaving(final[..., width:])
        return States(h, leaving, transitions, r, sums, A, scores), ()

    def _chain(
        self, keys: Tensor, w: Tensor, u: Tensor, sums: Tensor | None, initial: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """States that enter the chunks, r = u - w h, and the states at the ends of the runs."""
        return passes().chunk_gated_delta_rule_fwd_h(
            k=keys,
            w=w,
            u=u,
            initial_state=initial,
            output_final_state=final,
            chunk_size=CHUNK,
            **_decays(sums),
            **self.runs.chain,
        )

    def intra_forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, states: Sequence[Any]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        """o_intra [B,T,H,V] and e [B,T,H,K]."""
        fla, runs, width = passes(), self.runs, v.shape[-1]
        h, _, _, r, sums, A, scores = states
        saved = (q, k, v, beta, sums, A, scores)
        read = {"q": runs.flat(q), "v": r, "h": h, "g": sums, "scale": self.scale, "chunk_size": CHUNK, **runs.tokens}
        with torch.cuda.device_of(q):
            if _vector(sums):
                o = fla.chunk_gla_fwd_o_gk(A=scores, **read)
            else:
                o = fla.chunk_fwd_o(k=runs.flat(k), **read)
        o = runs.rows(o)
        if not self.entered:
            return o, None, saved
        o, e = (x.clone(memory_format=torch.contiguous_format) for x in (o[..., :width], o[..., width:]))
        return o, e, saved

    def inter_forward(
        self, o_intra: Tensor, e: Tensor | None, states: Sequence[Any], S_in: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """o, in the place of o_intra."""
        if e is not None and S_in is not None:
            for row, (_, start, stop, span) in itertools.product(range(self.runs.batch), self.runs.entered):
                o_, e_ = (x[row, start:stop].transpose(0, 1) for x in (o_intra, e))
                o_.baddbmm_(e_, S_in[span, row].to(e.dtype))
        return o_intra, (e, S_in)

    def inter_backward(self, do: Tensor, saved: Sequence[Any]) -> tuple[None, Tensor | None]:
        """What other ranks wait for, dS_in."""
        e, S_in = saved
        if e is None or S_in is None:
            return None, None
        dS_in, do = torch.zeros_like(S_in), do.contiguous()
        for row, (_, start, stop, span) in itertools.product(range(self.runs.batch), self.runs.entered):
            e_, do_ = (x[row, start:stop].transpose(0, 1) for x in (e, do))
            dS_in[span, row] = _wide_bmm(e_.mT, do_)
        return None, dS_in

    def intra_backward(self, do: Tensor, saved: Sequence[Any], S_in: Tensor | None) -> tuple[None, Local]:
        """All that needs no other rank's gradient: the states with S_in, and what the outputs alone give to r."""
        fla, runs = passes(), self.runs
        *inputs, sums, A, scores = saved
        q, k, v, beta, do = (runs.flat(x) for x in (*inputs, do))
        system = {"k": k, "v": v, "beta": beta, "A": A, **runs.tokens}
        output = {"q": q, "k": k, "do": do, "scale": self.scale, "chunk_size": CHUNK, **runs.tokens}
        with torch.cuda.device_of(q):
            if _vector(sums):
                w, u, queries, keys = fla.chunk_kda_recompute(q=q, gk=sums, **system)
            else:
                queries, keys = q, k
                w, u = fla.recompute_w_u_fwd(g=sums, **system)
            h, r, _ = self._chain(keys, w, u, sums, runs.entering(S_in), final=False)
            d_scores = None
            if _vector(sums):
                d_scores, dr = fla.chunk_kda_bwd_dAv(v=r, A=scores, **output)
            else:
                dr = fla.chunk_bwd_dv_local(g=sums, **output)
        return None, Local((q, k, v, beta), sums, A, queries, keys, w, h, r, do, dr, d_scores)

    def states_backward(
        self, dh: None, d_leaving: Tensor | None, saved: Sequence[Any], local: Local
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v, beta and g. d_leaving [s,B,H,K,V] holds those of the states that leave the spans in the
        whole sequence; as the states here are those of the whole sequence too, a transition needs no gradient."""
        fla, runs = passes(), self.runs
        own, sums, do = local, local.sums, local.do
        q, k, v, beta = own.tokens
        sizes = {"scale": self.scale, "chunk_size": CHUNK}
        with torch.cuda.device_of(q):
            dh, _, dr = fla.chunk_gated_delta_rule_bwd_dhu(
                q=own.queries,
                k=own.keys,
                w=own.w,
                do=do,
                dv=own.dr,
                dht=runs.leaving_backward(d_leaving),
                **sizes,
                **_decays(sums),
                **runs.chain,
            )
            written = {"q": q, "k": k, "g": sums, "h": own.h, "do": do, "dh": dh, "dv": dr, **sizes, **runs.tokens}
            if _vector(sums):
                dq, dk, dv, dbeta, dg, dA = fla.chunk_kda_bwd_wy_dqkg_fused(
                    v=v, v_new=own.r, beta=beta, A=own.A, **written
                )
                dq, dk, dbeta, dg = fla.chunk_kda_bwd_intra(
                    q=q,
                    k=k,
                    g=sums,
                    beta=beta,
                    dAqk=own.d_scores,
                    dAkk=dA,
                    dq=dq,
                    dk=dk,
                    db=dbeta,
                    dg=dg,
                    chunk_size=CHUNK,
                    **runs.tokens,
                )
                dq, dk = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dq, dk))
            else:
                dq, dk, dw, dg = fla.chunk_bwd_dqkwg(v=own.r, w=own.w, **written)
                dk_, dv, dbeta, dg_ = fla.prepare_wy_repr_bwd(
                    k=k, v=v, beta=beta, A=own.A, dw=dw, du=dr, g=sums, **runs.tokens
                )
                dk = dk + dk_
                dg = None if dg is None else dg + dg_
            if dg is not None:
                dg = fla.chunk_local_cumsum(dg, chunk_size=CHUNK, reverse=True, **runs.tokens)
        dq, dk, dv, dbeta = (runs.rows(x).to(of) for x, of in zip((dq, dk, dv, dbeta), own.tokens, strict=True))
        return dq, dk, dv, dbeta, None if dg is None else runs.rows(dg)


def _vector(sums: Tensor | None) -> bool:
    return sums is not None and sums.ndim == 4


def _decays(sums: Tensor | None) -> dict[str, Tensor | None]:
    """The decays, as a pass that goes from chunk to chunk takes them."""
    return {"gk": sums} if _vector(sums) else {"g": sums}


def _wide_bmm(x: Tensor, y: Tensor) -> Tensor:
    """x y, with the sums and the result in fp32."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return torch.bmm(x.float(), y.float())
    return torch.bmm(x, y, out_dtype=torch.float32)
