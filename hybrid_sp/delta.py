"""Delta-rule operators whose sequence is cut over ranks (DeltaNet, Gated DeltaNet, KDA)."""

from __future__ import annotations

from torch import Tensor

from .layout import Shard


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None = None,
    shard: Shard | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_(t-1) + beta_t k_t v_t^T. Not built yet: it raises."""
    raise NotImplementedError("delta_rule is not built yet")
