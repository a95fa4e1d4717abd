"""The contract of a recurrence: its arithmetic on one device, in three phases between which ranks can communicate.

    S_t = A_t S_(t-1) + B_t          o_t = scale * q_t S_t

A rank holds spans of the sequence. A span maps the state S_in that enters it to the state that leaves it: S_out =
transition S_in + state. The size of this pair does not depend on the number of tokens. Other ranks need only this pair.

    states   the pair of each span                                     | the ranks exchange these pairs
    intra    the output from this rank's own tokens                    | while this is computed
    inter    the output of the whole sequence, once S_in is known

Backward mirrors it. dS_out is the gradient of the state that leaves a span, in the whole sequence.

    inter    dS_in, the outputs' gradient for the entering states      | the ranks exchange these gradients
    intra    the gradients that need no other rank                     | while these are computed
    states   all other gradients, once dS_out is known; a transition needs none, because S_in and dS_out are known

The schedule in `ops/recurrence.py` is written once, for every implementation. `reference/` is written in torch and is
the specification; `gpu/linear.py` is written in Triton; `gpu/fla_delta.py` calls the passes of fla-core.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .pieces import Spans


class Inputs(NamedTuple):
    """The tensors that a recurrence reads. Only linear attention has a bonus, and only the delta rule has beta."""

    q: Tensor  # [B,T,G,K]
    k: Tensor  # [B,T,G,K]
    v: Tensor  # [B,T,H,V]
    g: Tensor | None = None  # log decays [B,T,H] or [B,T,H,K]
    beta: Tensor | None = None  # [B,T,H]
    bonus: Tensor | None = None  # [H,K]

    def to(self, dtype: torch.dtype) -> Inputs:
        """Convert the inputs to another dtype."""
        q, k, v = (part.to(dtype) for part in self[:3])
        return Inputs(q, k, v, *(None if part is None else part.to(dtype) for part in self[3:]))


class Gradients(NamedTuple):
    """The gradients of `Inputs` except the bonus. A field is None if its input is None or if `intra_backward` returned
    it already."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None


class AffineState(NamedTuple):
    """The map S_out = A S_in + state, state [..., H, K, V]. transition is a log decay, None | [..., H] | [..., H, K],
    or A itself [..., H, K, K]."""

    transition: Tensor | None
    state: Tensor


class Options(NamedTuple):
    """The settings of one call."""

    scale: float
    entered: bool  # states enter the spans, or somebody reads the pairs of the spans
    dtype: torch.dtype  # of o, as far as an implementation can round there


W = TypeVar("W")  # the work of one forward phase, for the next
M = TypeVar("M", bound=tuple[Tensor | None, ...])  # the named tensors that backward needs from forward
R = TypeVar("R")  # the results of inter_backward, for intra_backward
L = TypeVar("L")  # the results of intra_backward, for states_backward


class Phases(Protocol[W, M, R, L]):
    """The arithmetic of one call. Every method is a plain function of tensors, outside autograd.

    q_in_states  whether `states_backward` returns the gradient of q, instead of `intra_backward`
    """

    q_in_states: ClassVar[bool]

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, W]:
        """Return the pairs of this rank's spans, with state [s,B,H,K,V], or None unless `Options.entered`."""

    def intra_forward(self, x: Inputs, work: W) -> tuple[Tensor, W]:
        """Return the part of o [B,T,H,V] that this rank's tokens give, as far as `inter_forward` needs it. Unless
        `Options.entered`, it may already be all of o."""

    def inter_forward(self, x: Inputs, work: W, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, M]:
        """Return o, perhaps in the memory of o_intra, and the tensors that backward needs. S_in is [s,B,H,K,V], or None
        if no state enters."""

    def inter_backward(self, do: Tensor, x: Inputs, saved: M, S_in: Tensor | None) -> tuple[Tensor | None, R]:
        """Return dS_in, for which other ranks wait."""

    def intra_backward(self, read: R) -> tuple[Tensor | None, Tensor | None, L]:
        """Return the gradients of q (unless `q_in_states`) and of the bonus."""

    def states_backward(self, local: L, dS_out: Tensor | None) -> Gradients:
        """Return all other gradients. dS_out is [s,B,H,K,V], or None if nothing reads the states that leave the
        spans."""


class Recurrence(Protocol):
    """The interface of an implementation. `prepare` returns the phases of one call, and the inputs in the dtypes and
    shapes that these take. PADDING is the number of columns by which v is widened for a normaliser, of which the first
    is used."""

    PADDING: ClassVar[int]

    @classmethod
    def prepare(cls, x: Inputs, spans: Spans, options: Options) -> tuple[Phases[Any, Any, Any, Any], Inputs]: ...
