"""Gradients are summed over ranks and divided once by the count of valid tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

import hybrid_sp as hsp
from hybrid_sp.comm import groups
from tests.support.ranks import run_ranks

TOKENS = (5, 0, 11)


def summed(group: Any, dtype: torch.dtype, as_tensor: bool) -> None:
    rank = groups.rank(group)
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(3)]
    parameters[2].requires_grad_(False)
    if TOKENS[rank]:  # a rank without a valid token has no gradient at all
        parameters[0].grad = torch.full((3,), float(rank + 1), dtype=dtype)
        parameters[1].grad = torch.full((3,), TOKENS[rank] * 2.0, dtype=dtype)
    if as_tensor:
        tokens = torch.tensor(TOKENS[rank])
        total = hsp.sum_gradients(parameters, group, tokens)
        assert isinstance(total, torch.Tensor) and total == sum(TOKENS) and tokens == TOKENS[rank]
    else:
        assert hsp.sum_gradients(parameters, group, TOKENS[rank]) == sum(TOKENS)
    assert parameters[0].grad is not None and parameters[1].grad is not None and parameters[2].grad is None
    assert parameters[0].grad.dtype == dtype
    torch.testing.assert_close(parameters[0].grad, torch.full((3,), 4 / 16, dtype=dtype))
    torch.testing.assert_close(parameters[1].grad, torch.full((3,), 2.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_sum_over_ranks_is_divided_by_all_tokens(dtype: torch.dtype, as_tensor: bool) -> None:
    run_ranks(summed, 3, dtype, as_tensor)


def test_no_valid_token_anywhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rank has a valid token"):
        hsp.sum_gradients([torch.nn.Parameter(torch.ones(2))], None, 0)


def sharded(group: Any) -> None:
    mesh = hsp.init_mesh()
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh["dp"]))
    with pytest.raises(ValueError, match="DTensors, whose gradients FSDP2 sums.*set_gradient_divide_factor"):
        hsp.sum_gradients([weight], group, 1)


def test_sharded_parameters_are_refused_with_what_to_do() -> None:
    run_ranks(sharded, 1)
