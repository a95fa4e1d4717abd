"""How a run's layers communicate is in its recipe, and what came of it in its metrics, provenance and trace; the losses
are the same whatever is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hybrid_sp as hsp
from hybrid_sp.comm.link import Link
from recipes import config
from recipes.record import read_metrics
from recipes.strategy import strategy
from tests.recipes.conftest import Train
from tests.recipes.program import run_program
from tests.support.tiers import tiered

SHORT = ("train.dtype=float64", "train.steps=3", "train.sample=0", "train.validate_every=3", "checkpoint.every=3")


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def numbers(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in train_lines(folder)]


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks."""
    out = tmp_path_factory.mktemp("plain")
    done = run_program(str(tiny), f"out={out}", "name=run", *SHORT, ranks=2)
    assert done.ok, done
    assert "exchange   gla all_gather, softmax all_gather\n" in done.texts[0]
    return out / "run"


def test_metrics_count_by_kind(plain: Path) -> None:
    line = train_lines(plain)[0]
    kinds = {key: line[f"comm/bytes_{key}"] for key in ("linear", "softmax", "conv", "gradients")}
    # Received from the other rank, whose two spans of 8 tokens each hold 4 sequences: of gla 2 heads of a state 4 x 8
    # and a decay of 4, there and back (fp64); of softmax 2 heads of 8 in keys and values.
    assert kinds["linear"] == 2 * 4 * 2 * (4 * 8 + 4 + 4 * 8) * 8
    assert kinds["softmax"] == 2 * (2 * 4 * 16 * 2 * 8 * 8)
    assert kinds["conv"] == 0 and kinds["gradients"] > 0
    assert 0 < line["comm/bytes"] - sum(kinds.values()) < 100, "the count of tokens and the loss"
    parts = sum(line[f"comm/exposed_{kind}_ms"] for kind in ("linear", "softmax", "conv"))
    assert 0 < parts < line["comm/exposed_ms"] and line["comm/calls"] == 7
    assert not (plain / "trace.json").exists()
    exchange = json.loads((plain / "provenance.json").read_text())["exchange"]
    assert exchange == {
        "linear": {"gla": {"exchange": "all_gather", "seconds": None}},
        "softmax": "all_gather",
        "link": None,
    }


@pytest.mark.parametrize(
    "chosen",
    [
        ("parallel.overlap=[softmax]", "train.recompute=full"),
        ("parallel.overlap=[linear,conv]", "train.recompute=selective"),
        ("train.recompute=selective", "train.recompute_blocks=N"),
    ],
    ids=" ".join,
)
def test_overlap_and_recomputation_change_no_number_and_no_call(
    chosen: tuple[str, ...], train: Train, plain: Path, tmp_path: Path
) -> None:
    done = train(*SHORT, *chosen, ranks=2)
    assert done.ok, done
    assert numbers(tmp_path / "run") == numbers(plain)
    for got, want in zip(train_lines(tmp_path / "run"), train_lines(plain), strict=True):
        assert all(got[key] == want[key] for key in want if key.startswith(("comm/bytes", "comm/calls")))


@pytest.mark.parametrize(
    "chosen",
    tiered(
        ["parallel.linear=ring parallel.softmax=ulysses"],
        [
            "parallel.linear=pipeline parallel.softmax=megatron",
            "parallel.linear=ulysses parallel.softmax=ring",
            "parallel.linear=megatron parallel.kv_heads_per_gather=1 parallel.keep_kv=false",
        ],
    ),
)
def test_every_strategy_is_the_same_run(chosen: str, train: Train, plain: Path, tmp_path: Path) -> None:
    done = train(*SHORT, *chosen.split(), ranks=2)
    assert done.ok, done
    assert numbers(tmp_path / "run") == [
        (pytest.approx(loss, rel=1e-9), pytest.approx(norm, rel=1e-9)) for loss, norm in numbers(plain)
    ]


def test_recomputation_on_one_device(train: Train, plain: Path, tmp_path: Path) -> None:
    assert train(*SHORT, "train.recompute=full").ok
    recomputed = numbers(tmp_path / "run")
    assert train(*SHORT, "checkpoint.resume=never").ok
    assert recomputed == numbers(tmp_path / "run")
    assert recomputed == [
        (pytest.approx(loss, rel=1e-9), pytest.approx(norm, rel=1e-9)) for loss, norm in numbers(plain)
    ]


def test_a_trace_of_all_ranks(train: Train, plain: Path, tmp_path: Path) -> None:
    done = train(*SHORT, "train.steps=4", "parallel.dp=2", "parallel.sp=2", "train.trace=true", ranks=4)
    assert done.ok, done
    path = tmp_path / "run" / "trace.json"
    assert f" {path}\n" in done.texts[0], "the closing lines name it"
    slices = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank in range(4):
        names = [event["name"] for event in slices if event["pid"] == rank and event["cat"] == "compute"]
        # The third step alone: one forward and one backward of each block, phase by phase.
        assert names == [f"linear 0 forward {name}" for name in ("states", "intra", "fold", "inter")] + [
            *("softmax 1 forward own", "softmax 1 forward rest", "softmax 1 backward rest", "softmax 1 backward own"),
            *(f"linear 0 backward {name}" for name in ("inter", "intra", "fold", "states")),
        ]
        received = sum(
            event["args"]["bytes"] for event in slices if event["pid"] == rank and event["cat"] == "in flight"
        )
        assert rank or received == train_lines(tmp_path / "run")[2]["comm/bytes"]
    waits = [event for event in slices if event["pid"] == 0 and event["cat"] == "exposed"]
    line = train_lines(tmp_path / "run")[2]
    assert sum(event["dur"] for event in waits) / 1e3 == pytest.approx(line["comm/exposed_ms"], abs=2e-3)


def test_a_run_of_fewer_steps_is_traced_in_its_last(train: Train, tmp_path: Path) -> None:
    assert train(*SHORT, "train.steps=1", "train.trace=true").ok
    assert "linear 0 forward intra" in (tmp_path / "run" / "trace.json").read_text()


def test_auto_is_chosen_by_the_link_and_written_down(train: Train, plain: Path, tmp_path: Path) -> None:
    slow = "parallel.link={latency: 0, bandwidth: 1e3}"
    given = train(*SHORT, "parallel.linear=auto", slow, ranks=2)
    assert given.ok, given
    exchange = json.loads((tmp_path / "run" / "provenance.json").read_text())["exchange"]
    assert exchange["link"] == {"latency": 0.0, "bandwidth": 1000.0}
    times = exchange["linear"]["gla"]["seconds"]
    state, decay = 4 * 2 * 4 * 8 * 8, 4 * 2 * 4 * 8
    assert times["all_gather"] == pytest.approx(2 * (2 * state + decay) / 1e3)
    assert times["ring"] == pytest.approx(2 * 2 * state / 1e3)
    assert exchange["linear"]["gla"]["exchange"] == min(times, key=lambda name: times[name])
    assert f"gla {min(times, key=lambda name: times[name])} (of all_gather " in given.texts[0]
    assert "link 0 us, 1e-06 GB/s" in given.texts[0]
    assert numbers(tmp_path / "run") == [
        (pytest.approx(loss, rel=1e-9), pytest.approx(norm, rel=1e-9)) for loss, norm in numbers(plain)
    ]


def test_a_link_that_is_not_given_is_measured_once_for_all(train: Train, tmp_path: Path) -> None:
    done = train(*SHORT, "train.steps=1", "parallel.linear=auto", "parallel.dp=2", ranks=4)
    assert done.ok, done
    link = json.loads((tmp_path / "run" / "provenance.json").read_text())["exchange"]["link"]
    assert link["latency"] > 0 and link["bandwidth"] > 0


def test_what_is_told_about_every_kind_of_block() -> None:
    model = config.ModelConfig(pattern=["gla", "mamba2", "based", "lightning", "kda", "softmax"], depth=6)
    link = Link(latency=0.0, bandwidth=1.0)
    told = strategy(config.Recipe(model=model), hsp.SequenceParallel(None, linear="ring", link=link))
    assert list(told.linear) == ["gla", "mamba2", "based", "lightning", "kda"] and told.link is None
    assert str(told) == "gla ring, mamba2 ring, based ring, lightning ring, kda ring, softmax all_gather"
