"""The tokens of a block of chunks: what both recurrences load, and their decays.

States, and tensors of whole chunks, have the shape [N,BH,...] with BH = B*H.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..phases import Inputs
from .chunks import Block
from .decays import chunk_decays


class Tokens:
    """The inputs of a block as [(N B H),C,D], loaded when they are needed, and its decays."""

    def __init__(self, block: Block, x: Inputs) -> None:
        self.block, self.x, self.heads = block, x, x.v.shape[2]
        self.decays = chunk_decays(None if x.g is None else block.load(x.g, self.heads), x.bonus is not None)

    @cached_property
    def q(self) -> Tensor:
        return self.block.load(self.x.q, self.heads)

    @cached_property
    def k(self) -> Tensor:
        return self.block.load(self.x.k, self.heads)

    @cached_property
    def v(self) -> Tensor:
        return self.block.load(self.x.v, self.heads)

    @cached_property
    def reading(self) -> Tensor:
        """The queries exp(P) q."""
        return self.decays.since(self.q)

    def by_chunk(self, x: Tensor) -> Tensor:
        """View [(N B H),...] as [N,BH,...]."""
        return x.unflatten(0, (self.block.count, -1))

    def decayed(self, n: int, S: Tensor, out: Tensor, added: Tensor | None = None) -> Tensor:
        """Compute S decayed over chunk n, plus `added`."""
        if self._decay is None:
            return out.copy_(S) if added is None else torch.add(added, S, out=out)
        decay = self._decay[n]
        return torch.mul(decay, S, out=out) if added is None else torch.addcmul(added, decay, S, out=out)

    @cached_property
    def _decay(self) -> Tensor | None:
        """The decay of a state over each whole chunk, [N,BH,K or 1,1]."""
        return None if self.decays.whole is None else self.by_chunk(self.decays.whole)


def empty_states(x: Inputs) -> Tensor:
    """Return empty states [BH,K,V]."""
    batch, _, heads, width = x.v.shape
    return x.v.new_zeros(batch * heads, x.k.shape[-1], width)
