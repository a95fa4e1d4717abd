"""The decoding cache of one mixer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybrid_sp.shard import Shard


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Hold the memory of one mixer after it has read `position` tokens.

    A linear mixer keeps tensors of constant size. First come the last inputs of its short convolution or token shift,
    [B, W-1, channels] in the model's dtype. Then comes its state S_BHKV, with z_BHK if it has a normaliser.
    Softmax attention keeps the keys and values [B, tokens, G, K] of every token, or of the last `window` tokens, after
    the inputs of its convolution if it has one.
    """

    position: int
    tensors: tuple[Tensor, ...]

    def extended(self, tokens: int, *tensors: Tensor) -> LayerCache:
        """Make the cache after `tokens` more tokens, with `tensors` as its new memory."""
        return LayerCache(position=self.position + tokens, tensors=tensors)


def require_one_device(shard: Shard | None, cache: LayerCache | None) -> None:
    """Raise ValueError if a mixer gets both a shard of a sequence and a cache."""
    if shard is not None and cache is not None:
        raise ValueError("got both a shard and a cache: decoding runs on one device; leave out the shard")
