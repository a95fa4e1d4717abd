"""The mixture of experts: a router sends every token to a few of many SwiGLU experts (arXiv 2101.03961, 2401.06066).

    s_t = softmax(x_t W_r), or sigmoid(x_t W_r)         scores of the E experts
    K_t = the `active` largest of s_t + b               b balances the load; it weighs nothing
    y_t = shared(x_t) + scale * sum over e in K_t of w_te expert_e(x_t)

The weight w_te is s_te, divided by the sum over K_t with `normalize`. No token is dropped. All ranks hold all experts,
and a token's output depends on that token alone, so that it is the same however the sequence is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.cost import Cost, count_parameters
from layers.mlp import SwiGLU
from layers.precision import keep_wide


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Set the experts of the blocks whose feed-forward part is a mixture of experts, and how their load is balanced."""

    experts: int = 8
    active: int = 2  # experts of a token
    dim: int | None = None  # inner width of an expert; null: that of the MLP
    shared: int = 0  # inner width of the expert that every token passes through; 0: none
    shared_gate: bool = False  # multiply that expert's output by sigmoid(x w)
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # divide the weights of a token's experts by their sum
    scale: float = 1.0  # of the weights
    bias_rate: float = 0.0  # a step's change of the bias that balances the load (arXiv 2408.15664); 0: no bias
    auxiliary: float = 0.0  # factor of the load-balancing loss (arXiv 2101.03961); 0: none

    def check(self) -> None:
        """Raise ValueError for values that make no mixture of experts."""
        for name, least in (("experts", 1), ("active", 1), ("shared", 0), ("bias_rate", 0), ("auxiliary", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"moe.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"moe.dim is {self.dim}; it must be at least 1")
        if self.active > self.experts:
            raise ValueError(f"moe.active is {self.active}; it must be at most moe.experts, which is {self.experts}")
        if self.router not in ("softmax", "sigmoid"):
            raise ValueError(f"moe.router is {self.router!r}; it must be softmax or sigmoid")
        if self.shared_gate and not self.shared:
            raise ValueError("moe.shared_gate needs a shared expert; set moe.shared to its inner width")


class Routing(NamedTuple):
    """Hold what one block's router did with the tokens of this rank.

    `counts_E` counts the tokens of each expert. `probabilities_E` sums the scores over the tokens, each token's divided
    by their sum; the auxiliary loss goes back through it.
    """

    counts_E: Tensor
    probabilities_E: Tensor


class Experts(nn.Module):
    """Apply one SwiGLU per expert to tokens that lie in the order of their experts."""

    def __init__(self, count: int, dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.input = nn.Parameter(torch.empty(count, 2 * width, dim))
        self.output = nn.Parameter(torch.empty(count, dim, width))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the matrices as those of any SwiGLU of a model with this depth."""
        for weight_EOI, share in ((self.input, 1), (self.output, 2 * self.depth)):
            draw = torch.randn(weight_EOI.shape, generator=generator, dtype=torch.float32)
            weight_EOI.copy_(draw * (weight_EOI.shape[-1] * share) ** -0.5)

    def forward(self, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        """Let expert e compute the rows before `ends_E[e]` that no earlier expert has.

        On a CPU this is a matrix product per expert. Elsewhere it is torch's grouped product, which takes bf16, fp16
        and fp32, so that the host need not know the counts.
        """
        if x_MD.device.type != "cpu":
            gate, up = _grouped(x_MD, self.input, ends_E).chunk(2, dim=-1)
            return _grouped(F.silu(gate) * up, self.output, ends_E)
        ends = ends_E.tolist()
        parts = x_MD.split([b - a for a, b in zip([0, *ends], ends, strict=False)])
        outputs = []
        for x, first, second in zip(parts, self.input.unbind(), self.output.unbind(), strict=True):
            gate, up = F.linear(x, first).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, second))
        return torch.cat(outputs)


def _grouped(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=ends_E.to(torch.int32))


class MoE(nn.Module):
    """Send every token to its experts, and return the weighted sum of their outputs with the router's statistics."""

    bias: Tensor

    def __init__(self, config: MoEConfig, dim: int, width: int, depth: int) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.router = nn.Linear(dim, config.experts, bias=False)
        if config.bias_rate:
            self.register_buffer("bias", torch.zeros(config.experts))
        self.experts = Experts(config.experts, dim, config.dim or width, depth)
        if config.shared:
            self.shared = SwiGLU(dim, config.shared)
        if config.shared_gate:
            self.shared_gate = nn.Linear(dim, 1, bias=False)

    _apply = keep_wide("bias")

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Start without a bias."""
        if self.config.bias_rate:
            self.bias.zero_()

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, -2)
        # 1. Choose the experts of every token.
        weights_NK, experts_NK, probabilities_E = self._route(x_ND)
        # 2. Sort the pairs of a token and an expert by expert; let each expert compute its tokens.
        sorted_M, order_M = experts_NK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(sorted_M, torch.arange(self.config.experts, device=x_ND.device), right=True)
        y_MD = self.experts(x_ND.index_select(0, order_M // self.config.active), ends_E)
        # 3. Undo the order, and sum over the experts of each token.
        y_NKD = y_MD.index_select(0, order_M.argsort()).unflatten(0, experts_NK.shape)
        y_ND = (weights_NK.to(y_NKD.dtype)[:, None] @ y_NKD)[:, 0]
        if self.config.shared:
            always_ND = self.shared(x_ND)
            y_ND = y_ND + (always_ND * torch.sigmoid(self.shared_gate(x_ND)) if self.config.shared_gate else always_ND)
        counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        return y_ND.view_as(x_BTD), Routing(counts_E, probabilities_E)

    def _route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights and numbers of each token's experts, and the sum over tokens of their probabilities."""
        config = self.config
        logits_NE = self.router(x_ND).to(torch.promote_types(x_ND.dtype, torch.float32))
        if config.router == "softmax":
            scores_NE = shares_NE = logits_NE.softmax(-1)
        else:
            scores_NE = logits_NE.sigmoid()
            shares_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        biased_NE = scores_NE + self.bias if config.bias_rate else scores_NE
        experts_NK = biased_NE.detach().topk(config.active, dim=-1).indices
        weights_NK = scores_NE.gather(-1, experts_NK)
        if config.normalize:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        return config.scale * weights_NK, experts_NK, shares_NE.sum(0)

    def cost(self) -> Cost:
        """Count the parameters; a token passes through those of its experts alone."""
        idle = sum(weight[0].numel() for weight in self.experts.parameters()) * (
            self.config.experts - self.config.active
        )
        return count_parameters(self) + Cost(matmul_params=-idle, idle_params=idle)
