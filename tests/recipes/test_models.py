"""Models of published sizes: their parameters are those of transformers at these sizes, and small ones train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layers.config import expand_pattern, model_facts
from recipes.load import load_recipe
from tests.recipes.conftest import write_texts
from tests.recipes.test_experts import run_of
from tests.recipes.test_step import Records
from tests.support.ranks import run_ranks

MODELS = Path("recipes/models")
QK_NORM = 2 * 8 * (3840 - 128)  # OLMo's has a weight for every head
ONE_LAYER = 39_514_272 - 29_114_880  # of KDA instead of latent attention
# Published, counted by transformers 5.24.0 on its meta device, what ours has more than that, active without embeddings.
SIZES = {
    "qwen3_next_80b_a3b": (80e9, 79_674_391_296, 0, 3e9),
    "kimi_linear_48b_a3b": (49.1e9, 49_133_074_464, -ONE_LAYER, 3e9),  # 48 in its name
    "nemotron_h_8b": (8.1e9, 8_100_852_736, 0, 7.03e9),
    "falcon_h1_7b": (7.59e9, 7_585_519_712, 0, 6.79e9),
    "minimax_text_01": (456e9, 456_089_655_296, 0, 45.9e9),
    "lfm2_1b": (1.17e9, 1_170_340_608, 0, 1.17e9),
    "olmo_hybrid_7b": (7.43e9, 7_430_870_688, -QK_NORM, 6.66e9),
    # No package has it: 16 blocks of four matrices, an MLP and two norms, a norm of 128 channels, and the ends.
    "linear_llama3_1b": (1.34e9, 16 * (4 * 2048**2 + 3 * 2048 * 8192 + 4096 + 128) + 2048 * 128257, 0, 1.34e9),
}
TINY = sorted(path.stem for path in (MODELS / "tiny").glob("*.yaml"))


def test_every_model_has_a_small_one() -> None:
    assert sorted(path.stem for path in MODELS.glob("*.yaml")) == sorted(SIZES)
    assert all(any(name.startswith(small) for name in SIZES) for small in TINY) and len(TINY) == len(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    published, counted, more, active = SIZES[name]
    model = load_recipe(MODELS / f"{name}.yaml").model
    facts = model_facts(model)
    assert facts.parameters == counted + more
    assert facts.parameters == pytest.approx(published, rel=0.01)
    ends = 0 if model.tie_embeddings else 2 * model.vocab * model.dim
    assert facts.active_parameters - ends == pytest.approx(active, rel=0.1 if facts.idle_params else 0.01)


def steps_of_small_models(group: Any, folder: str) -> list[list[float]]:
    """The losses of four steps of each on the ranks of one sequence, whose parameters are equal in the end."""
    found = []
    for name in TINY:
        overrides = [f"data.files={folder}", "data.length=64", "train.batch=2", "parallel.sp=2", "optim.warmup=0"]
        recipe = load_recipe(MODELS / "tiny" / f"{name}.yaml", [*overrides, f"out={folder}/../out", "train.steps=4"])
        records = Records()
        run = run_of(replace(recipe, name=name), records)
        for step in range(1, 5):
            run.train_step(step, False)
        run.compare_parameters()
        found.append([line["loss"] for line in records.steps])
    return found


def test_small_models_train_on_two_ranks(tmp_path: Path) -> None:
    files = write_texts(tmp_path / "texts").rpartition("/")[0]
    one, other = run_ranks(steps_of_small_models, 2, files, deadline=120.0)
    assert one == other
    for name, losses in zip(TINY, one, strict=True):
        assert len(losses) == 4 and losses[-1] < losses[0] - 0.1, f"{name}: {losses}"


@pytest.mark.parametrize("name", TINY)
def test_small_models_have_every_kind_of_block(name: str) -> None:
    """And the same options: the small recipe says sizes alone."""
    small = load_recipe(MODELS / "tiny" / f"{name}.yaml").model
    (whole,) = (load_recipe(MODELS / f"{one}.yaml").model for one in SIZES if one.startswith(name))
    assert set(expand_pattern(small)) == set(expand_pattern(whole))
    for mixer, options in whole.mixers.items():
        for option, value in options.items():
            if not isinstance(value, int) or isinstance(value, bool):
                assert small.mixers[mixer][option] == value, (mixer, option)
    assert (small.moe is None) == (whole.moe is None)
    if small.moe is not None and whole.moe is not None:
        sizes: dict[str, Any] = dict.fromkeys(("experts", "active", "dim", "shared"), 1)
        assert replace(small.moe, **sizes) == replace(whole.moe, **sizes)
