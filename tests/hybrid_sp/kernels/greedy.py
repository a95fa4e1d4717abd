"""Kernels that ask for too much, and one that does not, compiled as those of the operators are by aot.py beside."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl

from hybrid_sp.kernels.gpu import launch
from tests.hybrid_sp.kernels.aot import build_all, record


@triton.jit
def spilling_kernel(p_x, p_y, n, stride, WIDTH: tl.constexpr):
    """A square of fp32 in the registers of one warp."""
    o = tl.arange(0, WIDTH)
    o_square = o[:, None] * stride + o[None, :]
    b_x = tl.load(p_x + o_square, mask=o[None, :] < n, other=0.0)
    b_sum = tl.zeros([WIDTH, WIDTH], dtype=tl.float32)
    for i in range(n):
        b_sum += tl.dot(b_x, tl.load(p_x + o_square + i))
    tl.store(p_y + o_square, b_sum + b_x, mask=o[None, :] < n)


@triton.jit
def crowding_kernel(p_x, p_y, n, stride, WIDTH: tl.constexpr):
    """Squares on their way in shared memory, many at a time."""
    o = tl.arange(0, WIDTH)
    o_square = o[:, None] * stride + o[None, :]
    b_sum = tl.zeros([WIDTH, WIDTH], dtype=tl.float32)
    for i in range(n):
        b_x = tl.load(p_x + o_square + i * stride * WIDTH)
        b_sum += tl.dot(b_x, b_x)
    tl.store(p_y + o_square, b_sum)


@triton.jit
def broken_kernel(p_x, WIDTH: tl.constexpr):
    tl.store(p_x + tl.arange(0, WIDTH), 1.0)


@triton.jit
def modest_kernel(p_x, p_none, n, one, unaligned, flag, scale, WORD: tl.constexpr, WIDTH: tl.constexpr):
    if WORD == "some" and flag:
        tl.store(p_x + tl.arange(0, WIDTH) * one, scale + unaligned, mask=tl.arange(0, WIDTH) < n)


if __name__ == "__main__":
    recorder = record()
    x, y = torch.zeros(128, 128, dtype=torch.bfloat16), torch.zeros(128, 128)
    for numbers in ((128, 256), (144, 512)):  # the same to a compiler: multiples of 16
        launch.launch(spilling_kernel, (1,), x, y, *numbers, num_warps=1, num_stages=1, WIDTH=64)
        launch.launch(crowding_kernel, (1,), x, y, *numbers, num_warps=8, num_stages=9, WIDTH=128)
    launch.launch(broken_kernel, (1,), x, num_warps=1, num_stages=1, WIDTH=100)
    launch.launch(broken_kernel, (3, 0), y, num_warps=1, num_stages=1, WIDTH=64)  # an empty grid launches nothing
    options = {"WORD": "some", "WIDTH": 64}
    launch.launch(modest_kernel, (1,), x, None, 48, 1, 3, True, 0.5, num_warps=1, num_stages=1, **options)
    launch.launch(modest_kernel, (1,), x[:, 1:], None, 48, 1, 2**40, True, 0.5, num_warps=1, num_stages=1, **options)
    specs = [spec for _, spec in recorder.seen.values()]
    built = build_all([("", spec, arch) for spec in specs for arch in (80, 90)])
    told = [
        (spec.kernel.__name__, spec.signature, [place for (place,), said in spec.attributes.items() if said])
        for spec in specs
    ]
    print(json.dumps({"faults": [(one.kernel, one.arch, one.fault) for one in built], "specs": told}))
