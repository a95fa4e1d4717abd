"""The sliding-window softmax mixer: attention to the last `window` tokens, itself included (arXiv 2004.05150).

    y_t = (sum over t - window < s <= t of softmax_s(R(q_t) . R(k_s) / sqrt(K)) v_s) W_o

The source is Longformer. R, the key-value heads and all other options are those of softmax attention. Its letter is L,
that of linear mixers, because its cost and memory per token do not grow with the length. A ratio therefore mixes it
with full softmax, as Gemma 2 does (arXiv 2408.00118). A list of names mixes it with a recurrence, as Based does (arXiv
2402.18668).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layers.mixers.softmax import SoftmaxMixer, SoftmaxSpec
from layers.registry import BlockContext, at_least, register


@register("sliding_window")
@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec(SoftmaxSpec):
    letter: ClassVar[str] = "L"
    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "sliding_window", window=self.window)

    def build(self, context: BlockContext) -> SoftmaxMixer:
        return SoftmaxMixer(self, context.resized(0, self.head_dim), self.window)
