"""Ways to break what is believed of a model and its files: gates, generation, checkpoints of strangers, reports."""

from __future__ import annotations

from tests.mutants.blocks import BLOCK_MUTANTS
from tests.mutants.mixers import MIXER_MUTANTS
from tests.mutants.mutant import Mutant

PRECISION = "tests/layers/test_precision.py"
GENERATE = "tests/recipes/test_generate.py"
STRANGER = "tests/recipes/test_checkpoint.py::test_a_checkpoint_of_a_stranger_runs_nothing"
RUNS = "tests/analysis/test_runs.py"
FAMILIES = "tests/analysis/test_families.py"
DEVICE = "tests/layers/test_device.py::test_no_mixer_stops_the_host[documents1-True]"
STEP = "tests/recipes/test_step.py::test_the_host_waits_once_in_a_step[True]"

MODEL_MUTANTS = [
    Mutant(
        name="rates of decay rounded with the model",
        file="layers/timestep.py",
        old='keep_wide("A_log", "dt_bias")',
        new='keep_wide("dt_bias")',
        test=f"{PRECISION}::test_decays_are_those_of_the_gate_parameters_and_not_of_rounded_ones[mamba2-8]",
    ),
    Mutant(
        name="a gate's bias added in the model's dtype",
        file="layers/mixers/gla.py",
        old="F.linear(down(x_BTD), up.weight).to(wide) + up.bias.to(wide)",
        new="F.linear(down(x_BTD), up.weight, up.bias.to(x_BTD.dtype)).to(wide)",
        test=f"{PRECISION}::test_log_decays_in_bf16_are_those_of_fp32_gates_and_bf16_activations[gla]",
    ),
    Mutant(
        name="modules of torch draw their weights by themselves",
        file="layers/model.py",
        old=' and not reset.__module__.startswith("torch.")',
        new="",
        test="tests/layers/test_model.py::test_modules_of_torch_do_not_draw_by_themselves",
    ),
    Mutant(
        name="matrices counted as other parameters",
        file="layers/cost.py",
        old="if weight.ndim > 1",
        new="if weight.ndim > 2",
        test="tests/layers/test_mixers.py::test_cost_is_what_is_counted[torch.float32-gla]",
    ),
    Mutant(
        name="a gate widened after it was rounded",
        file="layers/precision.py",
        old="return tensor.to(result.device, torch.float32) if kept else result",
        new="return result.to(result.device, torch.float32) if kept else result",
        test=f"{PRECISION}::test_what_makes_decays_stays_fp32_and_the_rest_is_narrow[torch.bfloat16-rwkv6]",
    ),
    Mutant(
        name="a gate's gradient rounded",
        file="layers/precision.py",
        old="any(tensor is gate or tensor is gate.grad for gate in gates)",
        new="any(tensor is gate for gate in gates)",
        test=f"{PRECISION}::test_what_makes_decays_stays_fp32_and_the_rest_is_narrow[torch.bfloat16-hgrn2]",
    ),
    Mutant(
        name="text of the masters instead of the model that was trained",
        file="recipes/generate.py",
        old="    return model.to(dtype)\n",
        new="    return model\n",
        test=f"{GENERATE}::test_generating_runs_the_model_that_was_trained",
    ),
    Mutant(
        name="a temperature divides before the largest is taken off",
        file="recipes/generate.py",
        old="(logits_V - logits_V.max()) / temperature",
        new="logits_V / temperature",
        test=f"{GENERATE}::test_no_temperature_is_too_small_and_nothing_is_added_to_nothing",
    ),
    Mutant(
        name="a prompt in a window keeps all its keys",
        file="layers/mixers/softmax.py",
        old="kept = slice(None if self.window is None else -self.window, None)",
        new="kept = slice(None)",
        test="tests/layers/test_model.py::test_a_prompt_read_at_once_is_read_token_by_token[20-rwkv6]",
    ),
    Mutant(
        name="any class of a checkpoint's metadata",
        file="recipes/checkpoint.py",
        old="        if (module, name) not in TYPES:\n",
        new="        if (module, name) not in TYPES:\n            return super().find_class(module, name)\n",
        test=f"{STRANGER}[code_as_metadata]",
    ),
    Mutant(
        name="metadata read again by torch",
        file="recipes/checkpoint.py",
        old="        return self.metadata\n",
        new="        return super().read_metadata(*_, **__)\n",
        test="tests/recipes/test_checkpoint.py::test_metadata_is_read_by_this_program_alone",
    ),
    Mutant(
        name="files of other folders",
        file="recipes/checkpoint.py",
        old="            and all(Path(file.relative_path).name == file.relative_path",
        new="            and all(Path(file.relative_path).name",
        test=f"{STRANGER}[a_file_of_another_folder]",
    ),
    Mutant(
        name="a summary that is a list",
        file="analysis/runs.py",
        old="    if not isinstance(record, dict):\n",
        new="    if not isinstance(record, dict | list):\n",
        test=f"{RUNS}::test_a_run_that_cannot_be_used_says_why[half-written: summary.json1]",
    ),
    Mutant(
        name="runs that were moved aside are strays",
        file="analysis/runs.py",
        old="if not is_aside(child.name)]",
        new="if child.name]",
        test=f"{RUNS}::test_runs_that_were_moved_aside_are_no_runs_of_the_folder",
    ),
    Mutant(
        name="axes of a sweep averaged over",
        file="analysis/points.py",
        old="tuple(strategy.items()), values), [])",
        new="tuple(strategy.items()), ()), [])",
        test="tests/analysis/test_report.py::test_what_is_no_axis_of_the_plan_is_still_refused",
    ),
    Mutant(
        name="a delta rule by the decay beside it",
        file="analysis/families.py",
        old='    if summary.transition == "matrix":\n        return "delta rule"\n',
        new='    if summary.transition == "matrix":\n        return "vector gate"\n',
        test=f"{FAMILIES}::test_what_each_mixer_is_and_keeps",
    ),
    Mutant(
        name="positions copied to the device in every layer",
        file="layers/rotary.py",
        old="shard.once(_positions, x_BTD.device)",
        new="_positions(shard, x_BTD.device)",
        test=DEVICE,
    ),
    Mutant(
        name="starts of a convolution copied to the device in every call",
        file="hybrid_sp/kernels/reference/conv.py",
        old="@functools.lru_cache(maxsize=64)\ndef _crossing",
        new="def _crossing",
        test=DEVICE,
    ),
    Mutant(
        name="rows of documents copied to the device in every call",
        file="hybrid_sp/kernels/reference/chunks.py",
        old="@functools.lru_cache(maxsize=64)\ndef _chunks",
        new="def _chunks",
        test=DEVICE,
    ),
    Mutant(
        name="broken spans given as a list of indices",
        file="hybrid_sp/ops/linear_attention.py",
        old='        for span in shard.broken:\n            known[span].fill_(float("-inf"))\n',
        new='        known[list(shard.broken)] = float("-inf")\n',
        test=DEVICE,
    ),
    Mutant(
        name="angles of another base",
        file="layers/rotary.py",
        old="made, key = _made.setdefault(positions_T, {}), (base,",
        new="made, key = _made.setdefault(positions_T, {}), (1.0,",
        test="tests/layers/test_rotary.py::test_positions_keep_the_angles_of_every_base_width_and_dtype_apart",
    ),
    Mutant(
        name="a table for which the host waits",
        file="hybrid_sp/transfer.py",
        old="x.pin_memory().to(device, non_blocking=True)",
        new="x.pin_memory().to(device)",
        test=STEP,
    ),
    Mutant(
        name="a step that reads the count of tokens",
        file="recipes/train.py",
        old="self.group, valid)",
        new="self.group, int(valid))",
        test=STEP,
    ),
    Mutant(
        name="validation in the tokens per second",
        file="recipes/train.py",
        old="                self.since += time.perf_counter() - pause\n",
        new="",
        test="tests/recipes/test_step.py::test_tokens_per_second_include_the_optimiser_and_nothing_else",
    ),
    Mutant(
        name="a clock that begins after the optimiser",
        file="recipes/train.py",
        old='        self.progress["step"].fill_(step)\n        step_tokens',
        new='        self.progress["step"].fill_(step)\n        self.since = time.perf_counter()\n        step_tokens',
        test="tests/recipes/test_step.py::test_tokens_per_second_include_the_optimiser_and_nothing_else",
    ),
    Mutant(
        name="deterministic kernels that nobody asks for",
        file="recipes/device.py",
        old="        torch.use_deterministic_algorithms(True)\n",
        new="",
        test="tests/recipes/test_device.py::test_deterministic_kernels_are_asked_for",
    ),
    Mutant(
        name="the caller's count of tokens summed in place",
        file="hybrid_sp/gradients.py",
        old="tokens.to(torch.int64, copy=True)",
        new="tokens.to(torch.int64)",
        test="tests/hybrid_sp/test_gradients.py::test_the_sum_over_ranks_is_divided_by_all_tokens",
    ),
    *MIXER_MUTANTS,
    *BLOCK_MUTANTS,
]
