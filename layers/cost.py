"""Cost: what a part of the model weighs, computes per token, keeps for decoding and sends between ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The part of a cost that depends on the length: token t sees the last `window` of t + 1 keys, or with None all."""

    heads: int  # of queries
    kv_heads: int
    width: int  # of a head
    window: int | None = None

    @property
    def pair_flops(self) -> int:
        """FLOPs per pair of a query and a key that it sees: q k^T and p v."""
        return 4 * self.heads * self.width

    @property
    def cache(self) -> int:
        """Numbers kept per key, in the model's dtype."""
        return 2 * self.kv_heads * self.width

    def keys(self, length: int) -> int:
        """Keys that the last of `length` tokens sees."""
        return length if self.window is None else min(length, self.window)

    def pairs(self, length: int) -> int:
        """Pairs of a query and a key that it sees, in a sequence of `length` tokens."""
        keys = self.keys(length)
        return keys * (keys + 1) // 2 + (length - keys) * keys


STATE_BYTES = 4  # fp32, in which states and gradients travel
TRANSITIONS = ("none", "fixed", "scalar", "vector", "matrix")


def transition_elements(kind: str, K: int) -> int:
    """Numbers per head that a summary carries beside its K x V state, by the form of the decay A_t.

    none, fixed: 0 (every rank knows it); scalar: 1; vector: K; matrix: K * K. Raises ValueError for another kind.
    """
    sizes = dict(zip(TRANSITIONS, (0, 0, 1, K, K * K), strict=True))
    if kind not in sizes:
        raise ValueError(f"transition is {kind!r}; it must be one of {', '.join(TRANSITIONS)}")
    return sizes[kind]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a rank tells the others of a span in a recurrence: per head a state [key, value] and a transition: none or
    fixed (not sent), scalar, vector or matrix. `normalize` adds a state [key].

    Baselines send tokens instead: queries and keys of `groups` heads (None: as many as values), and per value head so
    many `gates`, the log decays and beta of a token."""

    heads: int
    key: int
    value: int
    transition: str = "none"
    normalize: bool = False
    groups: int | None = None
    gates: int = 0

    @property
    def numbers(self) -> tuple[int, int]:
        """Of a head's state, and of the transition that is sent beside it."""
        return self.key * (self.value + self.normalize), transition_elements(self.transition, self.key)


@dataclass(frozen=True, kw_only=True)
class Halo:
    """The tokens before each span that a convolution or a token shift reads, of so many channels."""

    tokens: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one part of the model; costs of parts add up to the cost of the whole.

    Matrix products and convolutions alone are counted, a multiplication and an addition as 2 FLOPs. A recurrence is
    counted as it is written, update and read of the state, not as any chunk size computes it.
    """

    matmul_params: int = 0  # parameters that every token is multiplied by
    other_params: int = 0  # parameters that are looked up, scaled by or added
    recurrence_flops: int = 0  # FLOPs per token of a recurrence
    state: int = 0  # numbers kept per sequence, whatever its length, in fp32 (fp64 for an fp64 model)
    attention: tuple[Attention, ...] = ()  # what grows with the length
    summaries: tuple[Summary, ...] = ()  # sent where a sequence is cut over ranks
    halos: tuple[Halo, ...] = ()  # likewise

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def conv_state(self) -> int:
        """Numbers kept per sequence, whatever its length, in the model's dtype: the inputs that convolutions reach."""
        return sum(halo.tokens * halo.channels for halo in self.halos)

    @property
    def parameters(self) -> int:
        """How many parameters there are."""
        return self.matmul_params + self.other_params

    def flops(self, length: int) -> int:
        """FLOPs of the forward pass over a sequence of `length` tokens."""
        pairs = sum(part.pair_flops * part.pairs(length) for part in self.attention)
        return (2 * self.matmul_params + self.recurrence_flops) * length + pairs

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token, the mean over a sequence of `length` tokens."""
        return self.flops(length) / length

    def state_bytes(self, batch: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the decoding cache of `batch` sequences after `length` tokens each, for a model of this dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        narrow = self.conv_state + sum(part.cache * part.keys(length) for part in self.attention)
        return batch * (self.state * wide.itemsize + narrow * dtype.itemsize)


def count_parameters(*modules: nn.Module) -> Cost:
    """The parameters of modules, which have none in common: those with two dims or more are multiplied by tokens."""
    weights = [weight for module in modules for weight in module.parameters()]
    matmul_params = sum(weight.numel() for weight in weights if weight.ndim > 1)
    return Cost(matmul_params=matmul_params, other_params=sum(weight.numel() for weight in weights) - matmul_params)


def halo_spans(*, P: int, spans: int = 1, rank: int = 0) -> tuple[int, int]:
    """Count the spans of a rank that another rank precedes, and those that another rank follows.

    Contiguous (spans = 1): all but the first rank, all but the last. Zigzag (spans = 2): rank r owns spans r and
    2P-1-r of 2P. The first of all has none before it, the last none after it, and the two of rank P-1 meet.
    """
    own = (rank,) if spans == 1 else (rank, 2 * P - 1 - rank)
    before = sum(span > 0 and span - 1 not in own for span in own)
    after = sum(span < P * spans - 1 and span + 1 not in own for span in own)
    return before, after


def halo_forward(
    *, P: int, B: int, tokens: int, channels: int, element_bytes: int = 2, spans: int = 1, rank: int = 0
) -> int:
    """Count the bytes that a rank receives of the tokens before its spans: h * B * tokens * channels * element_bytes.

    h is the first number of `halo_spans`. No span is shorter than the halo.
    """
    return halo_spans(P=P, spans=spans, rank=rank)[0] * B * tokens * channels * element_bytes


def halo_backward(*, P: int, B: int, tokens: int, channels: int, spans: int = 1, rank: int = 0) -> int:
    """Count the bytes of gradients received for tokens that others have read: h * B * tokens * channels * 4.

    h is the second number of `halo_spans`.
    """
    return halo_spans(P=P, spans=spans, rank=rank)[1] * B * tokens * channels * STATE_BYTES


def gradient_all_reduce(*, P: int, parameters: int) -> int:
    """Count the bytes of one sum of all gradients over P ranks: 2 (P-1) / P * parameters * 4, by ring or halving."""
    return 2 * (P - 1) * parameters * STATE_BYTES // P
