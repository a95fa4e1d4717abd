"""Ways to break what is measured of a run, and what its recipe chooses: timeline, recomputed blocks, programs."""

from __future__ import annotations

from tests.mutants.devices import DEVICE_MUTANTS
from tests.mutants.mutant import Mutant

TIMELINE = "tests/hybrid_sp/comm/test_ledger.py"
RANKS = "tests/support/test_ranks.py"
RECOMPUTE = "tests/layers/test_recompute.py"
STRATEGY = "tests/recipes/test_strategy.py"
RECORD = "tests/recipes/test_record.py"
SWEEP = "tests/recipes/test_sweep.py"
TRACKER = "tests/recipes/test_tracker.py"
LOAD = "tests/recipes/test_load.py"
SPLIT = "tests/recipes/test_split.py"

PROGRAM_MUTANTS = [
    Mutant(
        name="waits counted as computation",
        file="hybrid_sp/comm/ledger.py",
        old="        _thread.phase.cut(wait.begin, wait.end)\n",
        new="        pass\n",
        test=f"{TIMELINE}::test_waits_and_phases_within_cut_a_phase",
    ),
    Mutant(
        name="time in flight counted once for each message",
        file="hybrid_sp/comm/ledger.py",
        old="end - max(begin, reached)",
        new="end - begin",
        test=f"{TIMELINE}::test_what_is_in_flight_together_counts_once",
    ),
    Mutant(
        name="recomputation counted in the phase that asks for it",
        file="hybrid_sp/ops/recurrence.py",
        old="""        q, k, v, g, beta, bonus, S_in, *saved = ctx.saved_tensors
        with backward.call.phase("inter", "backward", do):
""",
        new="""        with backward.call.phase("inter", "backward", do):
            q, k, v, g, beta, bonus, S_in, *saved = ctx.saved_tensors
""",
        test=f"{TIMELINE}::test_a_recomputed_block_is_no_part_of_the_phase_that_asks_for_it",
    ),
    Mutant(
        name="events read before the device has reached them",
        file="hybrid_sp/comm/ledger.py",
        old="        when.synchronize()\n",
        new="",
        test=f"{TIMELINE}::test_on_cuda_moments_are_events_until_the_ledger_is_read",
    ),
    Mutant(
        name="overlap of a kind that is not listed",
        file="hybrid_sp/shard.py",
        old="else kind in self.overlap",
        new="else bool(self.overlap)",
        test=f"{TIMELINE}::test_times_say_what_was_hidden",
    ),
    Mutant(
        name="slices that overlap on one track",
        file="hybrid_sp/comm/trace.py",
        old="if lane[-1].end <= one.begin",
        new="if lane[-1].begin <= one.begin",
        test=f"{TIMELINE}::test_slices_that_overlap_lie_in_tracks_of_their_own",
    ),
    Mutant(
        name="a recomputed block asks the other ranks again",
        file="layers/model.py",
        old=", context_fn=hsp.checkpoint_contexts",
        new="",
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
        old='        check_same_run(folder, recipe, facts["corpus"]["fingerprint"])',
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
        test=f"{TRACKER}::test_what_wandb_lacks_is_said_before_anything_is_built[package]",
    ),
    Mutant(
        name="a cell's log moved aside with its folder",
        file="recipes/sweep.py",
        old="            lock.set_aside(cell.folder).close()\n",
        new="            pass\n",
        test=f"{SWEEP}::test_a_cell_that_fails_again_under_resume_never_keeps_its_log",
    ),
    Mutant(
        name="names of files are not believed",
        file="recipes/split.py",
        old='by_name[_part_by_name(piece.name) or "train"].append(piece)',
        new='by_name["train"].append(piece)',
        test=f"{SPLIT}::test_names_are_believed",
    ),
    Mutant(
        name="a word within a longer one is believed",
        file="recipes/split.py",
        old='r"[^\\W\\d_]+"',
        new='r"train|valid|val|dev|test"',
        test=f"{SPLIT}::test_a_name_is_believed_by_whole_words_and_the_nearest_place[nothing-contest.txt]",
    ),
    Mutant(
        name="what the names call test is trained on beside data.validation",
        file="recipes/split.py",
        old='    train = by_name.pop("train")\n',
        new='    train = [*by_name.pop("train"), *(by_name["test"] if validation else ())]\n',
        test=f"{SPLIT}::test_keys_come_before_names",
    ),
    Mutant(
        name="shares of files instead of bytes",
        file="recipes/split.py",
        old="        if len(last) - missing > due // 2:\n",
        new="        if len(pieces) == 1:\n",
        test=f"{SPLIT}::test_shares_are_of_bytes_wherever_the_text_lies[one is huge]",
    ),
    Mutant(
        name="files are shared out by where they lie",
        file="recipes/split.py",
        old="    train.sort(key=_hash_and_name)\n",
        new="    train.sort(key=lambda piece: hashlib.sha256(bytes(piece.path)).digest())\n",
        test=f"{SPLIT}::test_shares_are_of_bytes_wherever_the_text_lies[thirty]",
    ),
    Mutant(
        name="the standard library is split like other text",
        file="recipes/split.py",
        old="validation=_in_order(pieces[:held_out])",
        new="validation=_in_order([*pieces[:held_out], *filter(lambda piece: _part_by_name(piece.name), pieces)])",
        test=f"{SPLIT}::test_the_standard_library_keeps_its_rule",
    ),
    Mutant(
        name="a file is copied while it is read",
        file="recipes/data.py",
        old="""                if not (count := file.readinto(buffer)):
""",
        new="""                buffer[:] = whole = file.read(len(buffer))
                if not (count := len(whole)):
""",
        test="tests/recipes/test_data.py::test_reading_takes_no_second_copy",
    ),
    Mutant(
        name="text read as YAML before its type is known",
        file="recipes/typed_yaml.py",
        old="        return node.value\n    meaning",
        new="        pass\n    meaning",
        test=f"{LOAD}::test_text_is_what_was_typed[12e4567]",
    ),
    Mutant(
        name="a leading zero makes an octal number",
        file="recipes/typed_yaml.py",
        old='("int", r"[-+]?(0|[1-9][0-9]{0,99})"',
        new='("int", r"[-+]?[0-9]{1,99}"',
        test=f"{LOAD}::test_a_key_of_any_type_gets_what_yaml_means[010-010]",
    ),
    Mutant(
        name="options of mixers without their mixer's types",
        file="layers/config.py",
        old='metadata={"kind": lambda name: MIXERS.get(name, Any)}',
        new="metadata={}",
        test=f"{LOAD}::test_options_of_mixers_have_the_types_of_their_mixer",
    ),
    Mutant(
        name="secrets of the environment in the run folder",
        file="recipes/typed_yaml.py",
        old='if "${" in values:',
        new='if "${" in values[:0]:',
        test=f"{LOAD}::test_secrets_of_the_environment_stay_there",
    ),
    Mutant(
        name="a file of another format is read",
        file="recipes/config.py",
        old="    if str(found) != str(FORMAT):",
        new="    if not found:",
        test=f"{LOAD}::test_another_format_is_refused_in_one_line[2]",
    ),
    Mutant(
        name="a newer checkpoint is called corrupt",
        file="recipes/checkpoint.py",
        old="    except RecipeError:\n        raise\n",
        new="",
        test="tests/recipes/test_checkpoint.py::test_another_format_is_refused_and_stays_where_it_is",
    ),
    Mutant(
        name="long names cut to the same beginning",
        file="recipes/load.py",
        old="-{hashlib.sha256(whole).hexdigest()[:8]}",
        new="",
        test=f"{LOAD}::test_names_fit_into_a_file_system",
    ),
    Mutant(
        name="a deadline that begins before the ranks",
        file="tests/support/ranks.py",
        old="ends, entered = time.monotonic() + START_SECONDS, 0",
        new="ends, entered = time.monotonic() + deadline, 0",
        test=f"{RANKS}::test_the_deadline_begins_when_every_rank_has_come",
    ),
    Mutant(
        name="a death counted from when it is noticed",
        file="tests/support/ranks.py",
        old="return 0.0, exit_words(worker)",
        new="return time.monotonic(), exit_words(worker)",
        test=f"{RANKS}::test_a_death_comes_first_although_it_is_noticed_last",
    ),
    *DEVICE_MUTANTS,
]
