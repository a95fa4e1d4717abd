"""The RWKV-6 time mixing of Finch (arXiv 2404.05892, section 4.2).

    x^i_t = x_t + (x_(t-1) - x_t) * (mu_i + tanh(m_t A_i) B_i)      for i in w, k, v, r, g;  B_i [shift_rank, D]
            where m_t = x_t + (x_(t-1) - x_t) * mu
    log a_t = -exp(w + tanh(x^w_t A) B)                             [K] per head;  B [decay_rank, H*K]
    o_t = r_t (S_(t-1) + diag(u) k_t^T v_t)        S_t = diag(a_t) S_(t-1) + k_t^T v_t        not scaled
    y_t = (LayerNorm(o_t) * silu(g_t)) W_o         r, k, v, g = x^r W_r, x^k W_k, x^v W_v, x^g W_g

Only the bonus u lets a token read its own key and value. The token before the first of a document is zero.
The norm is per head, with weight and bias. Its eps is K times the model's, as for a norm of o / sqrt(K): the authors'
64e-5 is 1e-5 for heads of 64 channels. All parameters but those of nn.Linear start as in RWKV-LM, version x060.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import hybrid_sp as hsp
from hybrid_sp.shard import Shard
from layers.cache import LayerCache, require_one_device
from layers.cost import Cost, Halo, Summary, count_parameters
from layers.precision import keep_wide
from layers.registry import BlockContext, MixerSpec, at_least, register

MIXED = "wkvrg"  # the five inputs, in the order of mix, mix_down and mix_up


@register("rwkv6")
@dataclass(frozen=True, kw_only=True)
class RWKV6Spec(MixerSpec):
    shift_rank: int = 32
    decay_rank: int = 64

    def __post_init__(self) -> None:
        at_least(1, "rwkv6", shift_rank=self.shift_rank, decay_rank=self.decay_rank)

    def build(self, context: BlockContext) -> RWKV6Mixer:
        return RWKV6Mixer(self, context)


class RWKV6Mixer(nn.Module):
    _apply = keep_wide("decay")

    def __init__(self, spec: RWKV6Spec, context: BlockContext) -> None:
        super().__init__()
        dim, heads, width = context.dim, context.heads, context.width()
        self.heads, self.depths = heads, (context.layer, context.depth)
        self.backend = context.backend_of("linear_attention")
        self.norm_eps = width * context.norm_eps
        self.mix_first = nn.Parameter(torch.empty(dim))  # mu
        self.mix = nn.Parameter(torch.empty(len(MIXED) * dim))  # mu_i, flat, so that it does not count as a matrix
        self.mix_down = nn.Parameter(torch.empty(dim, len(MIXED), spec.shift_rank))
        self.mix_up = nn.Parameter(torch.empty(len(MIXED), spec.shift_rank, dim))
        self.decay = nn.Parameter(torch.empty(dim))  # w
        self.decay_down = nn.Parameter(torch.empty(dim, spec.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(spec.decay_rank, dim))
        self.bonus = nn.Parameter(torch.empty(dim))  # u
        self.receptance, self.key, self.value, self.gate = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.output = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters but those of nn.Linear. Later channels mix less and forget faster."""
        (layer, depth), dim = self.depths, len(self.decay)
        late, early = layer / max(depth - 1, 1), 1 - layer / depth
        channel = torch.arange(dim, dtype=torch.float64)
        ramp, share = channel / max(dim - 1, 1), channel / dim
        self.mix_first.copy_(1 - share**early)
        begin = {i: 1 - share**early for i in "wk"} | {i: 1 - share ** (early / 2) for i in "rg"}
        begin["v"] = 1 - share**early - 0.3 * late
        self.mix.copy_(torch.cat([begin[i] for i in MIXED]))
        self.decay.copy_(-6 + 5 * ramp ** (0.7 + 1.3 * late))
        self.bonus.copy_(late * (1 - ramp) + 0.1 * ((channel + 1) % 3 - 1))
        for down, up in ((self.mix_down, self.mix_up), (self.decay_down, self.decay_up)):
            down.zero_()  # mixing and decay do not depend on the token yet
            up.copy_(0.02 * torch.rand(up.shape, generator=generator, dtype=torch.float32) - 0.01)
        self.norm_weight.fill_(1.0)
        self.norm_bias.zero_()

    def init_cache(self, batch: int) -> LayerCache:
        """Make a cache of zeros: the token before the first, [B,1,D] in the model's dtype, and a state."""
        weight, dim = self.output.weight, len(self.bonus)
        dtype, width = torch.promote_types(weight.dtype, torch.float32), dim // self.heads
        state = weight.new_zeros(batch, self.heads, width, width, dtype=dtype)
        return LayerCache(position=0, tensors=(weight.new_zeros(batch, 1, dim), state))

    def cost(self) -> Cost:
        """Add the cost of the recurrence and the token shift to the mixer's parameters."""
        dim, width = len(self.bonus), len(self.bonus) // self.heads
        return count_parameters(self) + Cost(
            recurrence_flops=4 * dim * width + 2 * dim,  # S + k^T v and r S; r (u k)
            state=dim * width,
            summaries=(Summary(heads=self.heads, key=width, value=width, transition="vector", gates=width),),
            halos=(Halo(tokens=1, channels=dim),),
        )

    def forward(
        self, x_BTD: Tensor, shard: Shard | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        require_one_device(shard, cache)
        if cache is None:
            recur, g_BTHV = self._recurrence(hsp.linear_attention, x_BTD, self._before(x_BTD, shard))
            return self._output(recur(shard=shard), g_BTHV), None
        before_BTD, last_B1D = hsp.token_shift(x_BTD, initial_state=cache.tensors[0], return_final_state=True)
        recur, g_BTHV = self._recurrence(hsp.linear_attention, x_BTD, before_BTD)
        o_BTHV, S_BHKV = recur(initial_state=cache.tensors[1], return_final_state=True)
        return self._output(o_BTHV, g_BTHV), cache.extended(x_BTD.shape[1], last_B1D, S_BHKV)

    def start(self, x_BTD: Tensor, shard: Shard | None) -> Callable[[], Tensor]:
        """Compute and send what other ranks need, and return a function that computes the output."""
        recur, g_BTHV = self._recurrence(hsp.linear_attention.start, x_BTD, self._before(x_BTD, shard))
        started = recur(shard=shard)
        return lambda: self._output(started.finish(), g_BTHV)

    def _before(self, x_BTD: Tensor, shard: Shard | None) -> Tensor:
        """Fetch the token before each token, from another rank at the start of a span."""
        before_BTD = hsp.token_shift(x_BTD, shard=shard)
        assert isinstance(before_BTD, Tensor)
        return before_BTD

    def _recurrence(self, operator: Any, x_BTD: Tensor, before_BTD: Tensor) -> tuple[Callable[..., Any], Tensor]:
        """Return the recurrence over x, in which each token is mixed with the one before it, and the output's gate."""
        w, k, v, r, g = self.mixed(x_BTD, before_BTD)
        channels = self.receptance(r), self.key(k), self.value(v), self.gate(g), self.log_decay(w)
        r_BTHK, k_BTHK, v_BTHV, g_BTHV, log_decay_BTHK = (
            rearrange(x, "b t (h k) -> b t h k", h=self.heads) for x in channels
        )
        options = {"log_decay": log_decay_BTHK, "bonus": self.bonus.view(self.heads, -1), "scale": 1.0}
        return partial(operator, r_BTHK, k_BTHK, v_BTHV, **options, backend=self.backend), g_BTHV

    def _output(self, o_BTHV: Tensor, g_BTHV: Tensor) -> Tensor:
        """Apply norm and gate to each head, and write to the residual stream."""
        weight_HV, bias_HV = (x.view(self.heads, -1) for x in (self.norm_weight, self.norm_bias))
        o_BTHV = F.layer_norm(o_BTHV, o_BTHV.shape[-1:], eps=self.norm_eps) * weight_HV + bias_HV
        return self.output(rearrange(o_BTHV * F.silu(g_BTHV), "b t h v -> b t (h v)"))

    def mixed(self, x_BTD: Tensor, before_BTD: Tensor) -> tuple[Tensor, ...]:
        """Mix every token with the one before it: return x^i [B,T,D] for each i in MIXED."""
        step_BTD = before_BTD - x_BTD
        rank_BTIR = torch.tanh(torch.einsum("btd,dir->btir", x_BTD + step_BTD * self.mix_first, self.mix_down))
        share_BTID = self.mix.view(len(MIXED), -1) + torch.einsum("btir,ird->btid", rank_BTIR, self.mix_up)
        return (x_BTD[:, :, None] + step_BTD[:, :, None] * share_BTID).unbind(2)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """Return the log decay [B,T,H*K], below 0, in at least fp32."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        logit_BTD = torch.tanh(x_BTD @ self.decay_down) @ self.decay_up
        logit_BTD = self.decay.to(wide) + logit_BTD.to(wide)
        return -torch.exp(logit_BTD.clamp(max=50.0))  # a larger logit is a decay of 0 too, but infinite in fp32
