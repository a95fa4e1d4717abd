"""A device that is not there: tensors that compute on the CPU, and say that they lie elsewhere.

It counts what would stop the host of a CUDA device: a copy of data from the host, unless it is from pinned memory and
need not be waited for, and a value that the host reads. The name of the device is "meta", the one that every build of
torch lets autograd use.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hybrid_sp import transfer

ROOT, ROOMS = Path(__file__).parents[2], ("hybrid_sp", "layers", "recipes")
DEVICE = torch.device("meta")
aten = torch.ops.aten
Module = TypeVar("Module", bound=nn.Module)
READS = {  # the host needs a value, or a size that depends on values
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
}


class Elsewhere(Tensor):
    """A tensor on the device; `data_here` has its numbers."""

    data_here: Tensor

    @staticmethod
    def __new__(cls, x: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, x.shape, strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype, device=DEVICE
        )
        made.data_here = x
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the device, outside of `with Device()`")


class Device:
    """The device while it is open. It counts by line of this project: the host's stops by kind in `stops`, and copies
    from pinned memory, for which it does not stop, in `copies`."""

    def __init__(self) -> None:
        self.stops: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.pinned: list[Tensor] = []
        self._modes = (_Python(self), _Operations(self))

    def put(self, x: Tensor) -> Tensor:
        """Move a tensor to the device, uncounted."""
        return Elsewhere(x.detach()).requires_grad_(x.requires_grad)

    def move(self, model: Module) -> Module:
        """Move the weights and buffers of a module to the device, uncounted."""
        for module in model.modules():
            for name, weight in module._parameters.items():
                module._parameters[name] = None if weight is None else nn.Parameter(self.put(weight))
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else self.put(buffer)
        return model

    def _pin(self, x: Tensor) -> Tensor:
        self.pinned.append(x.clone())
        return self.pinned[-1]

    def clear(self) -> None:
        """Begin to count anew."""
        self.stops.clear()
        self.copies.clear()

    def stop(self, kind: str) -> None:
        self.stops[f"{kind} at {_line()}"] += 1

    def __enter__(self) -> Device:
        transfer.PINNED.add(DEVICE.type)
        self._pin_memory, Tensor.pin_memory = Tensor.pin_memory, lambda x: self._pin(x)  # type: ignore
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        transfer.PINNED.discard(DEVICE.type)
        Tensor.pin_memory = self._pin_memory  # type: ignore[method-assign]
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Python(TorchFunctionMode):
    """What torch copies within one Python call: data given as numbers."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            target = torch.device(kwargs.pop("device"))
            made = func(*args, **kwargs)
            return made.to(target) if target == DEVICE else made
        if func is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(*args[1:], **({"dtype": args[0].dtype} | kwargs)).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].cpu().tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                self.device.stop("a list as index")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Computes on the numbers, and counts copies and reads."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        there = {id(x.data_here): x for x in leaves if isinstance(x, Elsewhere)}
        here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.ndim]
        args, kwargs = tree_map(lambda x: x.data_here if isinstance(x, Elsewhere) else x, (args, dict(kwargs or {})))
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        goes_there = bool(there) if target is None else torch.device(target) == DEVICE
        if kwargs.get("non_blocking") and any(x is pinned for x in here for pinned in self.device.pinned):
            self.device.copies[f"{func.__name__} at {_line()}"] += 1
            here = []
        if goes_there and here:
            self.device.stop(f"a copy from the host, {func.__name__}")
        if there and (not goes_there or func in READS or _picks_by_value(func, args)):
            self.device.stop(f"a value read by the host, {func.__name__}")
        found = func(*args, **kwargs)
        if not goes_there:
            return found
        return tree_map(
            lambda x: there.get(id(x)) if id(x) in there else Elsewhere(x) if isinstance(x, Tensor) else x, found
        )


def _picks_by_value(func: Any, args: Any) -> bool:
    return func in (aten.index.Tensor, aten.index_put_.default) and any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )


def _line() -> str:
    """The innermost line of this project, tests apart."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "a test"
