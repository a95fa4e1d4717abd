"""The key heads that several query or value heads share: head h reads key head h // (heads of q // key heads)."""

from __future__ import annotations

from torch import Tensor


def repeat_heads(x_BTGK: Tensor, heads: int) -> Tensor:
    """Repeat key heads up to `heads`, to [B,T,H,K]. The result is x itself if there are so many."""
    groups = x_BTGK.shape[2]
    return x_BTGK if groups == heads else x_BTGK.repeat_interleave(heads // groups, 2)


def sum_groups(x_BTHK: Tensor, groups: int) -> Tensor:
    """Sum gradients over the heads that share a key head, to [B,T,G,K]. The result is x itself if none share."""
    return x_BTHK if x_BTHK.shape[2] == groups else x_BTHK.unflatten(2, (groups, -1)).sum(3)
