"""Every mixer, in the variants that the tests of this room go through, with its formula written from its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layers.registry import MixerSpec, mixer_spec
from tests.layers.formulas import attention, delta, latent, polynomial, recurrent
from tests.layers.formulas.mamba2 import mamba2
from tests.layers.formulas.parts import CONTEXT

WEIGHTS = {  # mean and spread by the end of the name; 0 and 0.5 for all others
    "norm.weight": (1.0, 0.3),
    "norm_weight": (1.0, 0.3),
    "mix_up": (0.0, 0.1),
    # Slow decays: what a state has forgotten is seen by no later token.
    "dt_bias": (-5.0, 0.5),
    "decay": (-2.0, 0.5),
    "decay_up": (0.0, 0.1),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    mixer: str
    formula: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    memory: int = 70  # tokens after which what is left of a token may be lost in rounding

    @property
    def spec(self) -> MixerSpec:
        return mixer_spec(self.mixer, **self.options)

    @property
    def told(self) -> dict[str, Any]:
        """What the formula is told: options that the weights do not show."""
        return {name: value for name, value in self.options.items() if name != "conv"}

    def __str__(self) -> str:
        return "-".join([self.mixer, *(f"{value}" for value in self.options.values())])

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The mixer built for CONTEXT, with weights that make every part of it count."""
        module = self.spec.build(CONTEXT).to(dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                mean, spread = next((pair for end, pair in WEIGHTS.items() if name.endswith(end)), (0.0, 0.5))
                weight.copy_(mean + spread * noise)
        return module


CASES = [
    Case(mixer="linear", formula=attention.linear),
    Case(mixer="linear", formula=attention.linear, options={"feature_map": "relu"}),
    Case(mixer="linear", formula=attention.linear, options={"feature_map": "elu+1", "normalize": True}),
    Case(mixer="linear", formula=attention.linear, options={"feature_map": "softmax", "normalize": True}),
    Case(mixer="linear", formula=attention.linear, options={"conv": 1}),
    Case(mixer="lightning", formula=attention.lightning),
    Case(mixer="lightning", formula=attention.lightning, options={"conv": 4}),
    Case(mixer="retention", formula=attention.retention),
    Case(mixer="retention", formula=attention.retention, options={"conv": 2}),
    Case(mixer="gla", formula=attention.gla),
    Case(mixer="gla", formula=attention.gla, options={"expand_k": 1.0, "temperature": 2.0, "conv": 3}, memory=30),
    Case(mixer="delta_net", formula=delta.delta_net),
    Case(
        mixer="delta_net",
        formula=delta.delta_net,
        options={"output_gate": True, "negative_eigenvalues": True, "expand_k": 0.5, "conv": 2},
    ),
    Case(mixer="delta_net", formula=delta.delta_net, options={"conv": 0}),
    Case(mixer="gated_delta_net", formula=delta.gated_delta_net, options={"expand_k": 0.5, "conv": 0}),
    Case(
        mixer="gated_delta_net",
        formula=delta.gated_delta_net,
        options={"heads": 2, "head_dim": 8, "expand_k": 0.5, "expand_v": 1.0},
    ),
    Case(
        mixer="gated_delta_net",
        formula=delta.gated_delta_net,
        options={"expand_k": 1.0, "key_heads": 2, "negative_eigenvalues": True},
    ),
    Case(mixer="kda", formula=delta.kda),
    Case(
        mixer="kda",
        formula=delta.kda,
        options={"expand_k": 0.5, "gate_rank": 3, "negative_eigenvalues": True, "conv": 0},
    ),
    Case(mixer="kda", formula=delta.kda, options={"gate_lower_bound": -5.0, "full_rank": "both", "key_heads": 2}),
    Case(mixer="kda", formula=delta.kda, options={"gate_lower_bound": -1.0, "full_rank": "output"}),
    Case(mixer="gated_delta_product", formula=delta.gated_delta_product, options={"expand_k": 1.0}),
    Case(
        mixer="gated_delta_product",
        formula=delta.gated_delta_product,
        options={"steps": 3, "expand_k": 0.5, "key_heads": 2, "negative_eigenvalues": False, "conv": 2},
    ),
    Case(mixer="comba", formula=delta.comba, options={"expand_k": 1.0}),
    Case(mixer="comba", formula=delta.comba_by_errors, options={"expand_k": 0.5, "expand_v": 1.0, "conv": 0}),
    Case(mixer="short_conv", formula=recurrent.short_conv, memory=3),
    Case(mixer="short_conv", formula=recurrent.short_conv, options={"conv": 7}, memory=7),
    Case(mixer="mamba2", formula=mamba2, options={"state": 8}),
    Case(mixer="mamba2", formula=mamba2, options={"expand": 1.0, "state": 5, "groups": 2, "conv": 0}),
    Case(mixer="mamba2", formula=mamba2, options={"expand": 1.0, "state": 3, "norm": False}),
    Case(mixer="softmax", formula=attention.softmax),
    Case(
        mixer="softmax",
        formula=attention.softmax,
        options={"head_dim": 8, "qk_norm": True, "rope_fraction": 0.25, "gate": "channel"},
    ),
    Case(
        mixer="softmax",
        formula=attention.softmax,
        options={"rope_fraction": 0.0, "gate": "head", "sinks": True, "conv": 3},
    ),
    Case(mixer="mla", formula=latent.mla),
    Case(
        mixer="mla",
        formula=latent.mla,
        options={"head_dim": 5, "value_dim": 3, "rope_dim": 4, "rotate": False, "gate": "channel"},
    ),
    Case(
        mixer="mla", formula=latent.mla, options={"head_dim": 4, "rank": 7, "q_rank": 9, "rope_dim": 2, "gate": "head"}
    ),
    Case(mixer="sliding_window", formula=attention.sliding_window),
    Case(mixer="sliding_window", formula=attention.sliding_window, options={"window": 5}),
    Case(
        mixer="sliding_window",
        formula=attention.sliding_window,
        options={"window": 7, "head_dim": 4, "rope_fraction": 0.5, "gate": "head", "sinks": True, "qk_norm": True},
    ),
    Case(mixer="sliding_window", formula=attention.sliding_window, options={"conv": 2, "gate": "channel"}),
    Case(mixer="sliding_window", formula=attention.sliding_window, options={"window": 1}),
    Case(mixer="based", formula=polynomial.based),
    Case(mixer="based", formula=polynomial.based, options={"feature_dim": 3, "conv": 3}),
    Case(mixer="rebased", formula=polynomial.rebased),
    Case(mixer="rebased", formula=polynomial.rebased, options={"feature_dim": 3, "conv": 2}),
    Case(mixer="hgrn2", formula=recurrent.hgrn2),
    Case(mixer="hgrn2", formula=recurrent.hgrn2, options={"lower_bound": "fixed", "conv": 4}),
    Case(mixer="hgrn2", formula=recurrent.hgrn2, options={"lower_bound": "none"}, memory=20),
    Case(mixer="rwkv6", formula=recurrent.rwkv6),
    Case(mixer="rwkv6", formula=recurrent.rwkv6, options={"shift_rank": 3, "decay_rank": 5}),
]


def tokens(count: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    """Input of a mixer built for CONTEXT."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, count, CONTEXT.dim, generator=generator, dtype=torch.float64).to(dtype)
