"""The language model of linear and softmax blocks in any pattern (Linear-Llama3, arXiv 2502.07563)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hybrid_sp as hsp
from hybrid_sp.ops.cross_entropy import cross_entropy
from hybrid_sp.shard import Shard
from layers.block import Block
from layers.cache import LayerCache
from layers.config import ModelConfig, block_specs
from layers.moe import Routing

Cache = tuple[LayerCache, ...]  # one per block


class HybridLM(nn.Module):
    """Stack a token embedding, blocks, a final RMSNorm and an output head, which the config may tie to the embedding.

    `recompute` numbers the blocks under activation checkpointing: backward computes their activations again from the
    block's input. Messages from other ranks are kept, so only the baselines communicate again
    (`hybrid_sp.checkpoint_contexts`). Outputs and gradients do not change.

    On torch's meta device the model takes no memory and draws no number: `to_empty` and `init_weights` make it real.

    `to(torch.bfloat16)` leaves the parameters that make decays in fp32 (`layers.precision`).
    """

    def __init__(self, config: ModelConfig, recompute: Collection[int] = ()) -> None:
        super().__init__()
        self.config, self.recompute = config, frozenset(recompute)
        if not self.recompute <= set(range(config.depth)):
            raise ValueError(f"recompute {sorted(self.recompute)} names blocks beyond 0 to {config.depth - 1}")
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(*spec) for spec in block_specs(config)
        )
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights(seed=0)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew from the config and the seed alone, whatever the device, dtype, rank or world.

        Matrices are normal with variance 1 / inputs, and the embedding with variance 1 / dim. Matrices that write to
        the residual stream have 1 / (2 depth) of that variance, so that the stream's does not grow with the depth.
        A module draws parameters of another kind, but no submodule's, in its own `reset_parameters(generator)`.
        """
        if self.head.weight.is_meta:
            return
        generator = torch.Generator("cpu").manual_seed(seed)

        def draw(weight: Tensor, variance: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32) * variance**0.5)

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith(".output")  # the name in mixers and feed-forward parts
                draw(module.weight, 1 / module.in_features / (2 * self.config.depth if residual else 1))
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                draw(module.weight, 1 / module.embedding_dim)
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            elif (reset := getattr(module, "reset_parameters", None)) and not reset.__module__.startswith("torch."):
                reset(generator)  # torch's own methods take none and draw from the global one

    def hidden(self, tokens_BT: Tensor, shard: Shard | None = None, routing: list[Routing] | None = None) -> Tensor:
        """Return the input of the head, [B, T, D]; extend `routing` by the statistics of every block with experts."""
        x_BTD = self.embedding(tokens_BT)
        for number, block in enumerate(self.blocks):
            if number in self.recompute and torch.is_grad_enabled():
                x_BTD, _, of_block = checkpoint(
                    block, x_BTD, shard, use_reentrant=False, context_fn=hsp.checkpoint_contexts
                )
            else:
                x_BTD, _, of_block = block(x_BTD, shard)
            if routing is not None and of_block is not None:
                routing.append(of_block)
        return self.norm(x_BTD)

    def forward(self, tokens_BT: Tensor, shard: Shard | None = None) -> Tensor:
        """Return the logits [B, T, V] of the token after each of this rank's tokens."""
        return self.head(self.hidden(tokens_BT, shard))

    def loss(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        shard: Shard | None = None,
        routing: list[Routing] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropies in nats over this rank's valid labels (not -100), and count these labels.

        `routing` is extended by the statistics of every block with experts, for `layers.balance`.
        """
        return cross_entropy(self.hidden(tokens_BT, shard, routing), self.head.weight, labels_BT)

    def init_cache(self, batch: int) -> Cache:
        """Make the cache of `batch` empty sequences, from which `step` decodes."""
        return tuple(block.init_cache(batch) for block in self.blocks)

    def step(self, token_B: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Return the logits [B, V] of the next token, and a new cache that has read this one.

        The logits equal the last column of `forward` on all tokens so far. Linear blocks keep a state of constant size,
        softmax blocks keep the keys and values of every token.
        """
        return self._read(token_B[:, None], cache)

    def prefill(self, tokens_BT: Tensor) -> tuple[Tensor, Cache]:
        """Read all tokens of a prompt at once, with the result of one `step` per token from an empty cache."""
        return self._read(tokens_BT, self.init_cache(len(tokens_BT)))

    def _read(self, tokens_BT: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        x_BTD = self.embedding(tokens_BT)
        extended = []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x_BTD, kept, _ = block(x_BTD, cache=layer_cache)
            extended.append(kept)
        return self.head(self.norm(x_BTD[:, -1])), tuple(extended)
