"""Ways to break what is measured of a run, and what its recipe chooses: timeline, recomputed blocks, programs."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TIMELINE = "tests/hybrid_sp/test_timeline.py"
RECOMPUTE = "tests/layers/test_recompute.py"
STRATEGY = "tests/recipes/test_strategy.py"
RECORD = "tests/recipes/test_record.py"
SWEEP = "tests/recipes/test_sweep.py"
TRACKER = "tests/recipes/test_tracker.py"

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
    Mutant(
        name="a living training moved aside before its lock is asked for",
        file="recipes/lock.py",
        old="""    held = hold(folder)
    if (folder / "provenance.json").exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        os.rename(folder, aside)
    return held
""",
        new="""    if (folder / "provenance.json").exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        os.rename(folder, aside)
    return hold(folder)
""",
        test=f"{RECORD}::test_the_lock_comes_first_and_outlives_the_rename_of_its_folder[conc]",
    ),
    Mutant(
        name="the lock moves with its folder",
        file="recipes/lock.py",
        old='take(folder.with_name(f".{folder.name}.lock"), busy, advice)',
        new='take(folder / ".run.lock", busy, advice)',
        test=f"{RECORD}::test_the_lock_comes_first_and_outlives_the_rename_of_its_folder[sweep/cell]",
    ),
    Mutant(
        name="the folder not looked at again under the lock",
        file="recipes/record.py",
        old='        refuse_other_run(folder, recipe, facts["corpus"]["fingerprint"])',
        new="        pass",
        test=f"{RECORD}::test_what_came_into_the_folder_before_the_lock_was_taken_is_seen",
    ),
    Mutant(
        name="a file takes its name before it is on the disk",
        file="recipes/record.py",
        old="        os.fsync(file.fileno())\n",
        new="",
        test=f"{RECORD}::test_a_file_is_on_the_disk_before_it_takes_its_name",
    ),
    Mutant(
        name="half a line of metrics left",
        file="recipes/record.py",
        old="                file.truncate(end)\n",
        new="",
        test=f"{RECORD}::test_no_half_of_a_line_is_left_in_the_metrics",
    ),
    Mutant(
        name="a gone reader ends a training",
        file="recipes/record.py",
        old="""    except OSError:
        os.dup2(""",
        new="""    except BlockingIOError:
        os.dup2(""",
        test=f"{RECORD}::test_a_stream_that_takes_no_words_ends_nothing[gone]",
    ),
    Mutant(
        name="a failed picture hides the cause",
        file="recipes/record.py",
        old='        _try("loss.png", lambda: draw_loss(lines, self.folder / "loss.png", self.recipe.name))',
        new='        draw_loss(lines, self.folder / "loss.png", self.recipe.name)',
        test=f"{RECORD}::test_the_cause_of_a_failure_comes_first_and_once",
    ),
    Mutant(
        name="wandb numbers the steps of every start anew",
        file="recipes/tracker.py",
        old='self._run.log({**values, "step": step}, step=step)',
        new='self._run.log({**values, "step": step})',
        test=f"{TRACKER}::test_pieces_of_a_resumed_run_are_one_curve_over_its_steps",
    ),
    Mutant(
        name="wandb without a key noticed after all is built",
        file="recipes/train.py",
        old="        tracker.check(recipe)\n",
        new="        pass\n",
        test=f"{TRACKER}::test_what_wandb_lacks_is_said_before_anything_is_built[project]",
    ),
    Mutant(
        name="a cell's log moved aside with its folder",
        file="recipes/sweep.py",
        old="            lock.set_aside(cell.folder).close()\n",
        new="            pass\n",
        test=f"{SWEEP}::test_a_cell_that_fails_again_under_resume_never_keeps_its_log",
    ),
]
