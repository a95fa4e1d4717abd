"""The contract of a recurrence: its arithmetic on one device, in three phases that communication can come between.

    S_t = A_t S_(t-1) + B_t          o_t = scale * q_t S_t

A rank holds spans of the sequence. A span maps the state S_in that enters it to the one that leaves it, S_out =
transition S_in + state. This pair does not depend on the number of tokens, and is all that other ranks need to know.

    states   the pair of each span                                     | the ranks exchange these pairs
    intra    the output that this rank's own tokens give               | while this is computed
    inter    the output of the whole sequence, once S_in is known

Backward mirrors it. With dS_out, the gradients of the states that leave the spans in the whole sequence,

    inter    dS_in, what the outputs give to the entering states       | the ranks exchange these gradients
    intra    the gradients that need no other rank                     | while these are computed
    states   all other gradients, once dS_out is known; a transition needs none, because S_in and dS_out are known

The schedule in `ops/recurrence.py` is written once for every implementation: `reference/` in torch, which is the
specification, `gpu/linear.py` in Triton and `gpu/fla_delta.py` by the passes of fla-core.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .pieces import Spans


class Inputs(NamedTuple):
    """What a recurrence reads, and in the same form the gradients. The bonus is linear attention's, beta the delta
    rule's."""

    q: Tensor  # [B,T,G,K]
    k: Tensor  # [B,T,G,K]
    v: Tensor  # [B,T,H,V]
    g: Tensor | None = None  # log decays [B,T,H] or [B,T,H,K]
    beta: Tensor | None = None  # [B,T,H]
    bonus: Tensor | None = None  # [H,K]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same in another dtype."""
        q, k, v = (part.to(dtype) for part in self[:3])
        return Inputs(q, k, v, *(None if part is None else part.to(dtype) for part in self[3:]))


class Gradients(NamedTuple):
    """Gradients of `Inputs` but the bonus; None where an input is None, or where `intra_backward` has given it."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None


class AffineState(NamedTuple):
    """S_out = A S_in + state [..., H, K, V]; transition is a log None | [..., H] | [..., H, K], or A [..., H, K, K]."""

    transition: Tensor | None
    state: Tensor


class Options(NamedTuple):
    """How a call is to be computed."""

    scale: float
    entered: bool  # states enter the spans, or somebody reads what the spans do to a state
    dtype: torch.dtype  # of o, as far as an implementation can round there


W = TypeVar("W")  # what one forward phase hands to the next
M = TypeVar("M", bound=tuple[Tensor | None, ...])  # the named tensors of the forward that backward needs
R = TypeVar("R")  # what inter_backward hands to intra_backward
L = TypeVar("L")  # what intra_backward hands to states_backward


class Phases(Protocol[W, M, R, L]):
    """The arithmetic of one call. Every method is a plain function of tensors, outside autograd.

    PADDING      columns that v is widened by for a normaliser, of which the first is used
    q_in_states  whether `states_backward` gives the gradient of q, instead of `intra_backward`
    """

    PADDING: ClassVar[int]
    q_in_states: ClassVar[bool]

    def states_forward(self, x: Inputs) -> tuple[AffineState | None, W]:
        """The pairs of this rank's spans, state [s,B,H,K,V]; None unless `Options.entered`."""

    def intra_forward(self, x: Inputs, work: W) -> tuple[Tensor, W]:
        """The part of o [B,T,H,V] that this rank's tokens give; `inter_forward` may still scale it."""

    def inter_forward(self, x: Inputs, work: W, o_intra: Tensor, S_in: Tensor | None) -> tuple[Tensor, M]:
        """o, which may take the place of o_intra, and what backward needs. S_in [s,B,H,K,V]; None: no state enters."""

    def inter_backward(self, do: Tensor, x: Inputs, saved: M, S_in: Tensor | None) -> tuple[Tensor | None, R]:
        """dS_in, for which other ranks wait."""

    def intra_backward(self, read: R) -> tuple[Tensor | None, Tensor | None, L]:
        """The gradients of q (unless `q_in_states`) and of the bonus."""

    def states_backward(self, local: L, dS_out: Tensor | None) -> Gradients:
        """All other gradients, given dS_out [s,B,H,K,V]; None: nothing reads the states that leave the spans."""


class Recurrence(Protocol):
    """An implementation: `prepare` makes the phases of one call, and the inputs in the dtypes and forms they take."""

    PADDING: ClassVar[int]

    @classmethod
    def prepare(cls, x: Inputs, spans: Spans, options: Options) -> tuple[Phases[Any, Any, Any, Any], Inputs]: ...
