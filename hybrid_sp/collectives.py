"""The only caller of torch.distributed: collectives, synchronous and pending, and the ledger that counts them.

A collective names its `Header`: which kind of layer calls it, in which direction, in which call. The ledger counts by
it, errors quote it, and with `check` every rank compares it with the others before the data moves, so that ranks which
have come apart stop with a message instead of exchanging the wrong tensors. `group=None` is one device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

_HEADER_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a collective is for. `tag` is the kind of layer, `call` the operator call of this shard, counted from 0."""

    tag: str
    direction: str = "forward"
    call: int = 0
    check: bool = False
    note: str = ""

    def text(self, collective: str, x: Tensor) -> str:
        shape = "x".join(map(str, x.shape))
        return f"{collective} {self.tag} {self.direction} call {self.call} [{shape}] {x.dtype} {self.note}".strip()


@dataclass
class Row:
    """One collective on this rank: bytes received, and seconds blocked while waiting for it."""

    collective: str
    tag: str
    direction: str
    bytes: int
    seconds: float = 0.0


@dataclass
class Ledger:
    """Collectives made while it was open, in launch order. A group of one rank makes none."""

    rows: list[Row] = field(default_factory=list)

    def select(self, collective: str | None = None, tag: str | None = None, direction: str | None = None) -> list[Row]:
        """Rows that match every given field."""
        wanted = (("collective", collective), ("tag", tag), ("direction", direction))
        return [row for row in self.rows if all(want in (None, getattr(row, name)) for name, want in wanted)]

    @property
    def calls(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def blocked_seconds(self) -> float:
        return sum(row.seconds for row in self.rows)


_open_ledgers: list[Ledger] = []


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Count this rank's collectives: `with ledger() as book: ...`, then `book.calls`, `book.bytes`, `book.rows`."""
    book = Ledger()
    _open_ledgers.append(book)
    try:
        yield book
    finally:
        _open_ledgers.remove(book)


class Pending:
    """A collective in flight. `wait` returns its result, once; a second wait is an error."""

    def __init__(self, result: Callable[[], Any], work: Any = None, what: str = "", row: Row | None = None) -> None:
        self._result: Callable[[], Any] | None = result
        self._work, self._what, self._row = work, what, row

    def wait(self) -> Any:
        if self._result is None:
            raise RuntimeError(f"waited twice for: {self._what}")
        result, self._result = self._result, None
        if self._work is not None:
            begin = time.perf_counter()
            try:
                self._work.wait()
            except RuntimeError as error:
                raise RuntimeError(f"rank {dist.get_rank()} failed in: {self._what}: {error}") from error
            if self._row is not None:
                self._row.seconds += time.perf_counter() - begin
        return result()

    def then(self, step: Callable[[Any], Any]) -> Pending:
        """The same collective, with `step` applied to its result when it is waited for."""
        return Pending(lambda: step(self.wait()), what=self._what)

    def drain(self) -> None:
        """Wait and discard, if nobody has waited."""
        if self._result is not None:
            self.wait()


_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def start_all_gather(x: Tensor, group: Group, header: Header) -> Pending:
    """Launch an all-gather of x, equal in shape on all ranks; the result is [P, *x.shape]."""
    x = x.detach().contiguous()
    ranks = size(group)

    def launch() -> tuple[Any, Callable[[], Tensor]]:
        out = x.new_empty(ranks * x.numel())
        return _all_gather_single(out, x.view(-1), group=group, async_op=True), lambda: out.view(ranks, *x.shape)

    return _start("all_gather", x, group, header, launch, x.unsqueeze(0), (ranks - 1) * x.nbytes)


def start_reduce_scatter(x_P: Tensor, group: Group, header: Header) -> Pending:
    """Launch a sum over ranks of x_P [P, ...], of which each rank receives its own row."""
    x_P = x_P.detach().contiguous()
    ranks = size(group)

    def launch() -> tuple[Any, Callable[[], Tensor]]:
        out = torch.empty_like(x_P[0])
        work = _reduce_scatter_single(out.view(-1), x_P.view(-1), group=group, async_op=True)
        return work, lambda: out

    return _start("reduce_scatter", x_P, group, header, launch, x_P[0], (ranks - 1) * x_P[0].nbytes)


def start_all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group, header: Header) -> Pending:
    """Launch an exchange of rows of x [rows, ...]: the first sent[0] go to rank 0, the next sent[1] to rank 1, ...

    The result holds received[0] rows of rank 0, then received[1] of rank 1, and so on; sent[r] here must be what rank r
    expects from this rank, and a row's shape is equal on all ranks. Every rank makes this one collective, however
    little it sends, so it keeps its place among all others: unlike point-to-point messages it needs no process group of
    its own. The header shows one row, for the numbers of rows differ between ranks. A rank's rows to itself are copied,
    and not counted as bytes received.
    """
    x = x.detach().contiguous()
    row = x.new_empty(x.shape[1:])
    assert sum(sent) == len(x) and len(sent) == len(received) == size(group)

    def launch() -> tuple[Any, Callable[[], Tensor]]:
        out = x.new_empty(sum(received), *row.shape)
        return dist.all_to_all_single(out, x, list(received), list(sent), group=group, async_op=True), lambda: out

    others = sum(received) - received[rank(group)]
    return _start("all_to_all", row, group, header, launch, x, others * row.nbytes)


def start_all_reduce(x: Tensor, group: Group, header: Header) -> Pending:
    """Launch a sum of x over ranks, in place."""
    ranks = size(group)

    def launch() -> tuple[Any, Callable[[], Tensor]]:
        return dist.all_reduce(x, group=group, async_op=True), lambda: x

    return _start("all_reduce", x, group, header, launch, x, 2 * (ranks - 1) * x.nbytes // ranks)


def all_gather(x: Tensor, group: Group, tag: str) -> Tensor:
    """x of every rank, [P, *x.shape]."""
    return start_all_gather(x, group, Header(tag=tag)).wait()


def all_reduce(x: Tensor, group: Group, tag: str) -> Tensor:
    """Sum of x over ranks, in place; returns x."""
    return start_all_reduce(x, group, Header(tag=tag)).wait()


def broadcast(x: Tensor, group: Group, src: int = 0) -> Tensor:
    """x of the rank `src` of the group, in place; returns x."""
    if size(group) > 1:
        dist.broadcast(x, group=group, group_src=src)
    return x


def gather_objects(obj: Any, group: Group) -> list[Any]:
    """A small picklable object of every rank, in rank order, on every rank."""
    objects = [obj] * size(group)
    if size(group) > 1:
        dist.all_gather_object(objects, obj, group=group)
    return objects


def barrier(group: Group) -> None:
    """Return when every rank of the group has called it."""
    if size(group) > 1:
        dist.barrier(group=group)


def rank(group: Group) -> int:
    """This process's place in the group."""
    return 0 if group is None else dist.get_rank(group)


def size(group: Group) -> int:
    """Number of ranks in the group."""
    return 1 if group is None else dist.get_world_size(group)


def _start(
    collective: str,
    x: Tensor,
    group: Group,
    header: Header,
    launch: Callable[[], tuple[Any, Callable[[], Tensor]]],
    alone: Tensor,
    received: int,
) -> Pending:
    """Launch on more than one rank; a group of one already holds the result (`alone`)."""
    what = header.text(collective, x)
    if size(group) == 1:
        return Pending(lambda: alone, what=what)
    if header.check:
        _compare(what, x.device, group)
    row = Row(collective, header.tag, header.direction, received)
    for book in _open_ledgers:
        book.rows.append(row)
    work, result = launch()
    return Pending(result, work, what, row)


def _compare(what: str, device: torch.device, group: Group) -> None:
    """Raise on every rank if the ranks are about to make different collectives."""
    mine = torch.zeros(_HEADER_BYTES, dtype=torch.uint8, device=device)
    text = what.encode()[:_HEADER_BYTES]
    mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    every = mine.new_empty(size(group) * _HEADER_BYTES)
    _all_gather_single(every, mine, group=group)
    texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in every.view(-1, _HEADER_BYTES).cpu()]
    if len(set(texts)) > 1:
        lines = "\n".join(f"  rank {r}: {text}" for r, text in enumerate(texts))
        raise RuntimeError(
            f"ranks are about to make different collectives:\n{lines}\nEvery rank must call the same operators on the "
            "same shapes, dtypes and requires_grad, and its loss must reach their outputs."
        )
