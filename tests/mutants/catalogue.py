"""Ways to break the source, each with the test that must notice. run.py applies them; see CONTRIBUTING.md."""

from __future__ import annotations

from dataclasses import dataclass

PARITY = "tests/hybrid_sp/test_parity.py::test_parity_fp64"
OVERLAP = "tests/hybrid_sp/test_overlap.py"


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
        test=f"{PARITY}[2-contiguous]",
    ),
    Mutant(
        name="forward fold in reverse order",
        file="hybrid_sp/state.py",
        old="compose(span(spans, i), AffineState(None, states[-1]))",
        new="compose(span(spans, len(spans.state) - 1 - i), AffineState(None, states[-1]))",
        test=f"{PARITY}[3-contiguous]",
    ),
    Mutant(
        name="backward fold in reverse order",
        file="hybrid_sp/state.py",
        old="return d_leaving[::-1]",
        new="return d_leaving",
        test=f"{PARITY}[3-contiguous]",
    ),
    Mutant(
        name="dropped decay of a span, forward",
        file="hybrid_sp/state.py",
        old="apply(later.transition, earlier.state) + later.state",
        new="earlier.state + later.state",
        test=f"{PARITY}[2-contiguous]",
    ),
    Mutant(
        name="dropped decay of a span, backward",
        file="hybrid_sp/state.py",
        old="d_after = apply(None if transitions is None else transitions[i], d_after) + d_entering[i]",
        new="d_after = d_after + d_entering[i]",
        test=f"{PARITY}[3-contiguous]",
    ),
    Mutant(
        name="dropped dS_final",
        file="hybrid_sp/state.py",
        old="d_after = torch.zeros_like(d_entering[0]) if d_final is None else d_final",
        new="d_after = torch.zeros_like(d_entering[0])",
        test=f"{PARITY}[2-contiguous]",
    ),
    Mutant(
        name="one decay too many on the way to the initial state",
        file="hybrid_sp/state.py",
        old="transitions[:i].sum(0), d_state",
        new="transitions[: i + 1].sum(0), d_state",
        test=f"{PARITY}[2-contiguous]",
    ),
    # The exchange and the layout.
    Mutant(
        name="one rank's dS_final",
        file="hybrid_sp/exchange/all_gather.py",
        old="x_Ps[:, -1].sum(0) if self.final",
        new="x_Ps[0, -1] if self.final",
        test=f"{PARITY}[2-contiguous]",
    ),
    Mutant(
        name="swapped zigzag spans of states",
        file="hybrid_sp/layout.py",
        old="for slot, span in enumerate(spans_of(rank, self.sp.size, self.sp.layout)):",
        new="for slot, span in enumerate(spans_of(rank, self.sp.size, self.sp.layout)[::-1]):",
        test=f"{PARITY}[2-zigzag]",
    ),
    Mutant(
        name="swapped zigzag spans of keys",
        file="hybrid_sp/layout.py",
        old="for span in spans_of(rank, self.sp.size, self.sp.layout):\n                tokens =",
        new="for span in spans_of(rank, self.sp.size, self.sp.layout)[::-1]:\n                tokens =",
        test=f"{PARITY}[2-zigzag]",
    ),
    Mutant(
        name="a shorter rank's padding before its tokens",
        file="hybrid_sp/layout.py",
        old="(0, 0) * (x_local.ndim - 1 - dim % x_local.ndim) + (0, short)",
        new="(0, 0) * (x_local.ndim - 1 - dim % x_local.ndim) + (short, 0)",
        test=f"{PARITY}[2-contiguous]",
    ),
    # The schedule.
    Mutant(
        name="skipped wait",
        file="hybrid_sp/collectives.py",
        old="                self._work.wait()",
        new="                self._work.is_completed()",
        test=f"{PARITY}[4-contiguous]",
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
        test=f"{PARITY}[1-contiguous]",
    ),
    Mutant(
        name="dropped decay within a chunk",
        file="hybrid_sp/kernels/linear.py",
        old="return weights.tril_() if self.decay is None else weights.mul_(self.decay)",
        new="return weights.tril_()",
        test=f"{PARITY}[1-contiguous]",
    ),
    # Keys and values.
    Mutant(
        name="reduce-scatter without the diagonal",
        file="hybrid_sp/softmax.py",
        old="(a + b for a, b in zip((dk, dv)",
        new="(b for a, b in zip((dk, dv)",
        test=f"{PARITY}[2-contiguous]",
    ),
    Mutant(
        name="one rank's dK",
        file="hybrid_sp/softmax.py",
        old="(a + b for a, b in zip((dk, dv)",
        new="(a for a, b in zip((dk, dv)",
        test=f"{PARITY}[2-contiguous]",
    ),
    Mutant(
        name="blocks merged without their log-sum-exp",
        file="hybrid_sp/kernels/softmax.py",
        old="lse = torch.logaddexp(lse_a, lse_b)",
        new="lse = torch.maximum(lse_a, lse_b)",
        test=f"{PARITY}[2-contiguous]",
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
        old="torch.cat([tokens_BL[:, 1:], last], 1)",
        new="torch.cat([tokens_BL[:, :-1], last], 1)",
        test="tests/hybrid_sp/test_layout.py::test_ranks_hold_every_token_once[2-contiguous]",
    ),
    Mutant(
        name="label cut before the shift",
        file="hybrid_sp/layout.py",
        old="return self.take(torch.cat([tokens_BL[:, 1:], last], 1), 1)",
        new="return torch.cat([self.take(tokens_BL, 1)[:, 1:], last], 1)",
        test="tests/hybrid_sp/test_layout.py::test_ranks_hold_every_token_once[2-contiguous]",
    ),
    Mutant(
        name="positions counted on each rank",
        file="hybrid_sp/layout.py",
        old="torch.arange(start, end) for start, end in self.spans",
        new="torch.arange(end - start) for start, end in self.spans",
        test="tests/layers/test_parallel.py::test_mixers_agree_with_one_device[2]",
    ),
    Mutant(
        name="stale gradients of an earlier backward",
        file="hybrid_sp/overlap.py",
        old="pending, self._backward = self._backward, None",
        new="pending = self._backward",
        test=f"{OVERLAP}::test_records_are_read_by_index_not_used_up",
    ),
]
