"""Mutants of the one schedule of recurrences."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

PARITY = "tests/hybrid_sp/ops/test_parity.py::test_parity_fp64"

RECURRENCE_MUTANTS = [
    Mutant(
        name="recurrence: nothing leads autograd from the second phase to the first",
        file="hybrid_sp/ops/recurrence.py",
        old="x, work, edge, q_second",
        new="x, work, edge.detach(), q_second",
        test=f"{PARITY}[1-contiguous-delta]",
    ),
    Mutant(
        name="recurrence: the gradient of q asked of the phase that does not give it",
        file="hybrid_sp/ops/recurrence.py",
        old="if phases.q_in_states else",
        new="if not phases.q_in_states else",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="recurrence: a final state that nobody has passed on",
        file="hybrid_sp/ops/recurrence.py",
        old="initial is not None or final  # else",
        new="initial is not None  # else",
        test="tests/hybrid_sp/kernels/test_linear.py::test_every_length[1-none]",
    ),
    Mutant(
        name="a state of the delta rule carried into the next document",
        file="hybrid_sp/kernels/reference/delta.py",
        old="if piece.begins_document:",
        new="if False:",
        test=f"{PARITY}[1-contiguous-delta]",
    ),
    Mutant(
        name="operators traced by torch.compile",
        file="hybrid_sp/eager.py",
        old="if torch.compiler.is_compiling()",
        new="if False",
        test="tests/layers/test_compile.py::test_a_block_breaks_once_at_every_operator[softmax]",
    ),
]
