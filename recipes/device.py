"""Choose the device of a run, and set what holds for the whole process: threads, memory, determinism, diagnosis."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from recipes.allocator import keep_freed_memory
from recipes.config import Recipe, RecipeError
from recipes.validate import processes

# torch's flight recorder keeps the last collectives of NCCL, and writes them if one takes longer than the timeout.
RECORDER = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
RECORDER_FILE = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"  # the rank is appended to this name
# Streams share the queues of a device. With CUDA's 8, a stream of NCCL may stand behind one that waits.
QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
# Without a workspace of its own for each stream, cuBLAS may choose another algorithm from run to run.
WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def choose_device(recipe: Recipe) -> str:
    """Resolve ``train.device`` on this machine."""
    chosen, local = recipe.train.device, processes("LOCAL_WORLD_SIZE")
    seen, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    own = seen == 1 and bool(given) and "," not in given  # the launcher shows each process a GPU of its own
    enough = torch.cuda.is_available() and (seen >= local or own)
    if chosen == "cuda" and not enough:
        raise RecipeError(
            f"train.device=cuda needs one GPU for each of the {local} processes of this machine, but torch sees "
            f"{seen}; set train.device=cpu or start fewer processes"
        )
    return "cuda" if enough and chosen != "cpu" else "cpu"


def set_up(recipe: Recipe, device: str, folder: Path) -> None:
    """Set up this process, before it uses the device. Variables of the environment that are set already stay."""
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    if device == "cpu" and recipe.train.keep_memory:
        keep_freed_memory()
    variables: dict[str, str] = {}
    if device == "cuda":
        variables |= RECORDER | QUEUES | {RECORDER_FILE: str(folder.absolute() / "nccl_rank_")}
    if recipe.train.deterministic:
        variables |= WORKSPACE
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for debugging
    for name, value in variables.items():
        os.environ.setdefault(name, value)
