"""Attention whose weights are a polynomial of q . k, from its weights: dense, without features and without a state."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.layers.formulas.parts import CONTEXT, Weights, projected


def based(w: Weights, x: Tensor, feature_dim: int = 16) -> Tensor:
    q, k, v = projected(w, x, (4, feature_dim), (4, feature_dim), (4, 6))
    products = torch.einsum("bihd,bjhd->bijh", q, k) / feature_dim**0.5
    return averaged(1 + products + products**2 / 2, v) @ w["output.weight"].T


def rebased(w: Weights, x: Tensor, feature_dim: int = 16) -> Tensor:
    q, k, v = projected(w, x, (4, feature_dim), (4, feature_dim), (4, 6))
    gamma, beta = (w[name].unflatten(0, (2, 4, feature_dim)) for name in ("rule.gamma", "rule.beta"))
    q = layer_norm(q) * gamma[0] + beta[0]
    k = layer_norm(k) * gamma[1] + beta[1]
    products = torch.einsum("bihd,bjhd->bijh", q, k)
    return averaged(products**2 / feature_dim, v) @ w["output.weight"].T


def averaged(weights: Tensor, v: Tensor) -> Tensor:
    """The mean of the values up to each token, weighed by weights [B,T,T,H]; heads beside one another."""
    seen = weights * torch.ones(v.shape[1], v.shape[1], dtype=v.dtype).tril()[:, :, None]
    total = torch.einsum("bijh,bjhv->bihv", seen, v)
    return (total / (seen.sum(2)[..., None] + 1e-10)).flatten(2)


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + CONTEXT.norm_eps).sqrt()
