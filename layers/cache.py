"""LayerCache: what one mixer remembers of the tokens it has read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybrid_sp.shard import Shard


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """`position` tokens have been read; `tensors` is what is left of them.

    A linear mixer keeps the last inputs of its short convolution (or token shift) if it has one, [B, W-1, channels] in
    the model's dtype, and then its state S_BHKV (and z_BHK if it normalises), all of constant size; softmax attention
    keeps the keys and values of every token, or of the last ones that its window holds, [B, tokens, G, K].
    """

    position: int
    tensors: tuple[Tensor, ...]

    def extended(self, tokens: int, *tensors: Tensor) -> LayerCache:
        """The cache after `tokens` more tokens, of which `tensors` is left."""
        return LayerCache(position=self.position + tokens, tensors=tensors)


def require_one_device(shard: Shard | None, cache: LayerCache | None) -> None:
    """Raise ValueError if a mixer is given a part of a sequence and also a cache to go on from."""
    if shard is not None and cache is not None:
        raise ValueError("got both a shard and a cache: decoding runs on one device; leave out the shard")
