"""The registry: specs by name, and the errors for what is not in it."""

from __future__ import annotations

import re

import pytest

from layers.mixers.gla import GLASpec
from layers.registry import BlockContext, mixer_spec


def test_a_spec_is_its_options() -> None:
    assert mixer_spec("gla", expand_k=1, gate_rank=8) == GLASpec(expand_k=1.0, gate_rank=8)
    assert isinstance(mixer_spec("gla", expand_k=1).expand_k, float)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retnetion", {}, "unknown mixer 'retnetion'; did you mean 'retention'? known: "),
        ("zzz", {}, "unknown mixer 'zzz'; known: "),
        (
            "gla",
            {"expandk": 1.0},
            "option 'expandk' of mixer 'gla'; did you mean 'expand_k'? known:",
        ),
        ("rwkv6", {"window": 3}, "unknown option 'window' of mixer 'rwkv6'; known: decay_rank, shift_rank"),
        ("gla", {"expand_k": "0.5"}, "option 'expand_k' of mixer 'gla' is '0.5', a str; it must be a float"),
        ("gla", {"expand_k": True}, "is True, a bool; it must be a float, such as the default 0.5"),
        ("gla", {"gate_rank": 1.5}, "is 1.5, a float; it must be a int, such as the default 16"),
        ("gla", {"gate_rank": 0}, "gate_rank of gla is 0; it must be at least 1"),
        ("gla", {"temperature": 0}, "temperature of gla is 0.0; it must be greater than 0"),
        ("delta_net", {"conv": -1}, "conv of delta_net is -1; it must be at least 0"),
        ("linear", {"conv": 2.0}, "option 'conv' of mixer 'linear' is 2.0, a float; it must be a int"),
        ("gated_delta_net", {"heads": -1}, "heads of gated_delta_net is -1; it must be at least 0"),
        ("gated_delta_net", {"key_heads": -1}, "key_heads of gated_delta_net is -1; it must be at least 0"),
        ("kda", {"gate_rank": -1}, "gate_rank of kda is -1; it must be at least 0"),
        ("kda", {"gate_lower_bound": 5}, "gate_lower_bound of kda is 5.0; it must be below 0, such as -5, or 0 for"),
        ("kda", {"full_rank": "gate"}, "unknown full_rank 'gate' of mixer 'kda'; known: both, none, output"),
        ("kda", {"negative_eigenvalues": 1}, "is 1, a int; it must be a bool, such as the default False"),
        ("mamba2", {"state": 0}, "state of mamba2 is 0; it must be at least 1"),
        ("mamba2", {"groups": 0}, "groups of mamba2 is 0; it must be at least 1"),
        ("linear", {"feature_map": "elu"}, "unknown feature map 'elu'; did you mean 'relu'? known: elu+1, identity,"),
        ("linear", {"normalize": True}, "features, which must not be negative"),
        ("based", {"feature_dim": 0}, "feature_dim of based is 0; it must be at least 1"),
        ("rebased", {"feature_dim": 1}, "feature_dim of rebased is 1; it must be at least 2"),
        (
            "hgrn2",
            {"lower_bound": "fix"},
            "unknown lower bound 'fix'; did you mean 'fixed'? known: fixed, learned, none",
        ),
        ("rwkv6", {"shift_rank": 0}, "shift_rank of rwkv6 is 0; it must be at least 1"),
        ("rwkv6", {"decay_rank": -1}, "decay_rank of rwkv6 is -1; it must be at least 1"),
        ("softmax", {"rope_fraction": 1.5}, "rope_fraction is 1.5; it must be between 0 (NoPE) and 1"),
        ("softmax", {"gate": "heads"}, "unknown gate 'heads'; did you mean 'head'? known: channel, head, none"),
        ("sliding_window", {"gate": "heads"}, "unknown gate 'heads'; did you mean 'head'? known: channel, head, none"),
        ("short_conv", {"conv": 0}, "conv of short_conv is 0; it must be at least 1"),
        ("gated_delta_product", {"steps": 0}, "steps of gated_delta_product is 0; it must be at least 1"),
        ("sliding_window", {"window": 0}, "window of sliding_window is 0; it must be at least 1"),
    ],
)
def test_errors_say_what_is_allowed(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer_spec(name, **options)


def test_heads_share_the_channels_evenly() -> None:
    context = BlockContext(dim=24, heads=4, kv_heads=2, layer=0, depth=1, norm_eps=1e-6, rope_base=1e4)
    assert context.width() == 6
    assert context.width(2.0) == 12
    with pytest.raises(ValueError, match="dim 24 with expand_k 0.4 is 9.6 channels, which 4 heads cannot share evenly"):
        context.width(0.4, option="expand_k")
    with pytest.raises(ValueError, match="is 2.4 channels"):
        context.width(0.1)
    own = context.resized(2, 5)
    assert own.width() == 5 and own.width(2.0) == 10 and own.dim == 24
    with pytest.raises(ValueError, match="head_dim 5 with expand_k 0.5 is 5 channels, which 2 heads cannot share"):
        own.width(0.5, option="expand_k")
    with pytest.raises(ValueError, match="gives each of 4 heads 3 channels"):
        BlockContext(dim=12, heads=4, kv_heads=2, layer=0, depth=1, norm_eps=1e-6, rope_base=1e4).width(even=True)


def test_channels_that_rotate_are_pairs() -> None:
    context = BlockContext(dim=24, heads=4, kv_heads=2, layer=0, depth=1, norm_eps=1e-6, rope_base=1e4)
    with pytest.raises(ValueError, match="rope_fraction 0.5 of the 6 channels of a head is 3, which rotary embedding"):
        mixer_spec("softmax", rope_fraction=0.5).build(context)
    for fraction in (0.0, 0.5):  # an odd width needs no pairs where nothing is rotated, or fewer channels are
        mixer_spec("softmax", rope_fraction=fraction, head_dim=5 if fraction == 0 else 4).build(context)
