"""LayerCache: what one mixer remembers of the tokens it has decoded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """`position` tokens have been read; `tensors` is what is left of them.

    A linear mixer keeps its state S_BHKV (and z_BHK if it normalises), of constant size; softmax attention keeps the
    keys and values of every token, [B, position, G, K].
    """

    position: int
    tensors: tuple[Tensor, ...]

    def extended(self, tokens: int, *tensors: Tensor) -> LayerCache:
        """The cache after `tokens` more tokens, of which `tensors` is left."""
        return LayerCache(position=self.position + tokens, tensors=tensors)
