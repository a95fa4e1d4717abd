"""The mixers, one a file. This list is what makes them known to the registry."""

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
    rebased,
    retention,
    rwkv6,
    sliding_window,
    softmax,
)
