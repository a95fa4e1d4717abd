"""The short convolution: causal, over a few tokens, with each channel on its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hybrid_sp as hsp
from hybrid_sp.shard import Shard
from layers.cost import Halo


class ShortConv(nn.Module):
    """Compute y_t = f(sum over i < W of weight[:, i] * x_(t-W+1+i) + bias), where f is silu, or with None the identity.

    Before the first token of a document, x is 0.
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weights uniformly between -W**-0.5 and W**-0.5, like torch for a convolution, and zero the bias."""
        if self.weight.is_meta:
            return  # as in timestep.py
        noise = torch.rand(self.weight.shape, generator=generator, dtype=torch.float32)
        self.weight.copy_((2 * noise - 1) * self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            self.bias.zero_()

    def init_state(self, batch: int) -> Tensor:
        """Return the W - 1 inputs before the first token, [B, W-1, channels], which are zero."""
        channels, width = self.weight.shape
        return self.weight.new_zeros(batch, width - 1, channels)

    def forward(
        self, x_BTC: Tensor, shard: Shard | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return y_BTC, and the state after these tokens if a state is given."""
        convolve: Callable[..., Any] = partial(
            hsp.short_conv, x_BTC, self.weight, self.bias, activation=self.activation
        )
        if state is None:
            return convolve(shard=shard), None
        return convolve(initial_state=state, return_final_state=True)

    @property
    def halo(self) -> Halo:
        """The inputs before a span that its first token reads."""
        channels, width = self.weight.shape
        return Halo(tokens=width - 1, channels=channels)
