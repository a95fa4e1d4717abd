"""The block: a mixer moves information between tokens, then an MLP works on each token; both add to the residual."""

from __future__ import annotations

from torch import Tensor, nn

from hybrid_sp.shard import Shard
from layers.cache import LayerCache
from layers.cost import Cost, count_parameters
from layers.mlp import SwiGLU
from layers.registry import BlockContext, Mixer, MixerSpec


class Block(nn.Module):
    """Compute x + mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)).

    The norms are torch's. They compute in fp32 (fp64 for fp64) and round once to the dtype of their input.
    """

    def __init__(self, spec: MixerSpec, context: BlockContext, mlp_dim: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(context.dim, eps=context.norm_eps)
        self.mixer: Mixer = spec.build(context)
        self.mlp_norm = nn.RMSNorm(context.dim, eps=context.norm_eps)
        self.mlp = SwiGLU(context.dim, mlp_dim)

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        mixed_BTD, cache = self.mixer(self.mixer_norm(x_BTD), shard, cache)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache

    def cost(self) -> Cost:
        """Add the costs of the mixer, the MLP and the norms."""
        return self.mixer.cost() + count_parameters(self.mixer_norm, self.mlp_norm, self.mlp)
