"""Ways to break mixers and their options: heads, convolutions, gates, positions, and several steps a token."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FORMULA = "tests/layers/test_mixers.py::test_output_and_gradients_are_those_of_the_formula"

MIXER_MUTANTS = [
    Mutant(
        name="a convolution that no mixer asks for",
        file="layers/recurrence.py",
        old="replace(self.shape(context), conv=self.conv)",
        new="replace(self.shape(context), conv=0)",
        test="tests/layers/test_mixers.py::test_a_convolution_reads_as_many_tokens_as_its_option_says[lightning-4]",
    ),
    Mutant(
        name="the model's heads instead of a mixer's own",
        file="layers/registry.py",
        old="heads=heads or self.heads,",
        new="heads=self.heads,",
        test="tests/layers/test_mixers.py::test_heads_of_its_own_are_those_of_a_model_that_has_as_many[lightning]",
    ),
    Mutant(
        name="the width of a head of its own forgotten",
        file="layers/registry.py",
        old="head_dim=head_dim or None",
        new="head_dim=None",
        test="tests/layers/test_mixers.py::test_heads_of_its_own_are_those_of_a_model_that_has_as_many[kda]",
    ),
    Mutant(
        name="options below zero",
        file="layers/registry.py",
        old="    at_least(0, name, **{",
        new="    at_least(-9, name, **{",
        test="tests/layers/test_registry.py::test_errors_say_what_is_allowed",
    ),
    Mutant(
        name="one weight of a norm over groups for all heads",
        file="layers/recurrence.py",
        old='weights = 1 if shape.norm == "head" else shape.heads',
        new='weights = shape.heads if shape.norm == "all" else shape.norm_heads',
        test=f"{FORMULA}[mamba2-1.0-5-2-0]",
    ),
    Mutant(
        name="a bounded gate whose rate is outside the sigmoid",
        file="layers/timestep.py",
        old="torch.sigmoid(rate * step)",
        new="torch.sigmoid(step)",
        test=f"{FORMULA}[kda--5.0-both-2]",
    ),
    Mutant(
        name="a bound of the gate that is not used",
        file="layers/timestep.py",
        old="if self.lower_bound < 0 else",
        new="if self.lower_bound > 0 else",
        test=f"{FORMULA}[kda--1.0-output]",
    ),
    Mutant(
        name="a gate of two matrices where one is asked for",
        file="layers/mixers/kda.py",
        old='if self.full_rank != "both":',
        new='if self.full_rank == "none":',
        test=f"{FORMULA}[kda--1.0-output]",
    ),
    Mutant(
        name="a cut between the writes of a token",
        file="hybrid_sp/shard.py",
        old="i * (self.length // self.unit) // count * self.unit for i",
        new="i * self.length // count for i",
        test="tests/hybrid_sp/ops/test_steps.py::test_parity[3]",
    ),
    Mutant(
        name="documents of another length where tokens are several",
        file="hybrid_sp/shard.py",
        old="tuple(steps * bound for bound in self.cu_seqlens)",
        new="tuple(self.cu_seqlens[:-1]) + (steps * self.length,)",
        test="tests/hybrid_sp/ops/test_steps.py::test_parity[3]",
    ),
    Mutant(
        name="a decay at the last write of a token",
        file="layers/mixers/gated_delta_product.py",
        old="(0, 0, 0, self.writes - 1)",
        new="(0, 0, self.writes - 1, 0)",
        test=f"{FORMULA}[gated_delta_product-1.0]",
    ),
    Mutant(
        name="the first write of a token is read",
        file="layers/recurrence.py",
        old="o_BTHV[:, steps - 1 :: steps]",
        new="o_BTHV[:, ::steps]",
        test=f"{FORMULA}[gated_delta_product-1.0]",
    ),
    Mutant(
        name="writes of a token that cannot reflect",
        file="layers/mixers/gated_delta_product.py",
        old="negative=self.negative_eigenvalues",
        new="negative=False",
        test="tests/layers/test_known_answers.py::test_parity_and_permutations_of_three_are_tracked[1]",
    ),
    Mutant(
        name="eigenvalues of a delta rule that are never negative",
        file="layers/delta.py",
        old="self.limit = 2 if negative else 1",
        new="self.limit = 1",
        test="tests/layers/test_known_answers.py::test_parity_and_permutations_of_three_are_tracked[1]",
    ),
    Mutant(
        name="baselines that send one write per token",
        file="analysis/traffic.py",
        old="summary.steps * cut.L",
        new="cut.L",
        test="tests/analysis/test_traffic.py::test_baselines_send_what_their_cost_says[zigzag-ulysses-ulysses]",
    ),
    Mutant(
        name="feedback from the decayed state",
        file="layers/mixers/comba.py",
        old="* torch.exp(-log_decay)",
        new="* torch.ones_like(log_decay)",
        test=f"{FORMULA}[comba-1.0]",
    ),
    Mutant(
        name="no correction of the output",
        file="layers/mixers/comba.py",
        old="inputs._replace(q=corrected)",
        new="inputs",
        test=f"{FORMULA}[comba-0.5-1.0-0]",
    ),
    Mutant(
        name="feedback divided by a decay of nothing",
        file="layers/mixers/comba.py",
        old="    log_decay = log_decay.clamp(min=FLOOR)\n",
        new="",
        test="tests/layers/test_mixers.py::test_feedback_of_comba_before_decays_that_erase_the_state",
    ),
    Mutant(
        name="an activation in a convolution that has none",
        file="layers/mixers/short_conv.py",
        old="activation=None",
        new='activation="silu"',
        test=f"{FORMULA}[short_conv]",
    ),
]
