"""The phases of the delta rule on CUDA, by separate passes of fla-core. Only this file knows the internals of fla.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T          o_t = scale * q_t S_t

A *run* is the part of one span that belongs to one document. fla sees each run as a separate sequence (`cu_seqlens`).
Within a run everything is affine in the state S_in that enters it. Phase 1 therefore walks through the chunks once,
with states [h | D] of V + K columns. They begin as [0 | I] where S_in enters, and as [0 | 0] elsewhere. They end as the
summary [leaving | transition].

    states   WY form of the chunks (w, u, A); with u' = [u | 0], per chunk  r' = u' - w h',  h' <- exp(P_C) h' + k^T r'
    intra    [o_intra | e] = the part of o that queries read from r' and h'                 (scale is in both)
    inter    o = o_intra + e S_in

Backward mirrors it. dS_in = e^T do is sent at once. Meanwhile the chunks' states are computed again, now with S_in, and
with them the part of dr that needs no other rank. All other gradients follow once the gradients of the leaving states
are known. If no state enters and nobody reads a summary, phase 1 walks with V columns, phase 2 computes o, and phase 3
does nothing.

Units and layouts are fla 0.6's. Tensors are contiguous, [B,T,H,D], or [1,B*T,H,D] for all rows with `cu_seqlens`.
Decays are summed from the chunk's start in units of log2; gradients of the sums are for natural logs. h is in the dtype
of k; states that enter and leave are fp32. `beta` may be fp32 with bf16 or fp16 tokens. Chunks have 64 tokens.

fla computes a decay between tokens as the difference of two sums in fp32. Floored decays keep these sums under 1e4.
Many strong decays cost the other decays of their chunk 1e-4 (measured), which is less than bf16 rounds.

Sources: WY form, arXiv 2406.06484, section 3.2; with decays, arXiv 2412.06464, section 3.3, and 2510.26692, section 3.
"""

from __future__ import annotations

import functools
import itertools
import pkgutil
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...transfer import to_device
from ..heads import sum_groups
from ..phases import AffineState, Gradients, Inputs, Options
from ..pieces import Piece, Pieces, Spans, cut

CHUNK = 64  # tokens


PASSES = {  # our name of each pass, and its place in fla-core
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
    """Import PASSES and VALUES. Raise ImportError if one is missing."""
    try:
        return SimpleNamespace(**{name: pkgutil.resolve_name(where) for name, where in (PASSES | VALUES).items()})
    except (ImportError, AttributeError) as error:
        raise ImportError(
            'delta_rule: backend "fla" needs fla-core 0.6 and triton: pip install "hybrid_sp[fla]", or use '
            f'backend="torch" ({error})'
        ) from error


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of a rank, the same in every row of the batch, with the arguments that describe them to fla.

    tokens   arguments of a pass that works on tokens; none if a row is one run
    chain    arguments of a pass that goes from chunk to chunk
    """

    batch: int
    pieces: Pieces
    tokens: dict[str, Tensor] = field(default_factory=dict)
    chain: dict[str, Tensor] = field(default_factory=dict)

    @property
    def entered(self) -> list[tuple[int, Piece]]:
        """The runs that start with the state entering their span, each with its number."""
        return [(run, piece) for run, piece in enumerate(self.pieces.all) if piece.begins_span and piece.reached]

    def flat(self, x: Tensor) -> Tensor:
        """Arrange x [B,T,...] as the passes read it."""
        x = x.contiguous()
        return x.flatten(0, 1).unsqueeze(0) if self.tokens else x

    def rows(self, x: Tensor) -> Tensor:
        """Arrange the output of a pass as [B,T,...] again."""
        return x if len(x) == self.batch else x.view(self.batch, -1, *x.shape[2:])

    def by_row(self, S: Tensor) -> Tensor:
        """View the states of all runs as [B,count,H,K,...]."""
        return S.unflatten(0, (self.batch, self.pieces.count))

    def identity(self, heads: int, key: int, width: int, device: torch.device) -> Tensor:
        """Return [0 | I] for runs that a state enters, and [0 | 0] for the others."""
        S = torch.zeros(self.batch * self.pieces.count, heads, key, width + key, dtype=torch.float32, device=device)
        for run, _ in self.entered:
            self.by_row(S)[:, run, :, :, width:] = torch.eye(key, device=device)
        return S

    def entering(self, S_in: Tensor | None) -> Tensor | None:
        """Spread S_in [s,B,H,K,V] to the runs that it enters, with zeros for the others."""
        if S_in is None:
            return None
        S = S_in.new_zeros(self.batch * self.pieces.count, *S_in.shape[2:])
        for run, piece in self.entered:
            self.by_row(S)[:, run] = S_in[piece.span]
        return S

    def leaving(self, S: Tensor) -> Tensor:
        """Select the states that leave the spans [s,B,H,K,...] from the states at the ends of all runs."""
        return torch.stack([self.by_row(S)[:, end - 1] for end in self.pieces.bounds[1:]])

    def leaving_backward(self, d_leaving: Tensor | None) -> Tensor | None:
        """Spread d_leaving to the runs that end spans. This is the adjoint of `leaving`."""
        if d_leaving is None:
            return None
        S = d_leaving.new_zeros(self.batch * self.pieces.count, *d_leaving.shape[2:])
        for span, end in enumerate(self.pieces.bounds[1:]):
            self.by_row(S)[:, end - 1] = d_leaving[span]
        return S


def runs_of(spans: Spans, batch: int, device: torch.device) -> Runs:
    """Return the runs of a rank that holds these spans."""
    return _runs(spans, batch, device, CHUNK)


@functools.lru_cache(maxsize=64)
def _runs(spans: Spans, batch: int, device: torch.device, chunk: int) -> Runs:
    runs = Runs(batch, cut(spans))
    if runs.pieces.count == 1:
        return runs
    fla, length = passes(), sum(spans.lengths)
    edges = [row * length + run.start for row in range(batch) for run in runs.pieces.all] + [batch * length]
    host = torch.tensor(edges)
    cu_seqlens = to_device(host, device)
    indices = fla.prepare_chunk_indices(cu_seqlens, chunk, cu_seqlens_cpu=host)
    runs.tokens.update(cu_seqlens=cu_seqlens, chunk_indices=indices)
    runs.chain.update(runs.tokens, chunk_offsets=to_device(fla.prepare_chunk_offsets(host, chunk), device))
    return runs


def decay_of(g: Tensor | None, key: int) -> Tensor | None:
    """Return g in a form that the passes can differentiate here. Triton 3.4 ... 3.7.0 miscompile the gradient of a
    decay per head on Hopper, where fla refuses it. There g is broadcast to every key channel."""
    fla = passes()
    if g is None or g.ndim == 4 or not (fla.HOPPER and fla.TRITON_3_4_0 and not fla.TRITON_3_7_1):
        return g
    return g.unsqueeze(-1).expand(*g.shape, key)


class Work(NamedTuple):
    """The results of a forward phase."""

    h: Tensor | None  # [h | D] that enters the chunks; no phase after 2 needs it
    r: Tensor | None  # r' of the tokens; no phase after 2 needs it
    sums: Tensor | None  # of the decays, from the chunk's start
    A: Tensor  # the solved triangular system
    scores: Tensor | None  # scale * q k^T with decays [B,T,H,C], if these are vectors
    e: Tensor | None = None  # the effective queries of S_in [B,T,H,K], if a state may enter the spans


class Reading(NamedTuple):
    """The results of `inter_backward`, with the tensors that `intra_backward` needs."""

    do: Tensor
    x: Inputs
    saved: Work
    S_in: Tensor | None


class Local(NamedTuple):
    """The results of `intra_backward`, as the passes take them. `queries` and `keys` are q and k as the states see
    them: decayed, if decays are vectors."""

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
class DeltaPhases:
    """The phases of one call, by fla. See `kernels/phases.py`. q, k, v are bf16 or fp16, beta and g fp32."""

    runs: Runs
    options: Options
    PADDING: ClassVar[int] = 0
    q_in_states: ClassVar[bool] = True

    @classmethod
    def prepare(cls, x: Inputs, spans: Spans, options: Options) -> tuple[DeltaPhases, Inputs]:
        """Convert beta and decays to fp32, and the decays to a form that the passes can differentiate."""
        assert x.beta is not None
        g = decay_of(None if x.g is None else x.g.float(), x.k.shape[-1])
        runs = runs_of(spans, len(x.v), x.v.device)
        return cls(runs, options), x._replace(beta=x.beta.float(), g=g)

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, Work]:
        """Compute the WY form, and the chain of states [h | D] through the chunks."""
        fla, runs, scale = passes(), self.runs, self.options.scale
        key, width = x.k.shape[-1], x.v.shape[-1]
        assert x.beta is not None
        with torch.cuda.device_of(x.q):
            # 1. Sum the decays from the start of each chunk.
            sums = None
            if x.g is not None:
                sums = fla.chunk_local_cumsum(runs.flat(x.g), chunk_size=CHUNK, scale=fla.RCP_LN2, **runs.tokens)
            # 2. Compute the WY form of the chunks (w, u, A); for vector decays also decayed keys, and scores.
            q, k, v, beta = (runs.flat(part) for part in (x.q, x.k, x.v, x.beta))
            system = {"k": k, "v": v, "beta": beta, "chunk_size": CHUNK, **runs.tokens}
            keys, scores = k, None
            if _vector(sums):
                w, u, _, keys, scores, A = fla.chunk_kda_fwd_intra(q=q, gk=sums, scale=scale, **system)
            else:
                w, u, A = fla.chunk_gated_delta_rule_fwd_intra(g=sums, **system)
            # 3. Walk through the chunks with [h | D], or with h alone if nobody reads D.
            initial = None
            if self.options.entered:
                u = F.pad(u, (0, key))
                initial = runs.identity(v.shape[2], key, width, k.device)
            h, r, final = self._chain(keys, w, u, sums, initial, final=self.options.entered)
        # 4. The states at the ends of spans are [leaving | transition].
        summary = None
        if self.options.entered:
            summary = AffineState(runs.leaving(final[..., width:]), runs.leaving(final[..., :width]))
        return summary, Work(h, r, sums, A, scores)

    def _chain(
        self, keys: Tensor, w: Tensor, u: Tensor, sums: Tensor | None, initial: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the states that enter the chunks, r = u - w h, and the states at the ends of the runs."""
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

    def intra_forward(self, x: Inputs, work: Work) -> tuple[Tensor, Work]:
        """Compute o_intra [B,T,H,V] and e [B,T,H,K]."""
        fla, runs, width, sums = passes(), self.runs, x.v.shape[-1], work.sums
        # 1. Read r' and h' with the queries, in one pass over all of their columns.
        read = {"q": runs.flat(x.q), "v": work.r, "h": work.h, "g": sums, "scale": self.options.scale}
        read |= {"chunk_size": CHUNK, **runs.tokens}
        with torch.cuda.device_of(x.q):
            if _vector(sums):
                o = fla.chunk_gla_fwd_o_gk(A=work.scores, **read)
            else:
                o = fla.chunk_fwd_o(k=runs.flat(x.k), **read)
        # 2. Cut the result into o_intra and e.
        o, e = runs.rows(o), None
        if self.options.entered:
            o, e = (part.clone(memory_format=torch.contiguous_format) for part in (o[..., :width], o[..., width:]))
        return o, work._replace(h=None, r=None, e=e)

    def inter_forward(self, x: Inputs, work: Work, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, Work]:
        """Compute o, in place of o_intra."""
        if work.e is not None and S_in is not None:
            for row, (_, run) in itertools.product(range(self.runs.batch), self.runs.entered):
                o_, e_ = (part[row, run.start : run.stop].transpose(0, 1) for part in (o_intra, work.e))
                o_.baddbmm_(e_, S_in[run.span, row].to(e_.dtype))
        return o_intra, work

    def inter_backward(self, do: Tensor, x: Inputs, saved: Work, S_in: Tensor | None) -> tuple[Tensor | None, Reading]:
        """Compute dS_in = e^T do."""
        dS_in = None
        if saved.e is not None and S_in is not None:
            dS_in, do = torch.zeros_like(S_in), do.contiguous()
            for row, (_, run) in itertools.product(range(self.runs.batch), self.runs.entered):
                e_, do_ = (part[row, run.start : run.stop].transpose(0, 1) for part in (saved.e, do))
                dS_in[run.span, row] = _wide_bmm(e_.mT, do_)
        return dS_in, Reading(do, x, saved._replace(e=None), S_in)

    def intra_backward(self, read: Reading) -> tuple[None, None, Local]:
        """Compute the states with S_in again, and the part of dr that comes from the outputs alone."""
        fla, runs = passes(), self.runs
        do, x, (_, _, sums, A, scores, _), S_in = read
        assert x.beta is not None
        # 1. Compute w and u again, from the solved system A.
        q, k, v, beta, do = (runs.flat(part) for part in (x.q, x.k, x.v, x.beta, do))
        system = {"k": k, "v": v, "beta": beta, "A": A, **runs.tokens}
        output = {"q": q, "k": k, "do": do, "scale": self.options.scale, "chunk_size": CHUNK, **runs.tokens}
        with torch.cuda.device_of(q):
            if _vector(sums):
                w, u, queries, keys = fla.chunk_kda_recompute(q=q, gk=sums, **system)
            else:
                queries, keys = q, k
                w, u = fla.recompute_w_u_fwd(g=sums, **system)
            # 2. Walk through the chunks again, now from S_in.
            h, r, _ = self._chain(keys, w, u, sums, runs.entering(S_in), final=False)
            # 3. Compute the part of dr from outputs of the same chunk; for vector decays also the scores' gradient.
            d_scores = None
            if _vector(sums):
                d_scores, dr = fla.chunk_kda_bwd_dAv(v=r, A=scores, **output)
            else:
                dr = fla.chunk_bwd_dv_local(g=sums, **output)
        return None, None, Local((q, k, v, beta), sums, A, queries, keys, w, h, r, do, dr, d_scores)

    def states_backward(self, local: Local, dS_out: Tensor | None) -> Gradients:
        """Compute all gradients. The states here are those of the whole sequence, so a transition needs no gradient."""
        fla, runs = passes(), self.runs
        (q, k, v, beta), sums, do = local.tokens, local.sums, local.do
        sizes = {"scale": self.options.scale, "chunk_size": CHUNK}
        with torch.cuda.device_of(q):
            # 1. Walk from the last chunk to the first, for the gradients of the states and the rest of dr.
            dh, _, dr = fla.chunk_gated_delta_rule_bwd_dhu(
                q=local.queries,
                k=local.keys,
                w=local.w,
                do=do,
                dv=local.dr,
                dht=runs.leaving_backward(dS_out),
                **sizes,
                **_decays(sums),
                **runs.chain,
            )
            # 2. Go back through outputs and states, then through the WY form.
            written = {"q": q, "k": k, "g": sums, "h": local.h, "do": do, "dh": dh, "dv": dr, **sizes, **runs.tokens}
            if _vector(sums):
                dq, dk, dv, dbeta, dg, dA = fla.chunk_kda_bwd_wy_dqkg_fused(
                    v=v, v_new=local.r, beta=beta, A=local.A, **written
                )
                dq, dk, dbeta, dg = fla.chunk_kda_bwd_intra(
                    q=q,
                    k=k,
                    g=sums,
                    beta=beta,
                    dAqk=local.d_scores,
                    dAkk=dA,
                    dq=dq,
                    dk=dk,
                    db=dbeta,
                    dg=dg,
                    chunk_size=CHUNK,
                    **runs.tokens,
                )
                dq, dk = sum_groups(dq, k.shape[2]), sum_groups(dk, k.shape[2])
            else:
                dq, dk, dw, dg = fla.chunk_bwd_dqkwg(v=local.r, w=local.w, **written)
                dk_, dv, dbeta, dg_ = fla.prepare_wy_repr_bwd(
                    k=k, v=v, beta=beta, A=local.A, dw=dw, du=dr, g=sums, **runs.tokens
                )
                dk = dk + dk_
                dg = None if dg is None else dg + dg_
            # 3. A decay counts in all running sums from its token on: sum their gradients in reverse.
            if dg is not None:
                dg = fla.chunk_local_cumsum(dg, chunk_size=CHUNK, reverse=True, **runs.tokens)
        # 4. Arrange the gradients as the inputs are, in their dtypes.
        dq, dk, dv, dbeta = (runs.rows(x).to(of) for x, of in zip((dq, dk, dv, dbeta), local.tokens, strict=True))
        return Gradients(dq, dk, dv, None if dg is None else runs.rows(dg), dbeta)


def _vector(sums: Tensor | None) -> bool:
    return sums is not None and sums.ndim == 4


def _decays(sums: Tensor | None) -> dict[str, Tensor | None]:
    """Return the decays under the argument name of a pass that goes from chunk to chunk."""
    return {"gk": sums} if _vector(sums) else {"g": sums}


def _wide_bmm(x: Tensor, y: Tensor) -> Tensor:
    """Multiply x by y, with sums and result in fp32."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return torch.bmm(x.float(), y.float())
    return torch.bmm(x, y, out_dtype=torch.float32)
