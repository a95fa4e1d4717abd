"""The pages of documentation: their Python runs, their links lead somewhere, and their commands exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pages import ROOMS, ROOT, Block, blocks, links, pages
from tests.test_prose import LONGEST, long_sentences

PYTHON = {f"{block.page}:{block.line}": block for page in pages() for block in blocks(page, "python")}


def run(block: Block, *launcher: str, folder: Path) -> str:
    """What the block prints as a program of its own, in an empty folder."""
    program = folder / "program.py"
    program.write_text("\n" * (block.line - 1) + block.code)
    given = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env = given | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(program)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.page}:{block.line}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("place", PYTHON)
def test_python_runs(place: str, tmp_path: Path) -> None:
    run(PYTHON[place], folder=tmp_path)


def test_the_first_program_runs_on_two_ranks(tmp_path: Path) -> None:
    first = next(blocks("README.md", "python"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(first, *torchrun, folder=tmp_path)  # of both at once, so that lines may mix
    assert [printed.count(f"rank {rank} of 2 holds") for rank in (0, 1)] == [1, 1]


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files(page: str) -> None:
    missing = []
    for link in links(page):
        path, _, heading = link.partition("#")
        target = ROOT / page if not path else (ROOT / page).parent / path
        name = os.path.relpath(target, ROOT)
        if not target.exists() or heading and heading not in headings(name):
            missing.append(link)
    assert not missing


def headings(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", pages())
def test_paths_in_prose_exist(page: str) -> None:
    """Those in backticks that begin at the root; capitals stand for a name of the reader's choice."""
    named = re.findall(rf"`((?:{'|'.join((*ROOMS, 'tests'))})/[\w./]*)`", (ROOT / page).read_text())
    missing = [path for path in named if not (ROOT / path).exists() and not re.search(r"/[A-Z]+\b", path)]
    assert not missing


def commands(page: str) -> Iterator[list[str]]:
    """The commands of shell blocks, and of lines in unnamed blocks that begin with make or python."""
    for block in blocks(page, "sh", "bash", ""):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if block.language or re.match(r"make |python3? ", line) else []
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


@pytest.mark.parametrize("page", pages())
def test_commands_name_what_exists(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            named = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert named <= targets, f"no such target: {words}"
        elif "-m" in words and (words[0].startswith("python") or words[0] == "torchrun"):
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module), f"no such module: {words}"
        for word in words:
            if re.fullmatch(rf"(?:{'|'.join((*ROOMS, 'tests'))})/[\w./-]+\.(?:yaml|py)", word):
                assert (ROOT / word).exists(), f"no such file: {words}"


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "hybrid_sp/README.md"])
def test_sentences_are_short(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text).replace("**", "")
    text = re.sub(r"^(\|.*|#.*| {4}.*)$", "", text, flags=re.MULTILINE)
    found = [sentence for one in re.split(r"^- ", text, flags=re.MULTILINE) for sentence in long_sentences(one)]
    assert not found, f"sentences of more than {LONGEST} words"
