"""The cost of a part of the model: parameters, FLOPs, decoding memory, and messages between ranks.

Halos and gradients come with the bytes that one rank receives for them, as the ledger counts them. P is the number of
ranks, B of sequences, and `spans` the number of spans on a rank: 1 contiguous, 2 zigzag.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hybrid_sp.shard import LAYOUTS, neighbours


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The cost of softmax attention: token t sees the last `window` of t + 1 keys, or all of them without a window."""

    heads: int  # of queries
    kv_heads: int  # of keys and values
    width: int  # of a key
    value: int | None = None  # of a value; None: as wide as a key
    latent: int = 0  # numbers of a token from which all keys and values are made; 0: they are not
    window: int | None = None

    @property
    def values(self) -> int:
        """The width of a value."""
        return self.width if self.value is None else self.value

    @property
    def row(self) -> int:
        """The numbers of a token that others read: a key and a value per head, or the latent."""
        return self.latent or self.kv_heads * (self.width + self.values)

    def keys(self, length: int) -> int:
        """Count the keys that the last of `length` tokens sees."""
        return length if self.window is None else min(length, self.window)

    def flops(self, length: int) -> int:
        """Count the FLOPs over `length` tokens: q k^T and p v of every visible pair of a query and a key."""
        keys = self.keys(length)
        pairs = keys * (keys + 1) // 2 + (length - keys) * keys
        return 2 * self.heads * (self.width + self.values) * pairs


STATE_BYTES = 4  # fp32, in which states and gradients travel


def transition_elements(kind: str, K: int) -> int:
    """Count the numbers per head that a summary carries with its K x V state, for one kind of transition A_t.

    none and fixed: 0, since every rank knows the transition; scalar: 1; vector: K; matrix: K * K.
    Another kind raises ValueError.
    """
    sizes = {"none": 0, "fixed": 0, "scalar": 1, "vector": K, "matrix": K * K}
    if kind not in sizes:
        raise ValueError(f"transition is {kind!r}; it must be one of {', '.join(sizes)}")
    return sizes[kind]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Describe the message about one span of a recurrence: per head a state [key, value] and a transition.

    The transition is none, fixed (neither is sent), scalar, vector or matrix. `normalize` adds a state [key].
    Baselines send tokens instead, `steps` for each of the model's. Their queries and keys have `groups` heads, or with
    None as many as the values. Their log decays and beta are `gates` numbers per token and value head.
    """

    heads: int
    key: int
    value: int
    transition: str = "none"
    normalize: bool = False
    groups: int | None = None
    gates: int = 0
    steps: int = 1

    @property
    def numbers(self) -> tuple[int, int]:
        """The numbers of one head's state, and of the transition that travels with it."""
        return self.key * (self.value + self.normalize), transition_elements(self.transition, self.key)


@dataclass(frozen=True, kw_only=True)
class Halo:
    """Count the tokens before each span that a convolution or a token shift reads, and their channels."""

    tokens: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Hold the cost of one part of a model; the sum over its parts is the cost of the model.

    FLOPs count matrix products, convolutions and recurrences, 2 for a multiplication with its addition.
    A recurrence counts the update and the read of its state per token, whatever the chunk size.
    """

    matmul_params: int = 0  # parameters that multiply every token
    other_params: int = 0  # parameters of embeddings, norms, biases and gates
    idle_params: int = 0  # parameters of the experts that a token does not pass through
    recurrence_flops: int = 0  # of a recurrence, per token
    state: int = 0  # numbers per sequence that decoding keeps in fp32 (fp64 for an fp64 model)
    attention: tuple[Attention, ...] = ()  # costs that grow with the length
    summaries: tuple[Summary, ...] = ()  # messages between ranks about states
    halos: tuple[Halo, ...] = ()  # messages between ranks about tokens

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def conv_state(self) -> int:
        """The numbers per sequence that decoding keeps of the inputs of convolutions, in the model's dtype."""
        return sum(halo.tokens * halo.channels for halo in self.halos)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return self.active_parameters + self.idle_params

    @property
    def active_parameters(self) -> int:
        """The number of parameters that a token uses: all but those of the experts that it does not pass through."""
        return self.matmul_params + self.other_params

    def flops(self, length: int) -> int:
        """Count the FLOPs of the forward pass over a sequence of `length` tokens."""
        attention = sum(part.flops(length) for part in self.attention)
        return (2 * self.matmul_params + self.recurrence_flops) * length + attention

    def state_bytes(self, batch: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Count the bytes of the decoding cache of `batch` sequences of `length` tokens, for a model of this dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        narrow = self.conv_state + sum(part.row * part.keys(length) for part in self.attention)
        return batch * (self.state * wide.itemsize + narrow * dtype.itemsize)


def count_parameters(*modules: nn.Module) -> Cost:
    """Count the parameters of modules that share none. Those with two dims or more multiply tokens."""
    weights = [weight for module in modules for weight in module.parameters()]
    matmul_params = sum(weight.numel() for weight in weights if weight.ndim > 1)
    return Cost(matmul_params=matmul_params, other_params=sum(weight.numel() for weight in weights) - matmul_params)


def halo_forward(
    *, P: int, B: int, tokens: int, channels: int, element_bytes: int = 2, spans: int = 1, rank: int = 0
) -> int:
    """Count the bytes that a rank receives of the tokens before its spans: h * B * tokens * channels * element_bytes.

    h counts the spans of the rank that another rank precedes. No span may be shorter than the halo.
    """
    return neighbours(rank, P, LAYOUTS[spans - 1])[0] * B * tokens * channels * element_bytes


def halo_backward(*, P: int, B: int, tokens: int, channels: int, spans: int = 1, rank: int = 0) -> int:
    """Count the bytes of gradients received for tokens that others have read: h * B * tokens * channels * 4.

    h counts the spans of the rank that another rank follows.
    """
    return neighbours(rank, P, LAYOUTS[spans - 1])[1] * B * tokens * channels * STATE_BYTES


def gradient_all_reduce(*, P: int, parameters: int) -> int:
    """Count the bytes of one sum of all gradients over P ranks: 2 (P-1) / P * parameters * 4, by ring or halving."""
    return 2 * (P - 1) * parameters * STATE_BYTES // P
