"""The pages of documentation: their blocks of code, links and commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
ROOMS = ("hybrid_sp", "layers", "recipes", "analysis")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """Code on a page, of a language ("" if it names none), and the number of its first line."""

    page: str
    line: int
    language: str
    code: str

    def run(self) -> dict[str, Any]:
        """Run Python in a fresh namespace, which is returned; a traceback names lines of the page."""
        namespace: dict[str, Any] = {"__name__": f"{self.page}:{self.line}"}
        exec(compile("\n" * (self.line - 1) + self.code, str(ROOT / self.page), "exec", dont_inherit=True), namespace)
        return namespace


def pages() -> list[str]:
    """Paths from the root, of the pages that exist."""
    names = ["README.md", *(f"{room}/README.md" for room in ROOMS), "CONTRIBUTING.md", "CHANGELOG.md"]
    return [name for name in names if (ROOT / name).exists()]


def blocks(page: str, *languages: str) -> Iterator[Block]:
    """The fenced blocks of a page in these languages."""
    text = (ROOT / page).read_text()
    for found in FENCE.finditer(text):
        if found[1] in languages:
            yield Block(page, text.count("\n", 0, found.start(2)) + 1, found[1], found[2])


def links(page: str) -> list[str]:
    """Targets of the links and images outside blocks of code, without those to the network."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", (ROOT / page).read_text()))
    return [target for target in LINK.findall(prose) if not re.match(r"[a-z]+:", target)]
