"""The origin of a result, on machines that lack git, a package or torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes import provenance

ROOT = Path(__file__).parents[2]


def test_it_needs_no_package_of_recipes() -> None:
    """The benchmarks import it where these are missing."""
    code = """
import sys
from tests.support.packages import hide
hide("omegaconf", "wandb", "matplotlib")
import recipes.provenance
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_git_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", run)
    assert provenance.commit() is None and provenance.diff() == ""
    assert provenance.untracked() == [] and provenance.is_modified() is False


def test_outside_a_checkout_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() is None and provenance.is_modified() is False


def test_changes_and_new_files_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "old.txt").write_text("before\n")
    for words in (["init", "-q"], ["add", "old.txt"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert len(provenance.commit() or "") == 40
    assert (provenance.is_modified(), provenance.diff(), provenance.untracked()) == (False, "", [])
    (tmp_path / "old.txt").write_text("after\n")
    (tmp_path / "new.txt").write_text("")
    assert provenance.is_modified() and "-before\n+after\n" in provenance.diff()
    assert provenance.untracked() == ["new.txt"]


def test_versions_name_what_is_missing() -> None:
    found = provenance.versions(("einops", "no-such-package"))
    assert list(found) == ["python", "torch", "einops", "no-such-package"]
    assert found["torch"] == torch.__version__ and found["einops"] and found["no-such-package"] is None


@pytest.mark.parametrize(
    ("words", "processes", "command"),
    [
        (["-m", "recipes.train", "a b.yaml"], None, "python -m recipes.train 'a b.yaml'"),
        (["-u", "-m", "recipes.train", "a.yaml"], "2", "torchrun --nproc-per-node 2 -m recipes.train a.yaml"),
        (["train.py", "a.yaml"], None, "python train.py a.yaml"),
    ],
)
def test_the_command_is_one_to_type(
    words: list[str], processes: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/python", *words])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert provenance.command() == command
