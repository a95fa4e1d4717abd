"""The cost model of one layer: the bytes of halos and gradients. Exchanges of states and keys state their own.

Everything is per rank, for one layer and one pass, and counts received bytes, as the ledger does. P ranks, B sequences,
n spans on a rank (1 contiguous, 2 zigzag). Gradients travel as fp32.
"""

from __future__ import annotations

from layers.cost import transition_elements

STATE_BYTES = 4  # fp32


def span_owner(span: int, *, P: int, spans: int = 1) -> int:
    """The rank of a span, counted from the end if negative: contiguous r of span r, zigzag of spans r and 2P-1-r."""
    span %= P * spans
    return span if spans == 1 else min(span, 2 * P - 1 - span)


# Halos: the tokens before each span. Bytes received do not depend on L


def halo_spans(*, P: int, spans: int = 1, rank: int = 0) -> tuple[int, int]:
    """How many of a rank's spans another rank precedes, and how many another rank follows.

    Contiguous (spans = 1): all but the first rank, all but the last. Zigzag (spans = 2): rank r owns spans r and
    2P-1-r of 2P, of which the first has none before it, the last none after it, and those of rank P-1 meet.
    """
    own = (rank,) if spans == 1 else (rank, 2 * P - 1 - rank)
    before = sum(span > 0 and span - 1 not in own for span in own)
    after = sum(span < P * spans - 1 and span + 1 not in own for span in own)
    return before, after


def halo_forward(
    *, P: int, B: int, tokens: int, channels: int, element_bytes: int = 2, spans: int = 1, rank: int = 0
) -> int:
    """The tokens before the spans, in the model's dtype: h * B * tokens * channels * element_bytes, with h of
    `halo_spans`, for spans that are no shorter than the halo."""
    return halo_spans(P=P, spans=spans, rank=rank)[0] * B * tokens * channels * element_bytes


def halo_backward(*, P: int, B: int, tokens: int, channels: int, spans: int = 1, rank: int = 0) -> int:
    """The gradients of the tokens that others have read, in fp32: the forward's with the spans that another follows."""
    return halo_spans(P=P, spans=spans, rank=rank)[1] * B * tokens * channels * STATE_BYTES


def break_even_tokens(
    *, H: int, K: int, V: int, G: int, D: int, transition: str = "none", spans: int = 1, kv_bytes: int = 2
) -> float:
    """Tokens per rank T above which a linear layer's forward gather is smaller than a softmax layer's.

    n * H * (K V + a) * 4 = 2 * T * G * D * kv_bytes, solved for T. Neither P nor B matters; the sequence is L = P T.
    """
    state = spans * H * (K * V + transition_elements(transition, K)) * STATE_BYTES
    return state / (2 * G * D * kv_bytes)


# Gradients


def gradient_all_reduce(*, P: int, parameters: int) -> int:
    """The sum of all gradients over P ranks, once a step: 2 (P-1) / P * parameters * 4, by ring or halving."""
    return 2 * (P - 1) * parameters * STATE_BYTES // P
