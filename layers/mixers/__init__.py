"""The mixers, one per file. Importing them here registers them."""

from layers.mixers import (  # noqa: F401
    based,
    comba,
    delta_net,
    gated_delta_net,
    gated_delta_product,
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
    short_conv,
    sliding_window,
    softmax,
)
