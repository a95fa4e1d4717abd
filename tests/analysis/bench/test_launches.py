"""What is counted of launches and operations: each tensor once, views not at all, and the same rule for everyone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from analysis.bench.__main__ import main
from analysis.bench.gpu.launches import Count, Counting, moved
from analysis.bench.sizes import QUICK
from tests.support.packages import needs


def test_numbers_that_a_dim_repeats_move_once() -> None:
    x = torch.zeros(3, 5)
    assert moved(x) == moved(x.T) == 60 and moved(x[:, :2]) == 24
    assert moved(x[:, None].expand(3, 7, 5)) == 60 and moved(torch.zeros(()).expand(4)) == 4
    assert moved(x.bfloat16()) == 30 and moved(x[:0]) == 0


def test_operations_count_what_they_read_and_write() -> None:
    x, y = torch.zeros(2, 4), torch.zeros(4)
    counting = Counting()
    with counting:
        x.view(8), x.T.detach(), torch.empty(5)
        x + y
        x.mul_(2)
        x.sum()
        x.contiguous()
        x.to(torch.bfloat16)
    assert counting.take() == ([], [("add", 32 + 16 + 32), ("mul_", 32), ("sum", 32 + 4), ("_to_copy", 32 + 16)])
    assert counting.take() == ([], [])


def test_a_launch_counts_a_tensor_that_comes_twice_once() -> None:
    x, y, counting = torch.zeros(4), torch.zeros(2), Counting()
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="sum_kernel"))
    counting.launched(kernel, x, x, 3, out=y, grid=(1,))
    assert counting.take() == ([("sum_kernel", 24)], [])


@needs("triton", "fla")
def test_launches_of_ours_and_of_fla_are_counted_without_a_device(tmp_path: Path) -> None:
    main(["launches", "--quick", "--out", str(tmp_path)])
    results: dict[str, Any] = json.loads((tmp_path / "launches" / "results.json").read_text())
    counts = [Count(*one.values()) for one in results["counts"]]
    assert len(counts) == 2 * 2 * (4 + 3) and not results["notes"]
    assert [row["values"] for row in results["rows"]] == [[one.bytes] for one in counts]
    by_name = {(one.contender, one.name): one for one in counts}
    shape = QUICK.kernels
    tokens, state = shape.tuned_at * shape.heads[0] * shape.width * 2, shape.heads[0] * shape.width**2
    peer = dict(by_name["fla chunk_linear_attn", "linear, none, forward"].launches)
    assert peer["chunk_fwd_kernel_h"] == 2 * tokens + 2 * state, "k and v in, the states of one chunk out, bf16"
    assert peer["chunk_fwd_kernel_o"] == 4 * tokens + 2 * state, "q, k, v, states in, o out"
    ours = by_name["ours, none", "linear, none, forward"]
    assert dict(ours.launches).keys() == {"summary_kernel", "fold_kernel", "scan_kernel"}
    scan = dict(ours.launches)["scan_kernel"]
    assert 4 * tokens + 4 * state <= scan < 4 * tokens + 4 * state + 256, "states in fp32, and the table of segments"
    report = (tmp_path / "launches" / "report.md").read_text()
    line = next(line for line in report.splitlines() if line.startswith("| linear, scalar     | forward"))
    own = by_name["ours, scalar", "linear, scalar, forward"]
    assert [cell.strip() for cell in line.split("|")[3:7]] == [str(len(own.launches)), "3", "1", "0"]
    assert [name for name, _ in own.operations] == ["clamp"], "as on a device"
