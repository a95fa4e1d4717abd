"""Run AdamW on master copies of the weights, with a scheduled learning rate and clipping over the whole mesh."""

from __future__ import annotations

import math

import torch
from torch import nn

from recipes.config import OptimConfig

MASTERS = (torch.float32, torch.float64)  # dtypes that are their own master copy


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step (1-based) of ``steps``.

    The warm-up of w steps is lr * step / w. The schedule then is constant or a cosine that ends at min_lr:

        min_lr + (lr - min_lr) (1 + cos(pi (step - w) / (steps - w))) / 2
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / (steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


class Optimizer:
    """Run AdamW (Loshchilov and Hutter 2019, algorithm 2), with weight decay on matrices only.

    `masters` are the model's own parameters, or float32 copies of narrower ones. Gradients are accumulated, summed
    over ranks and clipped on the masters, and `step` writes the result back.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.parameters, self.buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self.masters = {
            name: p if p.dtype in MASTERS else nn.Parameter(p.detach().float()) for name, p in self.parameters.items()
        }
        groups = [
            {"params": [p for p in self.masters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.masters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        given = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(given, lr=config.lr, betas=config.betas, fused=True)
        # Create the moments now, before the first step, so that a checkpoint can be read into them.
        for p in self.masters.values():
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.adamw.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def collect(self) -> None:
        """Add the model's gradients to those of the masters; call it after every backward pass."""
        for name, p in self.parameters.items():
            master = self.masters[name]
            if master is not p and p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

    def clip(self) -> torch.Tensor:
        """Scale the masters' gradients to a global norm of at most ``clip`` and return the norm before.

        Sum the gradients over ranks first; then the norm is equal on all ranks.
        """
        limit = float("inf") if self.config.clip is None else self.config.clip
        return nn.utils.clip_grad_norm_(self.masters.values(), limit)

    def step(self, lr: float) -> None:
        """Take one AdamW step with learning rate ``lr`` and drop the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters back into the model."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return weights and moments by parameter name, in shared memory: reading into them restores the optimiser.

        The weights include the buffers of the model, which have no gradient, such as the biases that balance experts.
        """
        moments = {
            f"{name}.{key}": value for name, p in self.masters.items() for key, value in self.adamw.state[p].items()
        }
        weights = {name: p.detach() for name, p in {**self.masters, **self.buffers}.items()}
        return {"model": weights, "optimizer": moments}
