"""Mutants of the exchanges of states by messages, and of what ranks must agree on before any exchange."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

EXCHANGE = "tests/hybrid_sp/exchange/test_exchange.py"
AGREEMENT = "tests/hybrid_sp/comm/test_agreement.py"
SCAN = f"{EXCHANGE}::test_parity_fp64"
NCCL = "tests/hybrid_sp/comm/test_nccl.py"
STREAMS = "tests/hybrid_sp/comm/test_streams.py"
REPORTER = "tests/hybrid_sp/comm/test_reporter.py"

EXCHANGE_MUTANTS = [
    Mutant(
        name="a hop past a span that is not folded in",
        file="hybrid_sp/exchange/chain.py",
        old="leaving.append(compose(AffineState(transition, b), AffineState(None, x)).state)",
        new="leaving.append(compose(AffineState(transition, torch.zeros_like(b)), AffineState(None, x)).state)",
        test=f"{SCAN}[4-contiguous-ring]",
    ),
    Mutant(
        name="blocks of a state in reverse order",
        file="hybrid_sp/exchange/chain.py",
        old="self._number(position + 1, block)",
        new="self._number(position + 1, self.blocks - 1 - block)",
        test=f"{SCAN}[4-contiguous-pipeline]",
    ),
    Mutant(
        name="a local hop that carries nothing",
        file="hybrid_sp/exchange/chain.py",
        old="            return leaving\n",
        new="            return self._cut(torch.zeros_like(self.scan.like))\n",
        test=f"{SCAN}[2-zigzag-ring]",
    ),
    Mutant(
        name="windows composed in the wrong order",
        file="hybrid_sp/exchange/doubling.py",
        old="before[p] = compose(before[p], earlier)",
        new="before[p] = compose(earlier, before[p])",
        test=f"{SCAN}[4-contiguous-doubling]",
    ),
    Mutant(
        name="known decays of the window before",
        file="hybrid_sp/exchange/doubling.py",
        old="scan.known_decays[q - d + 1 : q + 1]",
        new="scan.known_decays[q - d : q]",
        test=f"{SCAN}[4-contiguous-doubling]",
    ),
    Mutant(
        name="dense transitions of a scan not transposed",
        file="hybrid_sp/exchange/scan.py",
        old="(kept.mT if kept.ndim == d_entering.ndim else kept)",
        new="kept",
        test=f"{SCAN}[4-contiguous-ring]",
    ),
    Mutant(
        name="a rank's spans in forward order on the way back",
        file="hybrid_sp/exchange/scan.py",
        old="d_entering.flip(0)",
        new="d_entering",
        test=f"{SCAN}[2-zigzag-doubling]",
    ),
    Mutant(
        name="one rank's dS_final enters the scan",
        file="hybrid_sp/exchange/scan.py",
        old="sum(d_finals[1:], d_finals[0])",
        new="d_finals[0]",
        test=f"{SCAN}[4-contiguous-ring]",
    ),
    Mutant(
        name="messages of two exchanges alike",
        file="hybrid_sp/comm/messages.py",
        old="{header.call} {header.exchange} {number}",
        new="{header.call} {number}",
        test=f"{EXCHANGE}::test_two_exchanges_in_flight_do_not_meet[pipeline]",
    ),
    Mutant(
        name="neighbours by global rank",
        file="hybrid_sp/comm/messages.py",
        old="group_dst=to",
        new="dst=to",
        test=f"{EXCHANGE}::test_neighbours_are_those_of_the_group",
    ),
    Mutant(
        name="a pipeline that nobody drives during the local work",
        file="hybrid_sp/exchange/chain.py",
        old="BLOCKS, background=True",
        new="BLOCKS, background=False",
        test=f"{EXCHANGE}::test_a_thread_sends_during_the_local_work_and_a_ring_after_it[pipeline]",
    ),
    Mutant(
        name="each rank chooses by the link that it sees",
        file="hybrid_sp/exchange/auto.py",
        old="Link(latency=max(latencies), bandwidth=min(bandwidths))",
        new="Link(latency=latency, bandwidth=bandwidth)",
        test=f"{EXCHANGE}::test_all_ranks_choose_alike",
    ),
    # What ranks must be given alike, and what nobody may be given.
    Mutant(
        name="a difference between ranks that nobody tells",
        file="hybrid_sp/comm/agreement.py",
        old="if len(set(column)) > 1]",
        new="if False]",
        test=f"{AGREEMENT}::test_every_difference_is_one_error_on_every_rank",
    ),
    Mutant(
        name="an operator that does not ask whether the ranks agree",
        file="hybrid_sp/checks.py",
        old="    shard.require_agreement()\n",
        new="",
        test=f"{AGREEMENT}::test_every_difference_is_one_error_on_every_rank",
    ),
    Mutant(
        name="a gather that does not ask whether the ranks agree",
        file="hybrid_sp/shard.py",
        old="        self.require_agreement()\n",
        new="",
        test=f"{AGREEMENT}::test_every_difference_is_one_error_on_every_rank",
    ),
    Mutant(
        name="a layout that is not compared",
        file="hybrid_sp/shard.py",
        old='if field.name != "group"',
        new='if field.name not in ("group", "layout")',
        test=f"{AGREEMENT}::test_every_difference_is_one_error_on_every_rank",
    ),
    Mutant(
        name="a shard that waits for the other ranks",
        file="hybrid_sp/shard.py",
        old="self.group) if self.check else None\n",
        new="self.group) if self.check else None\n        agreement and agreement.require()\n",
        test=f"{AGREEMENT}::test_a_shard_waits_for_nobody_and_its_first_operator_does",
    ),
    Mutant(
        name="a rank that refuses its documents and leaves the others",
        file="hybrid_sp/shard.py",
        old="agreement.require()  # other",
        new="pass  # other",
        test=f"{AGREEMENT}::test_ranks_that_refuse_what_others_accept_do_not_leave_them_waiting",
    ),
    Mutant(
        name="a header before each collective by default",
        file="hybrid_sp/shard.py",
        old='check=self.sp.check == "calls"',
        new="check=bool(self.sp.check)",
        test=f"{AGREEMENT}::test_what_each_choice_compares",
    ),
    Mutant(
        name="what lies on the CPU sent by a group of devices",
        file="hybrid_sp/comm/groups.py",
        old='group if torch.device("cpu") in group._device_types else',
        new="group if True else",
        test=f"{AGREEMENT}::test_a_group_of_devices_compares_over_a_twin_on_the_cpu",
    ),
    Mutant(
        name="empty documents kept",
        file="hybrid_sp/shard.py",
        old="tuple(dict.fromkeys(self.cu_seqlens))",
        new="self.cu_seqlens",
        test="tests/hybrid_sp/ops/test_operators.py::test_empty_documents_change_nothing[1-contiguous]",
    ),
    Mutant(
        name="a scale that autograd does not see",
        file="hybrid_sp/checks.py",
        old="not isinstance(kwargs[name], Tensor)",
        new="True",
        test="tests/hybrid_sp/ops/test_operators.py::test_what_autograd_would_not_see_is_no_tensor[softmax_attention-scale]",
    ),
    Mutant(
        name="WORLD_SIZE believed without RANK",
        file="hybrid_sp/mesh.py",
        old='"RANK" not in found and found.get("WORLD_SIZE", "1") == "1"',
        new='"RANK" not in found',
        test="tests/hybrid_sp/comm/test_collectives.py::test_half_of_what_a_launcher_sets",
    ),
    Mutant(
        name="star: every rank given the states of the centre",
        file="hybrid_sp/exchange/star.py",
        old="strict=True) if owner == rank]",
        new="strict=True) if owner == CENTRE]",
        test=f"{SCAN}[2-zigzag-star]",
    ),
    Mutant(
        name="star: one rank's dS_final",
        file="hybrid_sp/exchange/star.py",
        old="rows[self.shard.span_count :].sum(0)",
        new="rows[self.shard.span_count]",
        test=f"{SCAN}[4-contiguous-star]",
    ),
    Mutant(
        name="doubling that receives before it sends, on every rank",
        file="hybrid_sp/exchange/doubling.py",
        old="for p in range(d, count):",
        new="for p in sorted(range(d, count), key=lambda p: scan.owners[p] != scan.here):",
        test=f"{NCCL}::test_every_exchange_meets_in_order[2]",
    ),
    Mutant(
        name="a hop that receives from the next rank",
        file="hybrid_sp/comm/messages.py",
        old="dist.P2POp(dist.irecv, out, group=twin, group_peer=source, tag=tag)",
        new="dist.P2POp(dist.irecv, out, group=twin, group_peer=to, tag=tag)",
        test=f"{NCCL}::test_every_exchange_meets_in_order[3]",
    ),
    Mutant(
        name="a task aside that begins where the wait is",
        file="hybrid_sp/comm/background.py",
        old="        stream.wait_event(self._begin)\n",
        new="        stream.wait_event(current.record_event())\n",
        test=f"{STREAMS}::test_a_task_aside_is_enqueued_after_the_computation_and_begins_before_it",
    ),
    Mutant(
        name="a side stream that nobody waits for",
        file="hybrid_sp/comm/background.py",
        old="        current.wait_event(stream.record_event())\n",
        new="        stream.record_event()\n",
        test=f"{STREAMS}::test_a_task_aside_is_enqueued_after_the_computation_and_begins_before_it",
    ),
    Mutant(
        name="memory of a message not kept for the stream that reads it",
        file="hybrid_sp/comm/pending.py",
        old="                    leaf.record_stream(current)\n",
        new="                    pass\n",
        test=f"{STREAMS}::test_memory_asked_for_on_one_stream_is_kept_for_the_stream_that_reads_it",
    ),
    Mutant(
        name="a report only when it is too late",
        file="hybrid_sp/comm/reporter.py",
        old="waited < first.timeout / 2",
        new="waited < first.timeout",
        test=f"{REPORTER}::test_the_first_that_does_not_arrive_is_named_once_after_half_of_the_timeout",
    ),
    Mutant(
        name="a launch that is never done",
        file="hybrid_sp/comm/reporter.py",
        old="        launched.set()\n",
        new="        pass\n",
        test=f"{REPORTER}::test_a_wait_on_cuda_is_watched_until_its_event_has_happened",
    ),
    Mutant(
        name="waits that are not watched",
        file="hybrid_sp/comm/pending.py",
        old="                reporter.waiting(self._what, self._group, self._device)\n",
        new="                pass\n",
        test=f"{REPORTER}::test_a_wait_on_cuda_is_watched_until_its_event_has_happened",
    ),
    Mutant(
        name="thread blocks limited for the wrong axis",
        file="hybrid_sp/mesh.py",
        old='("sp", ranks.tolist(), gather_ctas), ("dp", ranks.T.tolist(), None)',
        new='("sp", ranks.tolist(), None), ("dp", ranks.T.tolist(), gather_ctas)',
        test=f"{STREAMS}::test_options_of_nccl_reach_it",
    ),
]
