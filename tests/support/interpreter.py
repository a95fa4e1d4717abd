"""Triton's interpreter, mended where it is not what a device does, and where it does the same work again and again.

It keeps bf16 numbers as uint16, multiplies matrices of those integers, and cuts fp32 numbers off where a device rounds
them to the nearest bf16. It replaces every function of triton.language again whenever a kernel calls a function. Triton
3.6 takes an array of one number for a number, which numpy 2.4 does not.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def patch_once() -> None:
    """Leave triton.language alone where the kernel that runs has replaced its functions already, and make an index of
    any array of one number."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor

    def patch_lang(function: Any) -> Any:
        languages = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return interpreter._LangPatchScope()

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_lang, patch_lang_tensor


@functools.cache
def mend() -> None:
    """Round to bf16 and multiply matrices of bf16 as a device does: exact products, summed in fp32."""
    patch_once()
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *options)
        return TensorHandle(np.matmul(wide(a), wide(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return TensorHandle(wide(source), to.scalar)
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), to.scalar)
        return cast(self, source, to)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
