"""Lock folders: one process at a time holds a lock file, and the system releases it when that process ends."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import IO

from recipes.config import RecipeError


def set_aside(folder: Path) -> IO[str]:
    """Move a run in ``folder`` that no process trains to ``folder.old-1`` or the next free number.

    The returned lock belongs to the name of the folder, not to the moved files. Raise RecipeError, and move nothing,
    if a process trains there.
    """
    held = hold(folder)
    if (folder / "provenance.json").exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        os.rename(folder, aside)
    return held


def is_aside(name: str) -> bool:
    """Tell whether a folder of this name is a run that `set_aside` moved."""
    return re.search(r"\.old-\d+$", name) is not None


def hold(folder: Path) -> IO[str]:
    """Lock ``folder`` for one training; raise RecipeError if another process trains there.

    The lock file lies next to the folder, so it still holds when the folder is moved and another one takes its name.
    """
    busy, advice = f"another process is training in {folder}", "wait for it, or add name=ANOTHER_NAME"
    held = take(folder.with_name(f".{folder.name}.lock"), busy, advice)
    if (earlier := folder / ".lock").exists():  # earlier versions of this file put their lock here
        take(earlier, busy, advice).close()
    return held


def take(path: Path, busy: str, advice: str) -> IO[str]:
    """Lock the file ``path`` and create it if needed.

    The lock ends when the returned file is closed here and in every process that inherited it. The file itself stays,
    because removing it could admit two holders. If another process holds it, raise RecipeError of ``busy``, the holder
    and ``advice``.
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
