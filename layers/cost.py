"""Cost: what a part of the model weighs, computes per token and keeps for decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one part of the model; costs of parts add up to the cost of the whole.

    Matrix products alone are counted, a multiplication and an addition as 2 FLOPs. A recurrence is counted as it is
    written, update and read of the state, not as any chunk size computes it.
    """

    matrices: int = 0  # parameters that every token is multiplied by
    vectors: int = 0  # parameters that are looked up, scaled by or added
    mixing: int = 0  # FLOPs per token of a recurrence
    mixing_per_key: int = 0  # FLOPs per pair of a query and a key that it sees
    state: int = 0  # numbers kept per sequence, whatever its length, in fp32 (fp64 for an fp64 model)
    cache: int = 0  # numbers kept per token of a sequence, in the model's dtype

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def parameters(self) -> int:
        """How many parameters there are."""
        return self.matrices + self.vectors

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token, the mean over a sequence of `length` tokens: token t sees t + 1 keys."""
        return 2 * self.matrices + self.mixing + self.mixing_per_key * (length + 1) / 2

    def state_bytes(self, batch: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the decoding cache of `batch` sequences after `length` tokens each, for a model of this dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        return batch * (self.state * wide.itemsize + self.cache * length * dtype.itemsize)
