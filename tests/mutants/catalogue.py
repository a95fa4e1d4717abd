"""Ways to break the source, each with the test that must notice. run.py applies them; see CONTRIBUTING.md."""

from __future__ import annotations

from dataclasses import dataclass

PARITY = "tests/hybrid_sp/test_parity.py::test_parity_fp64"
OVERLAP = "tests/hybrid_sp/test_overlap.py"
HALO = "tests/hybrid_sp/test_halo.py"
WINDOW = "tests/hybrid_sp/test_window.py"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """`old`, which stands once in `file`, replaced by `new`, must make `test` (a pytest id) fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    # The algebra of states.
    Mutant(
        name="adjoint sign of a span's decay",
        file="hybrid_sp/state.py",
        old="product = apply(transition, entering) * d_leaving",
        new="product = -apply(transition, entering) * d_leaving",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="forward fold in reverse order",
        file="hybrid_sp/state.py",
        old="compose(span(spans, i), AffineState(None, states[-1]))",
        new="compose(span(spans, len(spans.state) - 1 - i), AffineState(None, states[-1]))",
        test=f"{PARITY}[3-contiguous-linear]",
    ),
    Mutant(
        name="backward fold in reverse order",
        file="hybrid_sp/state.py",
        old="return d_leaving[::-1]",
        new="return d_leaving",
        test=f"{PARITY}[3-contiguous-linear]",
    ),
    Mutant(
        name="dropped decay of a span, forward",
        file="hybrid_sp/state.py",
        old="apply(later.transition, earlier.state) + later.state",
        new="earlier.state + later.state",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="dropped decay of a span, backward",
        file="hybrid_sp/state.py",
        old="d_after = apply_adjoint(None if transitions is None else transitions[i], d_after) + d_entering[i]",
        new="d_after = d_after + d_entering[i]",
        test=f"{PARITY}[3-contiguous-linear]",
    ),
    Mutant(
        name="dropped dS_final",
        file="hybrid_sp/state.py",
        old="d_after = torch.zeros_like(d_entering[0]) if d_final is None else d_final",
        new="d_after = torch.zeros_like(d_entering[0])",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="one decay too many on the way to the initial state",
        file="hybrid_sp/state.py",
        old="d_state = apply_adjoint(None if transitions is None else transitions[i], d_state)",
        new="d_state = apply_adjoint(None if transitions is None else transitions[i], d_state + d_own.pop(i, 0))",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    # The exchange and the layout.
    Mutant(
        name="one rank's dS_final",
        file="hybrid_sp/exchange/all_gather.py",
        old="x_Ps[:, -1].sum(0) if self.final",
        new="x_Ps[0, -1] if self.final",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="swapped zigzag spans of states",
        file="hybrid_sp/layout.py",
        old="for slot, span in enumerate(spans_of(rank, self.sp.size, self.sp.layout)):",
        new="for slot, span in enumerate(spans_of(rank, self.sp.size, self.sp.layout)[::-1]):",
        test=f"{PARITY}[2-zigzag-linear]",
    ),
    Mutant(
        name="swapped zigzag spans of keys",
        file="hybrid_sp/layout.py",
        old="for span in spans_of(rank, self.sp.size, self.sp.layout):\n                tokens =",
        new="for span in spans_of(rank, self.sp.size, self.sp.layout)[::-1]:\n                tokens =",
        test=f"{PARITY}[2-zigzag-softmax]",
    ),
    Mutant(
        name="a shorter rank's padding before its tokens",
        file="hybrid_sp/layout.py",
        old="(0, 0) * (x_local.ndim - 1 - dim % x_local.ndim) + (0, short)",
        new="(0, 0) * (x_local.ndim - 1 - dim % x_local.ndim) + (short, 0)",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    # The schedule.
    Mutant(
        name="skipped wait",
        file="hybrid_sp/collectives.py",
        old="                self._work.wait()",
        new="                self._work.is_completed()",
        test=f"{PARITY}[4-contiguous-linear]",
    ),
    Mutant(
        name="stale Pending",
        file="hybrid_sp/collectives.py",
        old="result, self._result = self._result, None",
        new="result = self._result",
        test=f"{OVERLAP}::test_waiting_twice_raises",
    ),
    Mutant(
        name="leftover collective not awaited",
        file="hybrid_sp/overlap.py",
        old="Variable._execution_engine.queue_callback(self._drain_backward)",
        new="pass",
        test=f"{OVERLAP}::test_gradient_of_the_initial_state_alone_leaves_nothing_in_flight",
    ),
    Mutant(
        name="no overlap",
        file="hybrid_sp/overlap.py",
        old="        if self.sp.overlap:\n            return pending\n",
        new="",
        test=f"{OVERLAP}::test_local_work_runs_while_the_collective_is_in_flight[linear]",
    ),
    Mutant(
        name="ranks not compared",
        file="hybrid_sp/collectives.py",
        old="    if header.check:\n",
        new="    if False:\n",
        test=f"{OVERLAP}::test_ranks_that_come_apart_stop_with_one_message[requires_grad]",
    ),
    # The kernels and the heads.
    Mutant(
        name="wrong key head",
        file="hybrid_sp/kernels/chunks.py",
        old='"B (N C) G D -> (N B G R) C D"',
        new='"B (N C) G D -> (N B R G) C D"',
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="dropped decay within a chunk",
        file="hybrid_sp/kernels/scores.py",
        old="if self.decay is None else weights.mul_(self.decay)",
        new="",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="a state carried into the next document",
        file="hybrid_sp/kernels/chunks.py",
        old="fresh += [n == 0 for n in range(len(here))]",
        new="fresh += [n + piece == 0 for n in range(len(here))]",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="an entering state read by later documents",
        file="hybrid_sp/kernels/chunks.py",
        old="reached += [piece == 0 and a not in boundaries] * len(here)",
        new="reached += [True] * len(here)",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="a state passed through a span in which a document begins",
        file="hybrid_sp/linear.py",
        old="x if whole else torch.full_like",
        new="x if True else torch.full_like",
        test=f"{PARITY}[3-contiguous-linear]",
    ),
    Mutant(
        name="the same where every rank knows the decays",
        file="hybrid_sp/linear.py",
        old="known[list(shard.broken)] = float",
        new="known[[]] = float",
        test=f"{PARITY}[3-contiguous-linear]",
    ),
    Mutant(
        name="a bonus beside the decay of its own token",
        file="hybrid_sp/kernels/linear.py",
        old='block.load(g, heads), "before" if exclusive else "through"',
        new='block.load(g, heads), "through"',
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="pairs of a bonus that reach their own token",
        file="hybrid_sp/kernels/scores.py",
        old="read = F.pad(right[:, :, :-1], (0, 0, 1, 0)) if exclusive else right",
        new="read = right",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="one rank's gradient of the bonus",
        file="hybrid_sp/kernels/linear.py",
        old="d_bonus += (d_self",
        new="d_bonus = (d_self",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    # The delta rule.
    Mutant(
        name="a dense transition not transposed",
        file="hybrid_sp/state.py",
        old="transition = transition.mT",
        new="transition = transition",
        test=f"{PARITY}[3-contiguous-delta]",
    ),
    Mutant(
        name="transitions of chunks in reverse order",
        file="hybrid_sp/kernels/delta.py",
        old="torch.bmm(A[n], D[n], out=after)",
        new="torch.bmm(D[n], A[n], out=after)",
        test=f"{PARITY}[2-contiguous-delta]",
    ),
    Mutant(
        name="rows that a token wrote not taken from its key's gradient",
        file="hybrid_sp/kernels/delta.py",
        old="dk_.sub_(dk_since)",
        new="dk_",
        test=f"{PARITY}[1-contiguous-delta]",
    ),
    Mutant(
        name="a token that corrects itself",
        file="hybrid_sp/kernels/delta.py",
        old="dL.diagonal(dim1=1, dim2=2).zero_()",
        new="dL.diagonal(dim1=1, dim2=2)",
        test=f"{PARITY}[1-contiguous-delta]",
    ),
    Mutant(
        name="dropped gradient of the states that enter the chunks",
        file="hybrid_sp/kernels/delta.py",
        old="torch.baddbmm(dh[block.first + n], A[block.first + n].mT, dS[n], out=before)",
        new="torch.bmm(A[block.first + n].mT, dS[n], out=before)",
        test=f"{PARITY}[1-contiguous-delta]",
    ),
    # Keys and values.
    Mutant(
        name="reduce-scatter without the diagonal",
        file="hybrid_sp/exchange/keys.py",
        old="grad += others[:, : grad.shape[1]]",
        new="grad.copy_(others[:, : grad.shape[1]])",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="one rank's dK",
        file="hybrid_sp/exchange/keys.py",
        old="grad += others[:, : grad.shape[1]]",
        new="pass",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="dK for dV of a window",
        file="hybrid_sp/exchange/keys.py",
        old="self.plan.add(dv, received[:, 1])",
        new="self.plan.add(dv, received[:, 0])",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="keys of another range",
        file="hybrid_sp/exchange/keys.py",
        old="[sum(lengths[:i]) for i in range(len(lengths))]",
        new="[0 for _ in lengths]",
        test=f"{PARITY}[2-zigzag-softmax]",
    ),
    Mutant(
        name="blocks merged without their log-sum-exp",
        file="hybrid_sp/kernels/softmax.py",
        old="lse = torch.logaddexp(lse_a, lse_b)",
        new="lse = torch.maximum(lse_a, lse_b)",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="triangle of a window written in the order of its keys",
        file="hybrid_sp/softmax.py",
        old='(x.flip(1) if part.kind == "flipped" else x).unflatten',
        new="x.unflatten",
        test=f"{PARITY}[1-contiguous-softmax]",
    ),
    Mutant(
        name="window a token too long before a span",
        file="hybrid_sp/softmax.py",
        old="start - window + 1",
        new="start - window",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="keys of an earlier document",
        file="hybrid_sp/softmax.py",
        old="first = shard.document_start(start)\n        if",
        new="first = 0\n        if",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="queries of a later document",
        file="hybrid_sp/softmax.py",
        old="queries = min(end, shard.document_end(start)) - start",
        new="queries = end - start",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="gather for a short window",
        file="hybrid_sp/softmax.py",
        old="if 0 < missing <= rows_of_others",
        new="if 0 < missing or rows_of_others",
        test=f"{WINDOW}::test_a_window_receives_what_it_sees_however_long_the_sequence",
    ),
    # The halo.
    Mutant(
        name="halo of an earlier document",
        file="hybrid_sp/exchange/halo.py",
        old="(max(start - width, shard.document_start(start)), start)",
        new="(max(start - width, 0), start)",
        test=f"{HALO}::test_parity_of_short_spans_and_documents[3-contiguous]",
    ),
    Mutant(
        name="halo of other tokens",
        file="hybrid_sp/kernels/conv.py",
        old="tokens[:, taps.width - 1 - j :][:, :n], taps.weights[j])",
        new="tokens[:, :n], taps.weights[j])",
        test=f"{PARITY}[2-contiguous-halo]",
    ),
    Mutant(
        name="a tap crosses the begin of a document",
        file="hybrid_sp/kernels/conv.py",
        old="return x.index_fill(1, torch.tensor(tokens, device=x.device), 0) if tokens else x",
        new="return x",
        test=f"{PARITY}[1-contiguous-halo]",
    ),
    Mutant(
        name="gradient of the halo dropped",
        file="hybrid_sp/exchange/halo.py",
        old="        self.plan.add(dx, received)\n",
        new="",
        test=f"{PARITY}[2-contiguous-halo]",
    ),
    Mutant(
        name="rows of the halo in the order in which they arrive",
        file="hybrid_sp/exchange/halo.py",
        old="arrived[place[i]]",
        new="arrived[i]",
        test=f"{PARITY}[3-zigzag-halo]",
    ),
    Mutant(
        name="gradient of an earlier pass",
        file="hybrid_sp/exchange/halo.py",
        old="        self.own = None  # of",
        new="        pass  # of",
        test=f"{HALO}::test_an_input_alone_has_the_gradient_that_it_has_among_all",
    ),
    Mutant(
        name="initial state on every rank's first tokens",
        file="hybrid_sp/halo.py",
        old="known = missing if first == 0 else 0",
        new="known = missing",
        test=f"{PARITY}[2-contiguous-halo]",
    ),
    # Loss, labels and gradients.
    Mutant(
        name="mean of means",
        file="hybrid_sp/gradients.py",
        old='collectives.all_reduce(flat, group, tag="gradients").div_(total)',
        new='collectives.all_reduce(flat / max(tokens, 1), group, tag="gradients").div_(collectives.size(group))',
        test="tests/hybrid_sp/test_gradients.py::test_the_sum_over_ranks_is_divided_by_all_tokens[torch.float64]",
    ),
    Mutant(
        name="unshifted label",
        file="hybrid_sp/layout.py",
        old="labels_BL = tokens_BL.roll(-1, 1)",
        new="labels_BL = tokens_BL.clone()",
        test="tests/hybrid_sp/test_layout.py::test_ranks_hold_every_token_once[2-contiguous]",
    ),
    Mutant(
        name="label cut before the shift",
        file="hybrid_sp/layout.py",
        old="return self.take(labels_BL, 1)",
        new="return F.pad(self.take(tokens_BL, 1)[:, 1:], (0, 1), value=NO_LABEL)",
        test="tests/hybrid_sp/test_layout.py::test_ranks_hold_every_token_once[2-contiguous]",
    ),
    Mutant(
        name="label of a token in the next document",
        file="hybrid_sp/layout.py",
        old="(*self.boundaries, self.length)",
        new="(self.length,)",
        test="tests/hybrid_sp/test_layout.py::test_documents[contiguous]",
    ),
    Mutant(
        name="positions counted over documents",
        file="hybrid_sp/layout.py",
        old="return tokens - first[torch.searchsorted(first, tokens, right=True) - 1]",
        new="return tokens",
        test="tests/hybrid_sp/test_layout.py::test_documents[contiguous]",
    ),
    Mutant(
        name="positions counted on each rank",
        file="hybrid_sp/layout.py",
        old="torch.arange(start, end) for start, end in self.spans",
        new="torch.arange(end - start) for start, end in self.spans",
        test="tests/layers/test_mixers_cut.py::test_mixers_agree_with_one_device[2-batch]",
    ),
    Mutant(
        name="stale gradients of an earlier backward",
        file="hybrid_sp/overlap.py",
        old="pending, self._backward = self._backward, None",
        new="pending = self._backward",
        test=f"{OVERLAP}::test_records_are_read_by_index_not_used_up",
    ),
]
