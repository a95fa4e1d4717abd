"""The precision of gate parameters: those that make decays stay at least fp32 in a bf16 or fp16 model.

A decay acts once a token, so a rounding error in it grows with the number of tokens that the state remembers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

Apply = Callable[..., nn.Module]


def keep_wide(*names: str) -> Apply:
    """Make an `_apply` for a module that casts its tensors and gradients, but never the named ones below fp32.

    `to`, `bfloat16`, `half`, `double` and `cuda` of the module and of its parents all go through `nn.Module._apply`.
    """

    def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = itertools.chain(module.named_parameters(), module.named_buffers())
        gates = [gate for name, gate in tensors if name in names]

        def cast(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            kept = result.dtype.itemsize < 4 and any(tensor is gate or tensor is gate.grad for gate in gates)
            return tensor.to(result.device, torch.float32) if kept else result

        return nn.Module._apply(module, cast, recurse)

    return apply
