"""Ways to break what is checked, measured and counted of a device."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

STAGES = "tests/analysis/first/test_stages.py"
TUNE = "tests/analysis/bench/test_tune.py"
LAUNCHES = "tests/analysis/bench/test_launches.py"
BENCH = "tests/analysis/bench/test_bench.py"
MECHANICS = "tests/gpu/test_mechanics.py"
RANKS = "tests/gpu/test_ranks.py"

DEVICE_MUTANTS = [
    Mutant(
        name="a stage that is late is asked to end, and no more",
        file="analysis/first/stages.py",
        old="        _signal(process.pid, signal.SIGKILL)",
        new="        process.kill()",
        test=f"{STAGES}::test_every_outcome_is_told_and_the_next_stage_goes_on",
    ),
    Mutant(
        name="the report of a first run comes at its end",
        file="analysis/first/stages.py",
        old="""        record.last = last_line(self.folder / running.stage.name / "log.txt")
        self.write()
""",
        new="""        record.last = last_line(self.folder / running.stage.name / "log.txt")
""",
        test=f"{STAGES}::test_what_is_done_is_in_the_report_if_the_run_is_ended",
    ),
    Mutant(
        name="a stage that is skipped has passed",
        file="analysis/first/stages.py",
        old="""outcome = {0: "passed", LACKING: "skipped"}""",
        new="""outcome = {0: "passed", LACKING: "passed"}""",
        test=f"{STAGES}::test_every_outcome_is_told_and_the_next_stage_goes_on",
    ),
    Mutant(
        name="a candidate that computes something else may win",
        file="analysis/bench/gpu/tune.py",
        old="            told.append(_difference(found, want))\n",
        new='            told.append("")\n',
        test=f"{TUNE}::test_the_fastest_that_computes_what_the_default_does_is_chosen",
    ),
    Mutant(
        name="a candidate wins by less than times vary",
        file="analysis/bench/gpu/tune.py",
        old="if fastest.seconds <= WORTH * default.seconds else default",
        new="if fastest.seconds <= default.seconds else default",
        test=f"{TUNE}::test_the_default_stays_unless_another_is_clearly_faster",
    ),
    Mutant(
        name="candidates judged by their best moment",
        file="analysis/bench/gpu/tune.py",
        old="        return statistics.median(self.values)\n",
        new="        return min(self.values)\n",
        test=f"{TUNE}::test_the_default_stays_unless_another_is_clearly_faster",
    ),
    Mutant(
        name="a tensor that is launched twice counts twice",
        file="analysis/bench/gpu/launches.py",
        old="        tensors = {id(x): x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}\n",
        new="        tensors = dict(enumerate(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))\n",
        test=f"{LAUNCHES}::test_a_launch_counts_a_tensor_that_comes_twice_once",
    ),
    Mutant(
        name="views count as bytes",
        file="analysis/bench/gpu/launches.py",
        old="        if not view and not",
        new="        if not",
        test=f"{LAUNCHES}::test_operations_count_what_they_read_and_write",
    ),
    Mutant(
        name="decays are floored as on a CPU when bytes are counted",
        file="analysis/bench/gpu/launches.py",
        old="    return None if log_decay is None else log_decay.clamp(min=FLOORS[dtype])\n",
        new="    return log_decay\n",
        test=f"{LAUNCHES}::test_launches_of_ours_and_of_fla_are_counted_without_a_device",
    ),
    Mutant(
        name="a peer without a backward pass is not measured",
        file="analysis/bench/gpu/operators.py",
        old="    for passes in (PASSES, (FORWARD,)):\n",
        new="    for passes in (PASSES,):\n",
        test=f"{BENCH}::test_a_contender_that_fails_is_noted_and_the_others_go_on",
    ),
    Mutant(
        name="a kernel blamed for what it was given",
        file="tests/gpu/ptxas.py",
        old="        if one.before == other.before and one.after != other.after:\n",
        new="        if one.after != other.after:\n",
        test=f"{MECHANICS}::test_a_kernel_that_two_ptxas_make_differently_is_named",
    ),
    Mutant(
        name="the mode that raises at stops of the host stays on",
        file="tests/gpu/syncs.py",
        old="""    finally:
        torch.cuda.set_sync_debug_mode("default")
""",
        new="""    finally:
        pass
""",
        test=f"{MECHANICS}::test_every_stop_of_a_host_is_told_and_none_is_left_on",
    ),
    Mutant(
        name="a rank that goes on as if nothing had been",
        file="tests/gpu/ending.py",
        old="    right = None not in ended.codes and all(healthy)\n",
        new="    right = None not in ended.codes\n",
        test=f"{RANKS}::test_ranks_that_go_on_or_hang_are_wrong",
    ),
    Mutant(
        name="work that two streams do at once hides twice",
        file="tests/gpu/ranks.py",
        old="            begin, end = max(other.begin, reached), min(other.end, one.end)\n",
        new="            begin, end = max(other.begin, one.begin), min(other.end, one.end)\n",
        test=f"{RANKS}::test_what_a_kernel_of_nccl_hides_is_what_runs_beside_it",
    ),
]
