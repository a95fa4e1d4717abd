"""The pattern of a model: the mixers and the feed-forward part of every block, from a ratio, letters or words.

A word is [COUNT*]MIXER[+MIXER ...][/FEED_FORWARD], and COUNT*(WORDS) repeats several. MIXER may be none, and
FEED_FORWARD is mlp, moe or none. The tile of all words repeats to the depth; a last word `...` lets the depth cut it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from layers.registry import MIXERS, unknown

FEED_FORWARDS = ("mlp", "moe", "none")
CUT = "..."
HYBRID_LETTERS = frozenset("LN")  # a block of a mixer and a feed-forward part
PART_LETTERS = {"M": "mamba2/none", "*": "softmax/none", "-": "none/mlp", "E": "none/moe"}  # those of Nemotron-H
COUNTED = re.compile(r"(\d{1,6})\*(.+)", re.DOTALL)
GROUP = re.compile(r"(\d{1,6})\*\(([^()]*)\)")
LONGEST = 100_000  # blocks that a count may ask for


class Layer(NamedTuple):
    """Name the parts of a block: mixers side by side, a feed-forward part, and options of the mixer in this block.

    Without a mixer, `mixers` is empty. An empty `feed_forward` is that of the model.
    """

    mixers: tuple[str, ...]
    feed_forward: str = ""
    options: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """The word of this block in a pattern."""
        return "/".join(["+".join(self.mixers) or "none", *([self.feed_forward] if self.feed_forward else [])])


def expand(pattern: Any, ratio: str, linear: str, depth: int) -> tuple[Layer, ...]:
    """Return the layer of each block. A pattern or ratio that is wrong, or does not tile the depth, raises ValueError.

    `linear` is the mixer of the blocks that a ratio or a letter L makes linear.
    """
    linear_names = [name for name, spec in MIXERS.items() if spec.letter == "L"]
    if linear not in linear_names:
        raise unknown("linear mixer", linear, linear_names)
    if depth < 1:
        raise ValueError(f"depth is {depth}; it must be at least 1")
    if pattern is None:
        tile, cut = _ratio_tile(str(ratio), linear, depth), False
    else:
        tile, cut = _pattern_tile(pattern, linear, depth)
    repeats = -(-depth // len(tile)) if cut else depth // len(tile)
    return (tile * repeats)[:depth]


def pattern_letters(names: Iterable[str]) -> str:
    """Write one letter per block, as in LLLNLLLN.

    L stands for linear mixers alone, N for a block with softmax attention in it, and - for a block without a mixer.
    """
    blocks = (name.partition("/")[0].split("+") for name in names)
    return "".join(max(MIXERS[mixer].letter if mixer in MIXERS else "-" for mixer in block) for block in blocks)


def _refuse_rest(depth: int, source: str, blocks: int, advice: str, end: str = "") -> None:
    """Raise ValueError unless a tile of this many blocks fits the depth."""
    repeats, rest = divmod(depth, blocks)
    if rest:
        depths = " or ".join(_short(n * blocks) for n in (repeats, repeats + 1) if n)
        raise ValueError(
            f"{source} is a tile of {_short(blocks)} blocks, which does not tile a depth of {depth}; "
            f"{advice}, or set depth to {depths}{end}"
        )


def _ratio_tile(text: str, linear: str, depth: int) -> tuple[Layer, ...]:
    """Spread the a softmax blocks of a ratio a/b evenly over b blocks, ending with one: 2/5 is LLNLN."""
    try:
        ratio = Fraction(text)
    except (ValueError, ZeroDivisionError):
        hint = " such as 1/4, 0 or 1"
        if parts := re.fullmatch(r"([1-9]\d?):([1-9]\d?)", text):
            linears, softmax = map(int, parts.groups())
            share = Fraction(softmax, linears + softmax)
            hint = f"; {linears} linear blocks for {softmax} of softmax attention are a ratio of {share}"
        raise ValueError(f"ratio {_short(text)!r} is not a fraction{hint}") from None
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio {_short(text)} is not a share of blocks; it must be between 0 and 1, such as 1/4")
    shares = [Fraction(softmax, depth) for softmax in range(1, depth)] or [Fraction(0), Fraction(1)]
    nearest = min(shares, key=lambda share: abs(share - ratio))
    _refuse_rest(depth, f"ratio {_short(text)}", ratio.denominator, f"the nearest ratio that does is {nearest}")
    due = [block * ratio.numerator // ratio.denominator for block in range(ratio.denominator + 1)]
    return tuple(Layer(("softmax" if b > a else linear,)) for a, b in zip(due, due[1:], strict=False))


def _pattern_tile(pattern: Any, linear: str, depth: int) -> tuple[tuple[Layer, ...], bool]:
    """Return the layers of a tile, and whether the depth may cut the last tile."""
    if not isinstance(pattern, (str, Sequence)):
        raise ValueError(
            f"pattern {_short(pattern)} is neither letters such as LLLN, nor words such as `3*gla softmax`, nor a list"
        )
    words: list[tuple[str, Any]] = []
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        if isinstance(entry, Mapping) and len(entry) == 1:
            ((text, options),) = entry.items()
            words += [(word, options) for word in _split(str(text))]
        elif isinstance(entry, str):
            words += [(word, None) for word in (_letters(entry, linear) if entry is pattern else _split(entry))]
        else:
            raise unknown("mixer in pattern", _short(entry), MIXERS)
    cut = bool(words) and words[-1][0] == CUT
    tile = tuple(layer for word, options in (words[:-1] if cut else words) for layer in _layers(word, options))
    if not tile:
        raise ValueError("pattern is empty; give letters such as LLLN or a list of mixer names, or leave it out")
    if not cut:
        letters = _short(pattern_letters(layer.name for layer in tile))
        end = f"; a last word {CUT} lets the depth cut the tile"
        _refuse_rest(depth, f"pattern {letters}", len(tile), "change it", end)
    return tile, cut


def _letters(text: str, linear: str) -> list[str]:
    """Turn letters into words, and leave what is no string of letters to `_split`."""
    bare = text.strip().removesuffix(CUT).strip()
    words = {"L": linear, "N": "softmax"} if set(bare) <= HYBRID_LETTERS else PART_LETTERS
    if set(bare) <= set(words):
        return [*(words[letter] for letter in bare), *([CUT] if text.strip().endswith(CUT) else [])]
    if bare.isalpha() and bare.isupper():
        raise ValueError(
            f"pattern {_short(text)!r} has letters other than L (linear) and N (softmax), or than M * - E, blocks of "
            "one part; mixers are named in full, as in `3*gla softmax`"
        )
    return _split(text)


def _split(text: str) -> list[str]:
    """Split words, with those in parentheses as often as their count says."""
    while group := GROUP.search(text):
        if _count(group[1]) * len(group[2]) > LONGEST:
            raise ValueError(f"pattern has {_short(group[0])}, more words than {LONGEST:,} letters")
        text = f"{text[: group.start()]} {' '.join([group[2]] * _count(group[1]))} {text[group.end() :]}"
    return text.split()


def _layers(word: str, options: Any) -> list[Layer]:
    """Read one word, with the options of its mixer or None."""
    counted = COUNTED.fullmatch(word)
    count, block = (_count(counted[1]), counted[2]) if counted else (1, word)
    names, slash, feed_forward = block.partition("/")
    mixers = () if names == "none" else tuple(names.split("+"))
    for name in mixers:
        if name not in MIXERS:
            raise unknown("mixer in pattern", _short(name), [*MIXERS, "none"] if "/" in block else MIXERS)
    if len(set(mixers)) < len(mixers):
        raise ValueError(f"pattern has {_short(block)}, the same mixer twice in a block; give that mixer more heads")
    if slash and feed_forward not in FEED_FORWARDS:
        raise unknown("feed-forward in pattern", _short(feed_forward), FEED_FORWARDS)
    if not mixers and feed_forward == "none":
        raise ValueError("pattern has none/none, a block of nothing; leave it out")
    if options is not None and not (isinstance(options, Mapping) and len(mixers) == 1):
        raise ValueError(
            f"pattern has options {_short(options)} for {_short(block)}; they are {{MIXER: {{OPTION: VALUE}}}} for one "
            "mixer, and for mixers side by side they stand in model.mixers"
        )
    return [Layer(mixers, feed_forward, dict(options or {}))] * count


def _count(text: str) -> int:
    if not 1 <= int(text) <= LONGEST:
        raise ValueError(f"pattern has {text}*, which must be a count from 1 to {LONGEST:,}")
    return int(text)


def _short(value: object) -> str:
    """Shorten a value for a message to its first 40 characters."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
