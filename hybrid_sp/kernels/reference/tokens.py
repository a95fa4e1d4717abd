"""The tokens of a block of chunks: what both recurrences load, and their decays."""

from __future__ import annotations

from functools import cached_property

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
