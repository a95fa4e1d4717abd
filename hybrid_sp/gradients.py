"""The gradients of a run: each rank computes its contribution, and the sum over ranks is the total."""

from __future__ import annotations

from collections.abc import Iterable
from typing import overload

import torch
from torch import Tensor

from .comm import collectives
from .comm.groups import Group


@overload
def sum_gradients(parameters: Iterable[Tensor], group: Group, tokens: int) -> int: ...


@overload
def sum_gradients(parameters: Iterable[Tensor], group: Group, tokens: Tensor) -> Tensor: ...


def sum_gradients(parameters: Iterable[Tensor], group: Group, tokens: int | Tensor) -> int | Tensor:
    """Turn the gradients of this rank's summed token losses into those of the mean over all valid tokens, in place.

        p.grad = (sum over ranks of p.grad) / (sum over ranks of tokens)

    parameters  the same on all ranks, in the same order; a gradient that is None counts as zero
    group       all ranks that hold a part of the batch, dp and sp together; None for one device
    tokens      valid tokens whose losses this rank has summed, also over accumulated batches; may be 0; int, or an
                integer tensor [] on the gradients' device

    Returns the number of valid tokens of all ranks. Sums are in the gradients' dtype, at least fp32. Raises ValueError
    if no rank has a valid token, and for parameters that FSDP2 has sharded. There is no mean of means: ranks with
    unequal counts weigh by their tokens.

    With a tensor the result is a tensor, and the host of a GPU does not wait. Nothing is raised then if no rank has a
    valid token: check the result where you next read a value, before the optimiser's step.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if any(hasattr(p, "full_tensor") for p in parameters):
        raise ValueError(
            "sum_gradients: the parameters are DTensors, whose gradients FSDP2 sums over ranks itself: call "
            "set_gradient_divide_factor(1.0) on the modules, and divide each p.grad by the tokens of all ranks"
        )
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters if p.grad is not None]
    if isinstance(tokens, Tensor):
        total: int | Tensor = collectives.all_reduce(tokens.to(torch.int64, copy=True), group, tag="tokens")
    else:
        device = grads[0].device if grads else torch.device("cpu")
        total = int(collectives.all_reduce(torch.tensor(tokens, device=device), group, tag="tokens"))
    if isinstance(total, int) and total == 0:
        raise ValueError("sum_gradients: no rank has a valid token in this step; its loss has no mean")
    wide = {grad: torch.promote_types(grad.dtype, torch.float32) for grad in grads}
    for dtype in sorted(set(wide.values()), key=str):
        chosen = [grad for grad in grads if wide[grad] == dtype]
        flat = torch.cat([grad.reshape(-1).to(dtype) for grad in chosen])
        collectives.all_reduce(flat, group, tag="gradients").div_(total)
        for grad, part in zip(chosen, flat.split([grad.numel() for grad in chosen]), strict=True):
            grad.copy_(part.view_as(grad))
    return total
