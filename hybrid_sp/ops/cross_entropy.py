"""The cross-entropy of a language model in chunks of tokens, without the logits of a whole sequence.

The losses of tokens are independent, so nothing is communicated: each rank sums the losses of its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sp.shard import NO_LABEL


def cross_entropy(x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Sum -log softmax(x W^T)[label] over the tokens whose label is not -100, and count these tokens.

    x_BTD and weight_VD share a dtype; labels_BT are integers in [0, V) or -100. The sum is in fp32 (fp64 for fp64). It
    has a graph even if no token is valid. At most `chunk` rows of logits exist at a time: the forward pass takes the
    gradients of a chunk while its logits exist, and the backward pass only scales them.
    """
    if not torch.is_grad_enabled():
        x_BTD, weight_VD = x_BTD.detach(), weight_VD.detach()
    loss = _ChunkedCrossEntropy.apply(x_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), chunk)
    return loss, (labels_BT != NO_LABEL).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        loss = torch.zeros((), device=x_ND.device, dtype=wide)
        dx_ND = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x_ND), chunk):
            # 1. Log-probabilities of a chunk. A token without a label takes label 0 and is masked.
            rows = slice(start, start + chunk)
            valid_C1 = (labels_N[rows] != NO_LABEL)[:, None]
            labels_C1 = labels_N[rows, None].where(valid_C1, 0)
            log_p_CV = (x_ND[rows] @ weight_VD.T).to(wide).log_softmax(dim=-1)
            loss -= log_p_CV.gather(1, labels_C1).where(valid_C1, 0).sum()
            if dx_ND is None and dweight_VD is None:
                continue
            # 2. Gradients of the chunk: the logits get softmax - one-hot.
            dlogits_CV = log_p_CV.exp_().scatter_add_(1, labels_C1, -torch.ones_like(labels_C1, dtype=wide))
            dlogits_CV = (dlogits_CV * valid_C1).to(x_ND.dtype)
            if dx_ND is not None:
                torch.mm(dlogits_CV, weight_VD, out=dx_ND[rows])
            if dweight_VD is not None:
                dweight_VD += dlogits_CV.T @ x_ND[rows]
        ctx.save_for_backward(dx_ND, dweight_VD)
        ctx.dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dweight_VD = ctx.saved_tensors
        if dx_ND is not None:
            dx_ND = (dx_ND * dloss).to(dx_ND.dtype)
        if dweight_VD is not None:
            dweight_VD = (dweight_VD * dloss).to(ctx.dtype)
        return dx_ND, dweight_VD, None, None
