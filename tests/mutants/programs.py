"""Ways to break what is measured of a run, and what its recipe chooses: timeline, recomputed blocks, programs."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TIMELINE = "tests/hybrid_sp/test_timeline.py"
RECOMPUTE = "tests/layers/test_recompute.py"
STRATEGY = "tests/recipes/test_strategy.py"

PROGRAM_MUTANTS = [
    Mutant(
        name="waits counted as computation",
        file="hybrid_sp/timeline.py",
        old="        _thread.phase.cut(wait.begin, wait.end)\n",
        new="        pass\n",
        test=f"{TIMELINE}::test_waits_and_phases_within_cut_a_phase",
    ),
    Mutant(
        name="time in flight counted once for each message",
        file="hybrid_sp/timeline.py",
        old="end - max(begin, reached)",
        new="end - begin",
        test=f"{TIMELINE}::test_what_is_in_flight_together_counts_once",
    ),
    Mutant(
        name="recomputation counted in the phase that asks for it",
        file="hybrid_sp/linear.py",
        old="""        carry, (q, k, g, bonus, h, totals, S_in) = ctx.carry, ctx.saved_tensors
        with carry.phase("inter", "backward", q):
""",
        new="""        carry = ctx.carry
        with carry.phase("inter", "backward", do):
            q, k, g, bonus, h, totals, S_in = ctx.saved_tensors
""",
        test=f"{TIMELINE}::test_a_recomputed_block_is_no_part_of_the_phase_that_asks_for_it",
    ),
    Mutant(
        name="events read before the device has reached them",
        file="hybrid_sp/timeline.py",
        old="        when.synchronize()\n",
        new="",
        test=f"{TIMELINE}::test_on_cuda_moments_are_events_until_the_ledger_is_read",
    ),
    Mutant(
        name="overlap of a kind that is not listed",
        file="hybrid_sp/mesh.py",
        old="else kind in self.overlap",
        new="else bool(self.overlap)",
        test=f"{TIMELINE}::test_times_say_what_was_hidden",
    ),
    Mutant(
        name="slices that overlap on one track",
        file="hybrid_sp/trace.py",
        old="if lane[-1].end <= one.begin",
        new="if lane[-1].begin <= one.begin",
        test=f"{TIMELINE}::test_slices_that_overlap_lie_in_tracks_of_their_own",
    ),
    Mutant(
        name="a recomputed block asks the other ranks again",
        file="layers/model.py",
        old=", context_fn=hsp.checkpoint_contexts)",
        new=")",
        test=f"{RECOMPUTE}::test_recomputed_blocks_change_nothing_and_send_nothing_again[torch.float64-2]",
    ),
    Mutant(
        name="no block is recomputed",
        file="layers/model.py",
        old="if number in self.recompute and torch.is_grad_enabled():",
        new="if False:",
        test=f"{RECOMPUTE}::test_recomputed_blocks_keep_their_input_alone",
    ),
    Mutant(
        name="the recipe's link ignored",
        file="recipes/config.py",
        old="        link=parallel.link,\n",
        new="",
        test=f"{STRATEGY}::test_auto_is_chosen_by_the_link_and_written_down",
    ),
    Mutant(
        name="the trace of one rank",
        file="recipes/train.py",
        old="self.record.trace(collectives.gather_objects(rank_events(book, self.rank), self.group))",
        new="self.record.trace([rank_events(book, self.rank)])",
        test=f"{STRATEGY}::test_a_trace_of_all_ranks",
    ),
]
