"""Every mixer, in the variants that the tests of this room go through, with its formula written from its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layers.registry import mixer_spec
from tests.layers.formulas import attention, delta, latent, polynomial, recurrent, window
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

    def __str__(self) -> str:
        return "-".join([self.mixer, *(f"{value}" for value in self.options.values())])

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The mixer built for CONTEXT, with weights that make every part of it count."""
        module = mixer_spec(self.mixer, **self.options).build(CONTEXT).to(dtype)
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
    Case(mixer="lightning", formula=attention.lightning),
    Case(mixer="retention", formula=attention.retention),
    Case(mixer="gla", formula=attention.gla),
    Case(mixer="gla", formula=attention.gla, options={"expand_k": 1.0, "temperature": 2.0}),
    Case(mixer="delta_net", formula=delta.delta_net),
    Case(
        mixer="delta_net",
        formula=delta.delta_net,
        options={"output_gate": True, "negative_eigenvalues": True, "expand_k": 0.5, "conv": 2},
    ),
    Case(mixer="gated_delta_net", formula=delta.gated_delta_net, options={"expand_k": 0.5}),
    Case(
        mixer="gated_delta_net",
        formula=delta.gated_delta_net,
        options={"expand_k": 1.0, "key_heads": 2, "negative_eigenvalues": True},
    ),
    Case(mixer="kda", formula=delta.kda),
    Case(
        mixer="kda",
        formula=delta.kda,
        options={"expand_k": 0.5, "gate_rank": 3, "negative_eigenvalues": True},
    ),
    Case(mixer="mamba2", formula=mamba2, options={"state": 8}),
    Case(mixer="mamba2", formula=mamba2, options={"expand": 1.0, "state": 5, "groups": 2}),
    Case(mixer="softmax", formula=attention.softmax),
    Case(mixer="mla", formula=latent.mla),
    Case(
        mixer="mla",
        formula=latent.mla,
        options={"head_dim": 5, "value_dim": 3, "rope_dim": 4, "rotate": False, "gate": "channel"},
    ),
    Case(
        mixer="mla", formula=latent.mla, options={"head_dim": 4, "rank": 7, "q_rank": 9, "rope_dim": 2, "gate": "head"}
    ),
    Case(mixer="sliding_window", formula=window.sliding_window),
    Case(mixer="sliding_window", formula=window.sliding_window, options={"window": 5}),
    Case(mixer="sliding_window", formula=window.sliding_window, options={"window": 1}),
    Case(mixer="based", formula=polynomial.based),
    Case(mixer="based", formula=polynomial.based, options={"feature_dim": 3}),
    Case(mixer="rebased", formula=polynomial.rebased),
    Case(mixer="rebased", formula=polynomial.rebased, options={"feature_dim": 3}),
    Case(mixer="hgrn2", formula=recurrent.hgrn2),
    Case(mixer="hgrn2", formula=recurrent.hgrn2, options={"lower_bound": "fixed"}),
    Case(mixer="hgrn2", formula=recurrent.hgrn2, options={"lower_bound": "none"}, memory=20),
    Case(mixer="rwkv6", formula=recurrent.rwkv6),
    Case(mixer="rwkv6", formula=recurrent.rwkv6, options={"shift_rank": 3, "decay_rank": 5}),
]


def tokens(count: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    """Input of a mixer built for CONTEXT."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, count, CONTEXT.dim, generator=generator, dtype=torch.float64).to(dtype)
