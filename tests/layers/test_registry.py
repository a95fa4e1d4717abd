"""The registry: specs by name, and the errors for what is not in it."""

from __future__ import annotations

import re

import pytest

from layers.mixers.gla import GLASpec
from layers.registry import Place, mixer_spec


def test_a_spec_is_its_options() -> None:
    assert mixer_spec("gla", expand_k=1, gate_rank=8) == GLASpec(expand_k=1.0, gate_rank=8)
    assert isinstance(mixer_spec("gla", expand_k=1).expand_k, float)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retnetion", {}, "unknown mixer 'retnetion'; did you mean 'retention'? known: gla, lightning, linear,"),
        ("zzz", {}, "unknown mixer 'zzz'; known: gla, lightning, linear, retention, softmax"),
        (
            "gla",
            {"expandk": 1.0},
            "option 'expandk' of mixer 'gla'; did you mean 'expand_k'? known:",
        ),
        ("softmax", {"window": 3}, "unknown option 'window' of mixer 'softmax'; known: none"),
        ("gla", {"expand_k": "0.5"}, "option 'expand_k' of mixer 'gla' is '0.5', a str; it must be a float"),
        ("gla", {"expand_k": True}, "is True, a bool; it must be a float, such as the default 0.5"),
        ("gla", {"gate_rank": 1.5}, "is 1.5, a float; it must be a int, such as the default 16"),
        ("gla", {"gate_rank": 0}, "gate_rank of gla is 0; it must be greater than 0"),
        ("gla", {"temperature": 0}, "temperature of gla is 0.0; it must be greater than 0"),
        ("linear", {"feature_map": "elu"}, "unknown feature map 'elu'; did you mean 'relu'? known: elu+1, identity,"),
        ("linear", {"normalize": True}, "features, which must not be negative"),
    ],
)
def test_errors_say_what_is_allowed(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer_spec(name, **options)


def test_heads_share_the_channels_evenly() -> None:
    place = Place(dim=24, heads=4, kv_heads=2, layer=0, depth=1, norm_eps=1e-6, rope_base=1e4)
    assert place.width() == 6
    assert place.width(2.0) == 12
    with pytest.raises(ValueError, match="dim 24 with expand_k 0.4 is 9.6 channels, which 4 heads cannot share evenly"):
        place.width(0.4, option="expand_k")
    with pytest.raises(ValueError, match="is 2.4 channels"):
        place.width(0.1)
    with pytest.raises(ValueError, match="gives each of 4 heads 3 channels"):
        Place(dim=12, heads=4, kv_heads=2, layer=0, depth=1, norm_eps=1e-6, rope_base=1e4).width(even=True)
