"""The locks of folders: files that one process at a time holds. The system lets go of them when that process ends."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import IO

from recipes.config import RecipeError


def set_aside(folder: Path) -> IO[str]:
    """Moves a run that nobody trains, if there is one in ``folder``, to ``folder.old-1`` or the next free number.

    The lock that is returned goes with the name of the folder, not with what is moved. Raises RecipeError, and nothing
    is moved, if a process trains there.
    """
    held = hold(folder)
    if (folder / "provenance.json").exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        os.rename(folder, aside)
    return held


def is_aside(name: str) -> bool:
    """Whether a folder of this name is a run that `set_aside` moved."""
    return re.search(r"\.old-\d+$", name) is not None


def hold(folder: Path) -> IO[str]:
    """Locks ``folder`` for one training; raises RecipeError if another process trains there.

    The lock lies beside the folder, so that it holds while the folder is moved away and another takes its name.
    """
    busy, advice = f"another process is training in {folder}", "wait for it, or add name=ANOTHER_NAME"
    held = take(folder.with_name(f".{folder.name}.lock"), busy, advice)
    if (earlier := folder / ".lock").exists():  # where trainings started by an earlier version of this file have it
        take(earlier, busy, advice).close()
    return held


def take(path: Path, busy: str, advice: str) -> IO[str]:
    """Locks the file ``path``, made if need be, until what is returned is closed here and in processes that inherit it.

    A file that nobody holds says nothing and stays: removing it could let two in. Raises RecipeError of ``busy``, the
    holder and ``advice`` if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise RecipeError(f"{busy} (process {holder}); {advice}") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock
