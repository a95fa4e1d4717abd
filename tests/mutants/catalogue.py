"""Ways to break the source, each with the test that must notice. run.py applies them; see CONTRIBUTING.md."""

from __future__ import annotations

from tests.mutants.attention import ATTENTION_MUTANTS
from tests.mutants.baselines import BASELINE_MUTANTS
from tests.mutants.exchanges import EXCHANGE_MUTANTS
from tests.mutants.kernels import KERNEL_MUTANTS
from tests.mutants.models import MODEL_MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.packages import PACKAGE_MUTANTS
from tests.mutants.programs import PROGRAM_MUTANTS
from tests.mutants.recurrence import RECURRENCE_MUTANTS

PARITY = "tests/hybrid_sp/ops/test_parity.py::test_parity_fp64"
OVERLAP = "tests/hybrid_sp/test_overlap.py"
HALO = "tests/hybrid_sp/ops/test_short_conv.py"
WINDOW = "tests/hybrid_sp/ops/test_window.py"
SOFTMAX = "tests/hybrid_sp/ops/test_softmax_attention.py"

MUTANTS = [
    # The algebra of states.
    Mutant(
        name="adjoint sign of a chunk's decay",
        file="hybrid_sp/kernels/reference/decays.py",
        old='"before") + d_whole',
        new='"before") - d_whole',
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="forward fold in reverse order",
        file="hybrid_sp/exchange/affine.py",
        old="compose(span(spans, i), AffineState(None, states[-1]))",
        new="compose(span(spans, len(spans.state) - 1 - i), AffineState(None, states[-1]))",
        test=f"{PARITY}[4-zigzag-linear]",
    ),
    Mutant(
        name="backward fold in reverse order",
        file="hybrid_sp/exchange/affine.py",
        old="return d_leaving[::-1]",
        new="return d_leaving",
        test=f"{PARITY}[4-zigzag-linear]",
    ),
    Mutant(
        name="dropped decay of a span, forward",
        file="hybrid_sp/exchange/affine.py",
        old="apply(later.transition, earlier.state) + later.state",
        new="earlier.state + later.state",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="dropped decay of a span, backward",
        file="hybrid_sp/exchange/affine.py",
        old="apply_adjoint(None if transitions is None else transitions[i], d_leaving[-1]) + d_entering[i]",
        new="d_leaving[-1] + d_entering[i]",
        test=f"{PARITY}[4-zigzag-linear]",
    ),
    Mutant(
        name="dropped dS_final",
        file="hybrid_sp/exchange/affine.py",
        old="last = torch.zeros_like(d_entering[0]) if d_final is None else d_final",
        new="last = torch.zeros_like(d_entering[0])",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="one decay too many on the way to the initial state",
        file="hybrid_sp/exchange/affine.py",
        old="d_state = apply_adjoint(None if transitions is None else transitions[i], d_state)",
        new="d_state = apply_adjoint(None if transitions is None else transitions[i], d_state + d_own.pop(i, 0))",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    # The exchange and the layout.
    Mutant(
        name="one rank's dS_final",
        file="hybrid_sp/exchange/all_gather.py",
        old="x_Ps[:, -1].sum(0)",
        new="x_Ps[0, -1]",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="swapped zigzag spans of states",
        file="hybrid_sp/shard.py",
        old="for slot, span in enumerate(spans_of(rank, self.sp.size, self.sp.layout))",
        new="for slot, span in enumerate(spans_of(rank, self.sp.size, self.sp.layout)[::-1])",
        test=f"{PARITY}[2-zigzag-linear]",
    ),
    Mutant(
        name="swapped zigzag spans of keys",
        file="hybrid_sp/shard.py",
        old="self.spans_at(rank)[:slot]",
        new="self.spans_at(rank)[slot + 1 :]",
        test=f"{PARITY}[2-zigzag-softmax]",
    ),
    Mutant(
        name="a shorter rank's padding before its tokens",
        file="hybrid_sp/shard.py",
        old="(0, 0) * (x_local.ndim - 1 - dim % x_local.ndim) + (0, short)",
        new="(0, 0) * (x_local.ndim - 1 - dim % x_local.ndim) + (short, 0)",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    # The schedule.
    Mutant(
        name="skipped wait",
        file="hybrid_sp/comm/pending.py",
        old="                self._work.wait()",
        new="                self._work.is_completed()",
        test=f"{PARITY}[4-zigzag-linear]",
    ),
    Mutant(
        name="stale Pending",
        file="hybrid_sp/comm/pending.py",
        old="result, self._result = self._result, None",
        new="result = self._result",
        test=f"{OVERLAP}::test_waiting_twice_raises",
    ),
    Mutant(
        name="leftovers of a failed backward taken for its own",
        file="hybrid_sp/overlap.py",
        old="ctx.call.drain()  # an earlier",
        new="pass  # an earlier",
        test=f"{OVERLAP}::test_a_backward_pass_after_one_that_failed_is_its_own",
    ),
    Mutant(
        name="no overlap",
        file="hybrid_sp/overlap.py",
        old="        if not self.sp.overlaps(self.tag):\n",
        new="        if True:\n",
        test=f"{OVERLAP}::test_local_work_runs_while_the_collective_is_in_flight[linear]",
    ),
    Mutant(
        name="ranks not compared",
        file="hybrid_sp/comm/collectives.py",
        old="    if header.check:\n        compare(what",
        new="    if False:\n        compare(what",
        test=f"{OVERLAP}::test_ranks_that_come_apart_stop_with_one_message[requires_grad]",
    ),
    # The kernels and the heads.
    Mutant(
        name="wrong key head",
        file="hybrid_sp/kernels/reference/chunks.py",
        old="x.unsqueeze(3).expand(self.count, batch, groups, heads // groups,",
        new="x.unsqueeze(2).expand(self.count, batch, heads // groups, groups,",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="dropped decay within a chunk",
        file="hybrid_sp/kernels/reference/decays.py",
        old="(q @ k.mT).mul_(self._between)",
        new="(q @ k.mT).tril_()",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="a state carried into the next document",
        file="hybrid_sp/kernels/reference/linear.py",
        old="if piece.begins_document:",
        new="if False:",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="an entering state read by later documents",
        file="hybrid_sp/kernels/pieces.py",
        old="t in documents, t < first",
        new="t in documents, True",
        test=f"{PARITY}[2-contiguous-linear]",
    ),
    Mutant(
        name="a state passed through a span in which a document begins",
        file="hybrid_sp/kernels/pieces.py",
        old="x if whole else torch.full_like",
        new="x if True else torch.full_like",
        test=f"{PARITY}[4-zigzag-linear]",
    ),
    Mutant(
        name="the same where every rank knows the decays",
        file="hybrid_sp/ops/linear_attention.py",
        old="for span in shard.broken:",
        new="for span in ():",
        test=f"{PARITY}[4-zigzag-linear]",
    ),
    Mutant(
        name="a bonus beside the decay of its own token",
        file="hybrid_sp/kernels/reference/decays.py",
        old="_shifted(through) if self.exclusive else through",
        new="through",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="pairs of a bonus that reach their own token",
        file="hybrid_sp/kernels/reference/decays.py",
        old="_shifted(right) if self.exclusive else right.clone()",
        new="right.clone()",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    Mutant(
        name="one rank's gradient of the bonus",
        file="hybrid_sp/kernels/reference/linear.py",
        old="d_bonus += (d_self",
        new="d_bonus = (d_self",
        test=f"{PARITY}[1-contiguous-linear]",
    ),
    # The delta rule.
    Mutant(
        name="a dense transition not transposed",
        file="hybrid_sp/exchange/affine.py",
        old="transition = transition.mT",
        new="transition = transition",
        test=f"{PARITY}[4-zigzag-delta]",
    ),
    Mutant(
        name="a transition whose columns write values",
        file="hybrid_sp/kernels/reference/delta.py",
        old="own.r[..., width:].zero_()",
        new="own.r[..., width:].fill_(1)",
        test=f"{PARITY}[2-contiguous-delta]",
    ),
    Mutant(
        name="rows that a token wrote not taken from its key's gradient",
        file="hybrid_sp/kernels/reference/delta.py",
        old="minus_dk.neg_()",
        new="minus_dk",
        test=f"{PARITY}[1-contiguous-delta]",
    ),
    Mutant(
        name="a token that corrects itself",
        file="hybrid_sp/kernels/reference/delta.py",
        old="minus_dL.diagonal(dim1=1, dim2=2).zero_()",
        new="minus_dL.diagonal(dim1=1, dim2=2)",
        test=f"{PARITY}[1-contiguous-delta]",
    ),
    Mutant(
        name="dropped gradient of the states that enter the chunks",
        file="hybrid_sp/kernels/reference/delta.py",
        old="states[n + 1], out=states[n], added=read[n])",
        new="states[n + 1], out=states[n])",
        test=f"{PARITY}[1-contiguous-delta]",
    ),
    # Keys and values.
    Mutant(
        name="reduce-scatter without the diagonal",
        file="hybrid_sp/exchange/kv.py",
        old="grad += others[:, : grad.shape[1]]",
        new="grad.copy_(others[:, : grad.shape[1]])",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="one rank's dK",
        file="hybrid_sp/exchange/kv.py",
        old="grad += others[:, : grad.shape[1]]",
        new="pass",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="dK for dV of a window",
        file="hybrid_sp/exchange/kv.py",
        old="self.plan.add(grad, others)",
        new="self.plan.add(grad, columns(received, grads)[0])",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="keys of another range",
        file="hybrid_sp/exchange/kv.py",
        old="[sum(lengths[:i]) for i in range(len(lengths))]",
        new="[0 for _ in lengths]",
        test=f"{PARITY}[2-zigzag-softmax]",
    ),
    Mutant(
        name="window a token too long before a span",
        file="hybrid_sp/exchange/visible.py",
        old="start - window + 1",
        new="start - window",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="keys of an earlier document",
        file="hybrid_sp/exchange/visible.py",
        old="first = shard.document_start(start)\n        if",
        new="first = 0\n        if",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="queries of a later document",
        file="hybrid_sp/exchange/visible.py",
        old="queries = min(end, shard.document_end(start)) - start",
        new="queries = end - start",
        test=f"{PARITY}[2-contiguous-softmax]",
    ),
    Mutant(
        name="gather for a short window",
        file="hybrid_sp/exchange/visible.py",
        old="0 < missing[rank] <= rows_of_others",
        new="0 < missing[rank] or rows_of_others",
        test=f"{WINDOW}::test_a_window_receives_what_it_sees_however_long_the_sequence",
    ),
    # Key heads a few at a time.
    Mutant(
        name="collectives of a failed backward left in flight",
        file="hybrid_sp/overlap.py",
        old="for queue in self._in_flight.values():",
        new="for queue in list(self._in_flight.values())[:1]:",
        test=f"{SOFTMAX}::test_an_exception_leaves_nothing_in_flight",
    ),
    Mutant(
        name="tokens between a window and its queries not counted",
        file="hybrid_sp/exchange/visible.py",
        old="window - between",
        new="window",
        test="tests/hybrid_sp/exchange/test_visible.py::test_parts_over_the_keys_of_each_rank_are_the_mask",
    ),
    # The halo.
    Mutant(
        name="halo of an earlier document",
        file="hybrid_sp/exchange/fetch.py",
        old="(max(start - width, shard.document_start(start)), start)",
        new="(max(start - width, 0), start)",
        test=f"{HALO}::test_parity_of_short_spans_and_documents[3-contiguous]",
    ),
    Mutant(
        name="halo of other tokens",
        file="hybrid_sp/kernels/reference/conv.py",
        old="tokens[:, taps.width - 1 - j :][:, :n], taps.weights[j])",
        new="tokens[:, :n], taps.weights[j])",
        test=f"{PARITY}[2-contiguous-halo]",
    ),
    Mutant(
        name="a tap crosses the begin of a document",
        file="hybrid_sp/kernels/reference/conv.py",
        old="return x if tokens is None else x.index_fill(1, tokens, 0)",
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
        file="hybrid_sp/exchange/fetch.py",
        old="arrived[place[i]]",
        new="arrived[i]",
        test=f"{PARITY}[4-zigzag-halo]",
    ),
    Mutant(
        name="gradient of an earlier pass",
        file="hybrid_sp/exchange/halo.py",
        old="        self.own = None  # an earlier",
        new="        pass  # an earlier",
        test=f"{HALO}::test_an_input_alone_has_the_gradient_that_it_has_among_all",
    ),
    Mutant(
        name="initial state on every rank's first tokens",
        file="hybrid_sp/ops/short_conv.py",
        old="known = missing if first == 0 else 0",
        new="known = missing",
        test=f"{PARITY}[2-contiguous-halo]",
    ),
    # Loss, labels and gradients.
    Mutant(
        name="mean of means",
        file="hybrid_sp/gradients.py",
        old='collectives.all_reduce(flat, group, tag="gradients").div_(total)',
        new='collectives.all_reduce(flat / max(tokens, 1), group, tag="gradients").div_(groups.size(group))',
        test="tests/hybrid_sp/test_gradients.py::test_the_sum_over_ranks_is_divided_by_all_tokens[False-torch.float64]",
    ),
    Mutant(
        name="unshifted label",
        file="hybrid_sp/shard.py",
        old="labels_BL = tokens_BL.roll(-1, 1)",
        new="labels_BL = tokens_BL.clone()",
        test="tests/hybrid_sp/test_shard.py::test_ranks_hold_every_token_once[2-contiguous]",
    ),
    Mutant(
        name="label cut before the shift",
        file="hybrid_sp/shard.py",
        old="return self.take(labels_BL.index_fill_(1, to_device(last, tokens_BL.device), NO_LABEL), 1)",
        new="return F.pad(self.take(tokens_BL, 1)[:, 1:], (0, 1), value=NO_LABEL)",
        test="tests/hybrid_sp/test_shard.py::test_ranks_hold_every_token_once[2-contiguous]",
    ),
    Mutant(
        name="label of a token in the next document",
        file="hybrid_sp/shard.py",
        old="(*self.boundaries, self.length)",
        new="(self.length,)",
        test="tests/hybrid_sp/test_shard.py::test_documents[contiguous]",
    ),
    Mutant(
        name="positions counted over documents",
        file="hybrid_sp/shard.py",
        old="return tokens - first[torch.searchsorted(first, tokens, right=True) - 1]",
        new="return tokens",
        test="tests/hybrid_sp/test_shard.py::test_documents[contiguous]",
    ),
    Mutant(
        name="positions counted on each rank",
        file="hybrid_sp/shard.py",
        old="torch.arange(start, end) for start, end in self.spans",
        new="torch.arange(end - start) for start, end in self.spans",
        test="tests/layers/test_mixers_cut.py::test_mixers_agree_with_one_device[2-batch]",
    ),
    Mutant(
        name="stale gradients of an earlier backward",
        file="hybrid_sp/overlap.py",
        old="return self._in_flight[queue].popleft().wait()",
        new="return self._in_flight[queue][0].wait()",
        test=f"{OVERLAP}::test_records_are_read_by_index_not_used_up",
    ),
    *ATTENTION_MUTANTS,
    *BASELINE_MUTANTS,
    *EXCHANGE_MUTANTS,
    *KERNEL_MUTANTS,
    *PACKAGE_MUTANTS,
    *MODEL_MUTANTS,
    *PROGRAM_MUTANTS,
    *RECURRENCE_MUTANTS,
]
