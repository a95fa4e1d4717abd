"""The balance of the experts' load over all ranks: an auxiliary loss, and a bias that needs no gradient.

In one pass over tokens of the whole mesh dp x sp, c_le counts the tokens of expert e in block l, and p_le sums its
probabilities. N is the number of tokens, K of experts per token, and m of valid labels. The loss of a step is

    (sum of cross-entropies + sum over passes of m * a * sum over l, e of E * c_le / (K N) * p_le / N) / sum of m

where a is `moe.auxiliary` (Switch, arXiv 2101.03961, equations 4 to 6). The counts have no gradient, and p_le is a sum
over tokens. A rank therefore adds the same term with its own part of p_le to its own cross-entropies. `sum_gradients`
sums these parts over ranks and divides once, and the gradient is that of the statistics of all ranks.

After a step, b_le grows by `moe.bias_rate` if c_le, summed over the passes, is below the mean over experts, and
shrinks by it if above (arXiv 2408.15664, algorithm 1). Counts are integers, so that the bias is equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_sp.comm import collectives
from hybrid_sp.comm.groups import Group
from layers.model import HybridLM
from layers.moe import MoE, Routing


class Balance:
    """Hold the balance of the experts of a model over a group of ranks that holds the whole batch.

    `needed` tells whether the model has experts with a balance. If not, a step costs no message.
    """

    def __init__(self, model: HybridLM, group: Group) -> None:
        self.experts = [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]
        self.group = group
        self.needed = any(one.config.bias_rate or one.config.auxiliary for one in self.experts)
        self.counts_LE: Tensor | None = None  # of the step, over all ranks

    def loss(self, routing: Sequence[Routing], valid: Tensor) -> Tensor:
        """Return this rank's part of m times the auxiliary loss; add it to the sum of cross-entropies of the same pass.

        valid  the number of valid labels on this rank, an integer tensor
        """
        local_LE = torch.stack([one.counts_E for one in routing])
        message = torch.cat([local_LE.flatten(), valid.reshape(1).to(local_LE.dtype)])
        message = collectives.all_reduce(message, self.group, tag="routing")
        counts_LE, m = message[:-1].view_as(local_LE), message[-1].double()
        self.counts_LE = counts_LE if self.counts_LE is None else self.counts_LE + counts_LE
        config = self.experts[0].config
        p_LE = torch.stack([one.probabilities_E for one in routing])
        pairs = counts_LE.sum(-1, keepdim=True).to(p_LE.dtype)  # K N
        shares_LE = counts_LE / pairs * (config.active / pairs)
        return config.auxiliary * config.experts * m * (shares_LE * p_LE).sum()

    def busiest(self) -> Tensor:
        """Return the load of the busiest expert of all blocks in this step, over the mean load of its block."""
        counts_LE = self._counts()
        return (counts_LE * counts_LE.shape[-1] / counts_LE.sum(-1, keepdim=True).double()).max()

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by the counts of the step, and begin to count anew."""
        counts_LE, self.counts_LE = self._counts(), None
        above_LE = torch.sign(counts_LE * counts_LE.shape[-1] - counts_LE.sum(-1, keepdim=True))
        for one, above_E in zip(self.experts, above_LE, strict=True):
            if one.config.bias_rate:
                one.bias -= one.config.bias_rate * above_E.to(one.bias.dtype)

    def _counts(self) -> Tensor:
        assert self.counts_LE is not None, "no loss was computed since the last step"
        return self.counts_LE
