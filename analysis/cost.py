"""The cost model of one layer: what it receives over the network, what it holds in memory, as closed formulas.

Everything is per rank, for one layer and one pass, and counts received bytes, as the ledger does. P ranks, B sequences,
L tokens in the sequence, T = ceil(L / P) tokens on a rank, H heads, G key-value heads, K and V head dims, D the head
dim of softmax layers; n spans on a rank (1 contiguous, 2 zigzag). States and gradients travel as fp32, keys and values
in the model's dtype of `kv_bytes` per element. Send and receive buffers of the network library are not counted.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from hybrid_sp.exchange import EXCHANGES
from hybrid_sp.shard import BASELINES
from layers.cost import STATE_BYTES, TRANSITIONS, halo_spans, transition_elements


def span_tokens(L: int, P: int) -> int:
    """Tokens of the longest rank, T = ceil(L / P). Raises ValueError where a rank would have none."""
    if not 1 <= P <= L:
        raise ValueError(f"{P} ranks for a sequence of {L} tokens; take 1 to {L} ranks")
    return ceil(L / P)


# Linear layers: bytes received do not depend on L


def linear_all_gather_forward(
    *, P: int, B: int, H: int, K: int, V: int, transition: str = "none", spans: int = 1, normalize: bool = False
) -> int:
    """LASP-2 forward: (P-1) * n * B * H * (K V + a + z) * 4, a the transition, z = K with a normaliser, else 0.

    Source: LASP-2 (arXiv 2502.07563) algorithm 2, with per-head states.
    """
    z = K if normalize else 0
    return (P - 1) * spans * B * H * (K * V + transition_elements(transition, K) + z) * STATE_BYTES


def linear_all_gather_backward(
    *, P: int, B: int, H: int, K: int, V: int, spans: int = 1, normalize: bool = False, final_state: bool = False
) -> int:
    """LASP-2 backward: (P-1) * n * B * H * (K V + z) * 4; n + 1 for n where a final state has a gradient.

    The transitions are kept from the forward pass. Source: LASP-2 (arXiv 2502.07563) algorithm 4.
    """
    state = K * V + (K if normalize else 0)
    return (P - 1) * (spans + final_state) * B * H * state * STATE_BYTES


def linear_chain_forward(
    *,
    P: int,
    B: int,
    H: int,
    K: int,
    V: int,
    spans: int = 1,
    rank: int = 0,
    normalize: bool = False,
    final_state: bool = False,
) -> int:
    """LASP's ring and ZeCO's pipeline, forward: h * B * H * (K V + z) * 4, h of the rank's spans another rank precedes.

    The state on its way is already decayed, so no transition travels. Its hops are in series. The owner of the last
    span sends a final state to all: h + 1 for h, on the others. Sources: arXiv 2404.02882, arXiv 2507.01004.
    """
    hops = halo_spans(P=P, spans=spans, rank=rank)[0] + (final_state and rank != span_owner(-1, P=P, spans=spans))
    return hops * B * H * (K * V + (K if normalize else 0)) * STATE_BYTES


def linear_chain_backward(
    *,
    P: int,
    B: int,
    H: int,
    K: int,
    V: int,
    spans: int = 1,
    rank: int = 0,
    normalize: bool = False,
    final_state: bool = False,
) -> int:
    """The same backward, with h of the rank's spans that another rank follows. Where a final state has a gradient, the
    owner of the last span receives that of every other rank: h + P - 1 for h."""
    hops = halo_spans(P=P, spans=spans, rank=rank)[1]
    hops += (P - 1) * (final_state and rank == span_owner(-1, P=P, spans=spans))
    return hops * B * H * (K * V + (K if normalize else 0)) * STATE_BYTES


def linear_doubling_forward(
    *,
    P: int,
    B: int,
    H: int,
    K: int,
    V: int,
    transition: str = "none",
    spans: int = 1,
    rank: int = 0,
    normalize: bool = False,
    final_state: bool = False,
) -> int:
    """Doubling forward: for each of the rank's spans i and each d = 1, 2, 4, ... <= i for which another rank owns span
    i - d, B * H * (K V + z) * 4, and B * H * a * 4 of a transition unless i < 2 d. A final state as in a chain.

    At most ceil(log2(n P)) such messages per span. Source: Hillis and Steele (1986).
    """
    count, state, windows, transitions = P * spans, K * V + (K if normalize else 0), 0, 0
    for i in (i for i in range(count) if span_owner(i, P=P, spans=spans) == rank):
        rounds = [1 << r for r in range(i.bit_length())]
        far = [d for d in rounds if span_owner(i - d, P=P, spans=spans) != rank]
        windows += len(far)
        transitions += sum(i >= 2 * d for d in far)
    windows += final_state and rank != span_owner(-1, P=P, spans=spans)
    return B * H * (windows * state + transitions * transition_elements(transition, K)) * STATE_BYTES


def linear_doubling_backward(
    *,
    P: int,
    B: int,
    H: int,
    K: int,
    V: int,
    transition: str = "none",
    spans: int = 1,
    rank: int = 0,
    normalize: bool = False,
    final_state: bool = False,
) -> int:
    """Doubling backward: the same in the other order of spans, transitions included, so that a contiguous rank is in
    the place of rank P-1-r; zigzag is its own mirror image. Gradients of a final state as in a chain."""
    shape: dict[str, Any] = {"P": P, "B": B, "H": H, "K": K, "V": V, "spans": spans}
    mirrored = P - 1 - rank if spans == 1 else rank
    summed = (P - 1) * (final_state and rank == span_owner(-1, P=P, spans=spans))
    state = B * H * (K * V + (K if normalize else 0)) * STATE_BYTES
    return linear_doubling_forward(**shape, transition=transition, rank=mirrored, normalize=normalize) + summed * state


def linear_exchange(exchange: str, *, transition: str = "none", rank: int = 0, **shape: Any) -> tuple[int, int]:
    """What a linear layer receives forward and backward by the exchange of states of that name; `shape` are P, B, H, K,
    V, spans, normalize and final_state. Raises ValueError for another name."""
    match exchange:
        case "all_gather":
            forward = {name: value for name, value in shape.items() if name != "final_state"}
            return linear_all_gather_forward(**forward, transition=transition), linear_all_gather_backward(**shape)
        case "ring" | "pipeline":
            return linear_chain_forward(**shape, rank=rank), linear_chain_backward(**shape, rank=rank)
        case "doubling":
            shape |= {"transition": transition, "rank": rank}
            return linear_doubling_forward(**shape), linear_doubling_backward(**shape)
    raise ValueError(f"exchange is {exchange!r}; it must be one of {', '.join(EXCHANGES)}")


def span_owner(span: int, *, P: int, spans: int = 1) -> int:
    """The rank of a span, counted from the end if negative: contiguous r of span r, zigzag of spans r and 2P-1-r."""
    span %= P * spans
    return span if spans == 1 else min(span, 2 * P - 1 - span)


# Softmax layers: bytes received grow with L


def softmax_all_gather_forward(*, P: int, B: int, L: int, G: int, D: int, kv_bytes: int = 2) -> int:
    """AllGather-KV forward: 2 * (P-1) * B * T * G * D * kv_bytes, keys and values before they are repeated over heads.

    Source: LASP-2 (arXiv 2502.07563) algorithm 7; Llama 3 (arXiv 2407.21783) section 3.3.2.
    """
    return 2 * (P - 1) * B * span_tokens(L, P) * G * D * kv_bytes


def softmax_all_gather_backward(
    *, P: int, B: int, L: int, G: int, D: int, kv_bytes: int = 2, keep_kv: bool = True
) -> int:
    """AllGather-KV backward: the reduce-scatter of dK and dV, 2 * (P-1) * B * T * G * D * 4, which adds up in fp32.

    With keep_kv=False the keys and values are gathered again: the forward's bytes on top.
    """
    reduce_scatter = 2 * (P - 1) * B * span_tokens(L, P) * G * D * STATE_BYTES
    again = 0 if keep_kv else softmax_all_gather_forward(P=P, B=B, L=L, G=G, D=D, kv_bytes=kv_bytes)
    return reduce_scatter + again


def ring_attention_forward(*, P: int, B: int, L: int, G: int, D: int, kv_bytes: int = 2) -> int:
    """Ring attention forward: 2 * (P-1) * B * T * G * D * kv_bytes, as AllGather-KV, but in P-1 steps in series.

    Source: Ring Attention (arXiv 2310.01889).
    """
    return softmax_all_gather_forward(P=P, B=B, L=L, G=G, D=D, kv_bytes=kv_bytes)


def ring_attention_backward(*, P: int, B: int, L: int, G: int, D: int, kv_bytes: int = 2) -> int:
    """Ring attention backward: K and V go round again, (P-1) hops, and fp32 dK and dV with them, P hops to come home.

    2 * B * T * G * D * ((P-1) * kv_bytes + P * 4), and 0 for P = 1. Source: Ring Attention (arXiv 2310.01889).
    """
    hops = (P - 1) * kv_bytes + P * STATE_BYTES
    return 2 * B * span_tokens(L, P) * G * D * hops if P > 1 else 0


def ulysses(*, P: int, B: int, L: int, H: int, G: int, D: int, element_bytes: int = 2) -> int:
    """Ulysses, forward or backward: all-to-all of q, k, v and o, (P-1)/P * B * T * (2 H + 2 G) * D * element_bytes.

    Raises ValueError unless P divides H and G (heads are what it cuts). Source: DeepSpeed-Ulysses (arXiv 2309.14509).
    """
    return _own_heads(P, H, G) * B * span_tokens(L, P) * (2 * H + 2 * G) * D * element_bytes // P


def softmax_exchange(
    exchange: str, *, P: int, B: int, L: int, H: int, G: int, D: int, kv_bytes: int = 2, keep_kv: bool = True
) -> tuple[int, int]:
    """What a softmax layer without a window receives forward and backward: "all_gather", "ring", "ulysses" or
    "megatron", which gathers all heads where Ulysses sends each rank its own, P times the bytes."""
    shape: dict[str, Any] = {"P": P, "B": B, "L": L, "G": G, "D": D}
    match exchange:
        case "all_gather":
            back = softmax_all_gather_backward(**shape, kv_bytes=kv_bytes, keep_kv=keep_kv)
            return softmax_all_gather_forward(**shape, kv_bytes=kv_bytes), back
        case "ring":
            shape["kv_bytes"] = kv_bytes
            return ring_attention_forward(**shape), ring_attention_backward(**shape)
        case "ulysses" | "megatron":
            bytes_ = ulysses(**shape, H=H, element_bytes=kv_bytes) * (P if exchange == "megatron" else 1)
            return bytes_, bytes_
    raise ValueError(f"exchange of softmax layers is {exchange!r}; it must be all_gather, ring, ulysses or megatron")


# Linear layers under the baselines: bytes received grow with L


def linear_ulysses(
    *, P: int, B: int, L: int, H: int, G: int, K: int, V: int, gates: int = 0, element_bytes: int = 2
) -> int:
    """Ulysses, forward or backward: all-to-all of q, k [G, K], v, o [H, V] and `gates` fp32 numbers per value head (the
    log decays and beta of every token), (P-1)/P * B * T * ((2 G K + 2 H V) * element_bytes + H * gates * 4)."""
    row = (2 * G * K + 2 * H * V) * element_bytes + H * gates * STATE_BYTES
    return _own_heads(P, H, G) * B * span_tokens(L, P) * row // P


def left_product(
    *,
    P: int,
    B: int,
    L: int,
    H: int,
    G: int,
    K: int,
    V: int,
    transition: str = "none",
    spans: int = 1,
    element_bytes: int = 2,
) -> tuple[int, int]:
    """Ring attention of linear layers, forward and backward, with a = 1 for decays of every token, else 0:
    (P-1) * B * (T * ((G K + H V) * element_bytes + H a * 4) + n * H a * 4), K and V with their decays and the spans'
    totals; backward the same and P * B * T * (G K + H V + H a) * 4, the gradients. 0 for P = 1.

    Raises ValueError for transitions that it does not take. Source: Ring Attention (arXiv 2310.01889), as LASP-2 (arXiv
    2502.07563) compares it.
    """
    if transition not in TRANSITIONS[:3]:
        raise ValueError(f"linear ring attention takes no transition {transition!r}, only {', '.join(TRANSITIONS[:3])}")
    T, decays = span_tokens(L, P), H * transition_elements(transition, K) * STATE_BYTES
    around = (P - 1) * B * (T * ((G * K + H * V) * element_bytes + decays) + spans * decays)
    home = P * B * T * ((G * K + H * V) * STATE_BYTES + decays) if P > 1 else 0
    return around, around + home


def linear_baseline(
    baseline: str,
    *,
    transition: str = "none",
    spans: int = 1,
    gates: int = 0,
    **shape: Any,
) -> tuple[int, int]:
    """What a linear layer receives forward and backward by a baseline; `shape` are P, B, L, H, G, K, V, element_bytes.
    Raises ValueError for another name."""
    match baseline:
        case "ring_attention":
            return left_product(**shape, transition=transition, spans=spans)
        case "ulysses" | "megatron":
            bytes_ = linear_ulysses(**shape, gates=gates) * (shape["P"] if baseline == "megatron" else 1)
            return bytes_, bytes_
    raise ValueError(f"baseline is {baseline!r}; it must be one of {', '.join(BASELINES['linear'])}")


def _own_heads(P: int, H: int, G: int) -> int:
    """P - 1, where P ranks can cut these heads."""
    if H % P or G % P:
        raise ValueError(f"Ulysses cuts heads: {P} ranks must divide {H} and {G} key-value heads; take fewer")
    return P - 1


def break_even_tokens(
    *, H: int, K: int, V: int, G: int, D: int, transition: str = "none", spans: int = 1, kv_bytes: int = 2
) -> float:
    """Tokens per rank T above which a linear layer's forward gather is smaller than a softmax layer's.

    n * H * (K V + a) * 4 = 2 * T * G * D * kv_bytes, solved for T. Neither P nor B matters; the sequence is L = P T.
    """
    state = spans * H * (K * V + transition_elements(transition, K)) * STATE_BYTES
    return state / (2 * G * D * kv_bytes)


# Memory


def linear_gather_memory(
    *, P: int, B: int, H: int, K: int, V: int, transition: str = "none", spans: int = 1, normalize: bool = False
) -> int:
    """Bytes of one gathered buffer of summaries: P * n * B * H * (K V + a + z) * 4. Does not depend on L."""
    z = K if normalize else 0
    return P * spans * B * H * (K * V + transition_elements(transition, K) + z) * STATE_BYTES


def softmax_gather_memory(*, P: int, B: int, L: int, G: int, D: int, kv_bytes: int = 2) -> int:
    """Bytes of the gathered keys and values, kept for backward by default: 2 * B * P T * G * D * kv_bytes."""
    return 2 * B * P * span_tokens(L, P) * G * D * kv_bytes


def decode_state(*, B: int, H: int, K: int, V: int) -> int:
    """Bytes that a linear layer keeps while decoding: B * H * K V * 4, at any length."""
    return B * H * K * V * STATE_BYTES


def decode_kv(*, B: int, L: int, G: int, D: int, kv_bytes: int = 2) -> int:
    """Bytes that a softmax layer keeps while decoding after L tokens: 2 * B * L * G * D * kv_bytes."""
    return 2 * B * L * G * D * kv_bytes
