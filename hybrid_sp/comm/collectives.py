"""The collectives, synchronous and pending. `group=None` is one device.

Each carries a `Header`: the kind of layer that calls it, the direction, and the number of the call. The ledger counts
by header, and errors quote it. With `check`, all ranks compare headers before the data moves; the ledger does not count
this. Ranks that have come apart then stop with a message, instead of exchanging the wrong tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Group, cpu_group, rank, size
from .link import carried
from .pending import Header, Pending, Work, note_row
from .reporter import launching

_TEXT_BYTES = 1024  # bytes of one rank's text in a comparison


_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def start_all_gather(x: Tensor, group: Group, header: Header) -> Pending:
    """Launch an all-gather of x, equal in shape on all ranks; the result is [P, *x.shape]."""
    x = x.detach().contiguous()
    ranks = size(group)

    def launch() -> tuple[Work, Callable[[], Tensor]]:
        out = x.new_empty(ranks * x.numel())
        return _all_gather_single(out, x.view(-1), group=group, async_op=True), lambda: out.view(ranks, *x.shape)

    return _start("all_gather", x, group, header, launch, x.unsqueeze(0), (ranks - 1) * x.nbytes)


def start_reduce_scatter(x_P: Tensor, group: Group, header: Header) -> Pending:
    """Launch a sum of x_P [P, ...] over ranks; each rank receives its own row."""
    x_P = x_P.detach().contiguous()
    ranks = size(group)

    def launch() -> tuple[Work, Callable[[], Tensor]]:
        out = torch.empty_like(x_P[0])
        work = _reduce_scatter_single(out.view(-1), x_P.view(-1), group=group, async_op=True)
        return work, lambda: out

    return _start("reduce_scatter", x_P, group, header, launch, x_P[0], (ranks - 1) * x_P[0].nbytes)


def start_all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group, header: Header) -> Pending:
    """Launch an exchange of rows of x [rows, ...]: the first sent[0] go to rank 0, the next sent[1] to rank 1, ...

    The result holds received[0] rows of rank 0, then received[1] of rank 1, and so on. sent[r] here must equal the
    number of rows that rank r expects from this rank. The shape of a row is equal on all ranks.

    Every rank makes this one collective, even if it sends nothing. It therefore keeps its place among all others and,
    unlike point-to-point messages, needs no process group of its own. The header shows one row, because the numbers of
    rows differ between ranks. A rank's rows to itself are copied, and do not count as bytes received.
    """
    x = x.detach().contiguous()
    row = x.new_empty(x.shape[1:])
    assert sum(sent) == len(x) and len(sent) == len(received) == size(group)

    def launch() -> tuple[Work, Callable[[], Tensor]]:
        out = x.new_empty(sum(received), *row.shape)
        return dist.all_to_all_single(out, x, list(received), list(sent), group=group, async_op=True), lambda: out

    others = sum(received) - received[rank(group)]
    return _start("all_to_all", row, group, header, launch, x, others * row.nbytes)


def start_all_reduce(x: Tensor, group: Group, header: Header) -> Pending:
    """Launch a sum of x over ranks, in place."""
    ranks = size(group)

    def launch() -> tuple[Work, Callable[[], Tensor]]:
        return dist.all_reduce(x, group=group, async_op=True), lambda: x

    return _start("all_reduce", x, group, header, launch, x, 2 * (ranks - 1) * x.nbytes // ranks)


def all_gather(x: Tensor, group: Group, tag: str) -> Tensor:
    """Gather x of every rank, [P, *x.shape]."""
    return start_all_gather(x, group, Header(tag=tag)).wait()


def all_reduce(x: Tensor, group: Group, tag: str) -> Tensor:
    """Sum x over ranks, in place, and return it."""
    return start_all_reduce(x, group, Header(tag=tag)).wait()


def start_texts(text: str, group: Group, what: str) -> Pending:
    """Launch an all-gather of a short text of every rank. It runs over the CPU for every group, so no device waits."""
    if size(group) == 1:
        return Pending(lambda: [text])
    mine = torch.frombuffer(bytearray(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8)
    every = bytearray(size(group) * _TEXT_BYTES)
    work = _all_gather_single(torch.frombuffer(every, dtype=torch.uint8), mine, group=cpu_group(group), async_op=True)
    places = range(0, len(every), _TEXT_BYTES)
    return Pending(
        lambda: [every[i : i + _TEXT_BYTES].rstrip(b"\0").decode(errors="replace") for i in places], work, what
    )


def broadcast(x: Tensor, group: Group, src: int = 0) -> Tensor:
    """Copy x of the rank `src` of the group into x of all others, in place, and return it."""
    if size(group) > 1:
        dist.broadcast(x, group=group, group_src=src)
    return x


def gather_objects(obj: Any, group: Group) -> list[Any]:
    """Return a small picklable object of every rank, in rank order, on every rank."""
    objects = [obj] * size(group)
    if size(group) > 1:
        dist.all_gather_object(objects, obj, group=group)
    return objects


def barrier(group: Group) -> None:
    """Return when every rank of the group has called it."""
    if size(group) > 1:
        dist.barrier(group=group)


def leave(group: Group) -> None:
    """End all process groups, once every rank of this one has called this.

    If an interpreter exits while groups are alive, their threads may abort it.
    """
    barrier(group)
    if dist.is_initialized():
        dist.destroy_process_group()


def _start(
    collective: str,
    x: Tensor,
    group: Group,
    header: Header,
    launch: Callable[[], tuple[Work, Callable[[], Tensor]]],
    alone: Tensor,
    received: int,
) -> Pending:
    """Launch on more than one rank; a group of one already holds the result (`alone`)."""
    what = header.text(collective, x)
    if size(group) == 1:
        return Pending(lambda: alone, what=what)
    if header.check:
        compare(what, group)
    row = note_row(collective, header, received, x.device)
    with launching(what, group, x.device):
        work, result = launch()
    return Pending(result, carried(work, size(group) - 1, received, x.device), what, header, row, x.device, group)


def compare(what: str, group: Group) -> None:
    """Raise on every rank if the ranks are about to make different collectives."""
    texts = start_texts(what, group, f"comparison before {what}").wait()
    if len(set(texts)) > 1:
        lines = "\n".join(f"  rank {r}: {text}" for r, text in enumerate(texts))
        raise RuntimeError(
            f"ranks are about to make different collectives:\n{lines}\nEvery rank must call the same operators on the "
            "same shapes, dtypes and requires_grad, and its loss must reach their outputs."
        )
