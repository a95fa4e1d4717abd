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
]
