"""Every kernel that the operators launch, compiled for devices that need not be there.

    python -m tests.hybrid_sp.kernels.aot --out analysis/results/kernels/aot.md

`launch` is replaced by a recorder, so that the operators run on the CPU, but for the numbers, which no kernel makes.
What they launch is compiled as it would be on a device: the runtime's own binder sees the dtypes, alignments and sizes
of the arguments, and launch parameters are those of the architecture. Of the binaries we read registers, shared memory,
and the stack of a thread, to which registers spill. Of the loops over chunks we read which loads are copies to shared
memory that the program need not wait for, and how many of these are in flight while it computes. No minimum may drop a
decay that is not a number, as a device would and the interpreter does not.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import hybrid_sp as hsp
from hybrid_sp import backends
from hybrid_sp.kernels.gpu import launch, tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have, by compute capability
SPILLS = 256  # bytes of a thread that we allow: 64 registers, beside the 255 it has
STREAMING = ("scan_kernel", "summary_kernel", "fold_kernel")  # whose loops over chunks must not wait for each load
# Loads of a loop that may not be copies: on sm_80 those of y, which two products read in incompatible layouts.
WAITED_FOR = {80: 1, 90: 0, 100: 0}
TRIED = ", tried"  # of tensors: with a candidate's launch parameters instead of the default's
WORKERS = 2

HEADS, TOKENS = 4, 512
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Spec(NamedTuple):
    """A kernel as it is compiled, on any device; arguments by their place."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], Any]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        return repr((self.kernel.__name__, *self[1:]))

    @property
    def task(self) -> str:
        """What the kernel is to do: those of its constants that are words, or true, and a dim of one."""
        words = []
        for (place, *_), value in self.constants.items():
            name = self.kernel.arg_names[place].lower()
            if value is True or (isinstance(value, str) and name != "precision"):
                words.append(name if value is True else f"{name}={value}")
            elif name in ("d", "w") and value == 1:
                words.append(f"{name}=1")
        return " ".join(words)


class Recorder:
    """Takes the place of `launch`: keeps what is distinct among what is launched, and for which tensors."""

    def __init__(self) -> None:
        self.tensors = ""
        self.seen: dict[str, tuple[str, Spec]] = {}
        self.backend = make_backend(GPUTarget("cuda", 90, 32))  # what is said of arguments is the same on every device
        self.binder = functools.cache(self._binder)

    def _binder(self, kernel: Any) -> Any:
        return create_function_from_signature(kernel.signature, kernel.params, self.backend)

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constants: Any
    ) -> None:
        if 0 in grid:
            return
        bound, said, _ = self.binder(kernel)(*args, **constants)
        types = [kind for kind, _ in said]
        fixed = {(i,): value for i, value in enumerate(bound.values()) if types[i] == "constexpr"}
        hints = {(i,): hint for i, (_, hint) in enumerate(said) if (i,) not in fixed and isinstance(hint, str)}
        attributes = {place: self.backend.parse_attr(hint) for place, hint in hints.items()}
        spec = Spec(kernel, dict(zip(bound, types, strict=True)), fixed, attributes, num_warps, num_stages)
        self.seen.setdefault(spec.key, (self.tensors, spec))


class Built(NamedTuple):
    """A spec compiled for an architecture; shared memory of a program and stack of a thread in bytes."""

    kernel: str
    tensors: str  # dtype, and key and value dims
    task: str
    warps: int
    stages: int
    arch: int
    registers: int
    shared: int
    spills: int
    copied: int  # loads of a chunk that are copies to shared memory
    waited: int  # and those that are not
    ahead: int  # copies in flight while the program computes
    drops: int  # instructions that return the other number for one that is not a number
    seconds: float
    error: str

    @property
    def fault(self) -> str:
        """Why it must not be so; empty if it may."""
        if self.error:
            return self.error
        if self.shared > SHARED[self.arch]:
            return f"{self.shared} bytes of shared memory, of which sm_{self.arch} has {SHARED[self.arch]}"
        if self.spills > SPILLS:
            return f"{self.spills} bytes spilled a thread, more than {SPILLS}"
        if self.drops and not self.tensors.startswith("fp16"):  # whose factors have the greatest as their unit
            return f"{self.drops} min or max that hide what is not a number"
        if self.kernel not in STREAMING or (self.stages == 1 and self.tensors.startswith("fp32")):
            return ""  # an fp32 product is computed in registers, which may leave none for loads
        alone = {"d=1", "w=1"} & set(self.task.split())  # the normaliser's column: 2 bytes a token, and a copy takes 4
        if self.waited > WAITED_FOR[self.arch] and not alone:
            return f"{self.waited} loads of a chunk for which the program waits"
        roomless = "256" in self.tensors  # of such rows shared memory holds no third chunk
        excused = roomless or self.tensors.endswith(TRIED)
        return "no load is in flight while it computes" if self.ahead == 0 and not excused else ""


Job = tuple[str, Spec, int]  # for which tensors, and for which compute capability


def build(tensors: str, spec: Spec, arch: int) -> Built:
    """Compile and measure."""
    begin = time.perf_counter()
    registers, shared, stack, loads, drops, error = 0, 0, 0, (0, 0, 0), 0, ""
    try:
        binary = triton.compile(
            ASTSource(spec.kernel, spec.signature, spec.constants, spec.attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": spec.warps, "num_stages": spec.stages},
        )
        shared = binary.metadata.shared
        registers, stack = usage(binary.asm["cubin"])
        loads = loads_of(binary.asm["ttgir"])
        drops = len(re.findall(r"\b(?:min|max)(?!\S*NaN)\S*\.f(?:16|32|64)", binary.asm["ptx"]))
    except Exception as failure:  # of Triton, LLVM or ptxas: every one is a finding of its own
        error = f"does not compile: {type(failure).__name__}: {failure}"
    seconds = round(time.perf_counter() - begin, 2)
    name = spec.kernel.__name__
    return Built(
        name, tensors, spec.task, spec.warps, spec.stages, arch, registers, shared, stack, *loads, drops, seconds, error
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: [int(n) for n in re.findall(rf"\b{name}:(\d+)", told)] for name in ("REG", "STACK", "LOCAL")}
    return max(found["REG"]), max(found["STACK"]) + max(found["LOCAL"])


def loads_of(ttgir: str) -> tuple[int, int, int]:
    """Loads of tensors in the loops of a kernel: those that are copies to shared memory, those that are not, and the
    copies in flight after the least wait."""
    depth, loops, lines = 0, list[int](), list[str]()
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loops.append(depth)
        elif loops:
            lines.append(line)
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1] and "scf.for" not in line:
            loops.pop()
    waited = sum("tt.load" in line and "tensor<" in line.partition(" : ")[2] for line in lines)
    ahead = [int(n) for line in lines for n in re.findall(r"async_wait .*num = (\d+)", line)]
    return sum("async_copy_global_to_local" in line for line in lines), waited, min(ahead, default=0)


_jobs: list[Job] = []  # of the workers, which are forked: kernels cannot be sent


def _job(i: int) -> Built:
    return build(*_jobs[i])


def build_all(jobs: Sequence[Job]) -> list[Built]:
    """Every job, in order, by WORKERS processes."""
    _jobs[:] = jobs
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        return pool.map(_job, range(len(jobs)), chunksize=1)


def record() -> Recorder:
    """From now on this process launches nothing: operators run their kernels' launchers, on CPU tensors."""
    assert not backends.interpreted(), "TRITON_INTERPRET=1 makes kernels that cannot be compiled"
    early = [name for name, module in sys.modules.items() if getattr(module, "launch", None) is launch.launch]
    assert early == [launch.__name__], f"{early} have the real `launch` already"
    recorder = Recorder()
    launch.launch, backends.interpreted = recorder, lambda: True
    launch.check_interpreter = lambda: None  # type: ignore[assignment]
    return recorder


class Case(NamedTuple):
    """A call of linear_attention, as a layer makes it."""

    dtype: str
    key: int
    value: int
    decay: str = "none"  # fixed, scalar, vector, bonus (which has a vector beside it)
    states: bool = True  # an initial state, and a final one
    normalize: bool = False

    def run(self) -> None:
        """Forward and backward. q, k and v are cut out of one projection."""
        sizes = [HEADS * self.key, HEADS * self.key, HEADS * self.value]
        channels = torch.zeros(1, TOKENS, sum(sizes), dtype=DTYPES[self.dtype], requires_grad=True)
        q, k, v = (x.unflatten(-1, (HEADS, -1)) for x in channels.split(sizes, -1))
        shape = {"fixed": (HEADS,), "scalar": v.shape[:3], "vector": q.shape, "bonus": q.shape}.get(self.decay)
        g = None if shape is None else torch.zeros(shape, requires_grad=True)
        bonus = torch.zeros(HEADS, self.key, requires_grad=True) if self.decay == "bonus" else None
        S, z = torch.zeros(1, HEADS, self.key, self.value), torch.zeros(1, HEADS, self.key)
        options: dict[str, Any] = {"log_decay": g, "bonus": bonus, "normalize": self.normalize, "backend": "triton"}
        if self.states:
            options |= {"initial_state": (S, z) if self.normalize else S, "return_final_state": True}
        out = hsp.linear_attention(q, k, v, **options)
        flat = [*out[:1], *(out[1] if self.normalize else out[1:])] if isinstance(out, tuple) else [out]
        torch.autograd.backward(flat, [torch.ones_like(x) for x in flat])


def cases(dtype: str, key: int, value: int, forms: str) -> Iterator[Case]:
    """The forms of the recurrence, between states; `one` that launches every kernel; two of which `candidates` are
    timed; or `all`, of which more are variants than are kernels of their own."""
    few = {"one": ("scalar", "bonus"), "candidates": ("scalar", "vector")}
    for decay in few.get(forms, ("none", "scalar", "vector", "bonus")):
        yield Case(dtype, key, value, decay)
        if forms == "all":
            yield Case(dtype, key, value, decay, states=False)
    if forms == "all":
        yield Case(dtype, key, value, "fixed")
        for decay in ("none", "scalar", "vector"):
            yield Case(dtype, key, value, decay, normalize=True)


EVERY = tuple(SHARED)
SQUARES = tuple((width, width) for width in (64, 128, 256))
ODD = ((153, 64), (100, 36))  # those of Based, and widths that no power of two divides
# What is compiled: dtype, (key, value) dims, compute capabilities, and which forms. `first` is for `make test`,
# `main` and `candidates` of `make test-all`.
GRIDS: dict[str, list[tuple[str, Sequence[tuple[int, int]], Sequence[int], str]]] = {
    "first": [("bf16", [(64, 64)], [90], "one")],
    "quick": [("bf16", [(128, 128)], [90], "all")],
    "main": [
        ("bf16", SQUARES, EVERY, "states"),
        ("bf16", [(128, 128)], [90], "all"),
        ("fp16", [(128, 128)], [90, 100], "states"),
        ("fp32", [(128, 128)], [90], "states"),
    ],
    "candidates": [("bf16", SQUARES, [90], "candidates")],
    "full": [(dtype, [*SQUARES, *ODD], EVERY, "all") for dtype in DTYPES],
}


def jobs_of(grid: str) -> list[Job]:
    """What a grid launches, for the architectures that it names."""
    recorder = record()
    jobs: dict[tuple[str, int], Job] = {}
    for dtype, widths, archs, forms in GRIDS[grid]:
        for (key, value), arch in itertools.product(widths, archs):
            recorder.tensors = f"{dtype} {key}x{value}"
            recorder.seen = {}
            with compiled_for(arch):
                for case in cases(dtype, key, value, forms):
                    case.run()
                    if forms == "candidates":
                        try_candidates(case, recorder)
            for spec, job in recorder.seen.items():
                jobs.setdefault((spec, arch), (*job, arch))
    return list(jobs.values())


def try_candidates(case: Case, recorder: Recorder) -> None:
    """Launch a case once for each candidate of each entry that it asks for."""
    before, recorder.tensors = recorder.tensors, recorder.tensors + TRIED
    with tuning.watching() as asked:
        case.run()
    for key, default in asked.items():
        for candidate in tuning.candidates(key, default)[1:]:
            with tuning.trying({key: candidate}):
                case.run()
    recorder.tensors = before


@contextmanager
def compiled_for(arch: int) -> Iterator[None]:
    """Launch with the parameters of a compute capability."""
    kept = tuning.architecture_of
    tuning.architecture_of = lambda device: f"sm_{arch}"  # type: ignore[assignment]
    try:
        yield
    finally:
        tuning.architecture_of = kept


def table(built: Sequence[Built]) -> list[str]:
    """A row for each kernel, what it is to do and for which tensors; of its variants (which arguments are multiples of
    16, or one) the worst of each."""
    archs = sorted({one.arch for one in built})
    rows: dict[tuple[str, ...], list[Built]] = {}
    for one in built:
        rows.setdefault((one.kernel, one.task, one.tensors, str(one.warps), str(one.stages)), []).append(one)
    heads = ["kernel", "what it does", "for", "warps", "stages", *(f"sm_{arch}" for arch in archs)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, ones in sorted(rows.items(), key=lambda item: item[0][:2]):
        lines.append("| " + " | ".join([*row, *(worst([x for x in ones if x.arch == arch]) for arch in archs)]) + " |")
    return lines


def worst(ones: Sequence[Built]) -> str:
    """A cell of the table."""
    if not ones:
        return ""
    numbers = [max(one.registers for one in ones), max(one.shared for one in ones) / 1024, max(x.spills for x in ones)]
    text = " / ".join(f"{number:.0f}" for number in numbers)
    if any(one.copied or one.waited for one in ones):
        counts = {(one.copied, one.waited, one.ahead) for one in ones}
        text += f" / {max(x for x, _, _ in counts)}+{max(x for _, x, _ in counts)} / {min(x for _, _, x in counts)}"
    return f"**{text}**" if any(one.fault for one in ones) else text


def report(built: Sequence[Built], grid: str, seconds: float) -> str:
    """What was measured, as Markdown."""
    archs = sorted({one.arch for one in built})
    limits = ", ".join(f"{SHARED[arch] // 1024} KiB on sm_{arch}" for arch in archs)
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        f"`python -m tests.hybrid_sp.kernels.aot --grid {grid}`, without a GPU: triton {triton.__version__}, torch "
        f"{torch.__version__}, {len(built)} binaries in {seconds:.0f} s by {WORKERS} processes.",
        "",
        "Cells: registers of a thread / KiB of shared memory of a program / bytes of stack, to which a thread spills. "
        "For loops over chunks also: loads of a chunk that are copies to shared memory + those that are not / copies "
        "in flight while the program computes. "
        f"Allowed are {SPILLS} bytes spilled and the chip's shared memory, {limits}. "
        f"{', '.join(STREAMING)} must have copies in flight (not with 256 rows, of which no third chunk fits), and no "
        "other loads (but on sm_80 one, of y, which two products read in different layouts; where a state has one row "
        "or column, loads of 2 bytes; in fp32 any with one stage). What is not allowed is bold. No kernel has a min or "
        "max that hides what is not a number; but fp16 has, in units of factors.",
        "",
        "| | binaries | most registers | most shared | most spilled | above |",
        "|---|---|---|---|---|---|",
    ]
    for arch in archs:
        ones = [one for one in built if one.arch == arch]
        most = [max(getattr(one, name) for one in ones) for name in ("registers", "shared", "spills")]
        above = sum(bool(one.fault) for one in ones)
        lines.append(f"| sm_{arch} | {len(ones)} | {most[0]} | {most[1] / 1024:.0f} KiB | {most[2]} bytes | {above} |")
    errors = [f"- {one.kernel}, {one.task}, {one.tensors}, sm_{one.arch}: {one.error}" for one in built if one.error]
    return "\n".join([*lines, "", *table(built), "", *errors])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hybrid_sp.kernels.aot", description=__doc__)
    parser.add_argument("--grid", choices=GRIDS, default="full", help="what is compiled (default full)")
    parser.add_argument("--out", type=Path, help="write the table there")
    parser.add_argument("--json", type=Path, help="write what was measured there")
    chosen = parser.parse_args(arguments)
    begin = time.perf_counter()
    torch.set_num_threads(1)
    built = build_all(jobs_of(chosen.grid))
    text = report(built, chosen.grid, time.perf_counter() - begin)
    print(text)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text)
    if chosen.json:
        chosen.json.write_text(json.dumps([{**one._asdict(), "fault": one.fault} for one in built]))
    return int(any(one.fault for one in built))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        sys.exit(main(sys.argv[1:]))
