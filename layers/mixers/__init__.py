"""The mixers, one per file. Importing them here registers them."""

from layers.mixers import (  # noqa: F401
    based,
    delta_net,
    gated_delta_net,
    gla,
    hgrn2,
    kda,
    lightning,
    linear,
    mamba2,
    mla,
    rebased,
    retention,
    rwkv6,
    sliding_window,
    softmax,
)
