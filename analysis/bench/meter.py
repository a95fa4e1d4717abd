"""The meter of the memory that tensors take, on any device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Count the bytes of storages made while the meter is open, forward and backward, as long as they live.

    live  the bytes alive now
    peak  the most bytes alive after any operation since it was opened or `restart`ed

    The meter does not see memory within one operation, nor copies made by a backend of collectives.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[StorageWeakRef, int] = {}  # 0 for storages made before it was opened
        self.peak = 0

    @property
    def live(self) -> int:
        self._bytes = {ref: size for ref, size in self._bytes.items() if not ref.expired()}
        return sum(self._bytes.values())

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(tree_leaves((args, kwargs)), new=False)
        result = func(*args, **(kwargs or {}))
        before = len(self._bytes)
        self._note(tree_leaves(result), new=True)
        if len(self._bytes) > before:
            self.peak = max(self.peak, self.live)
        return result

    def _note(self, leaves: Iterable[Any], new: bool) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._bytes.setdefault(StorageWeakRef(storage), storage.nbytes() if new else 0)
