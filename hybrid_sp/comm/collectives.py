"""The only caller of torch.distributed: collectives and messages, synchronous and pending.

Each names its `Header`: which kind of layer calls it, in which direction, in which call. The ledger counts by it,
errors quote it, and with `check` all ranks compare it, uncounted, before the data moves, so that ranks which
have come apart stop with a message instead of exchanging the wrong tensors. `group=None` is one device.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ledger as timeline
from .ledger import Row, Wait

Group = dist.ProcessGroup | None

_TEXT_BYTES = 1024  # of one rank in a comparison


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a collective is for. `tag` is the kind of layer, `call` the operator call of this shard, counted from 0."""

    tag: str
    direction: str = "forward"
    call: int = 0
    check: bool = False
    note: str = ""
    exchange: int = 0  # numbers the group's exchanges by messages, so that those of two never meet

    def text(self, collective: str, x: Tensor) -> str:
        shape = "x".join(map(str, x.shape))
        return f"{collective} {self.tag} {self.direction} call {self.call} [{shape}] {x.dtype} {self.note}".strip()


class CommunicationError(RuntimeError):
    """A collective or a message that failed or did not come in time; the message names the rank, layer and call."""


class Pending:
    """Something in flight. `wait` returns its result, once; a second wait is an error."""

    def __init__(
        self,
        result: Callable[[], Any],
        work: Any = None,
        what: str = "",
        header: Header | None = None,
        row: Row | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._result: Callable[[], Any] | None = result
        self._work, self._what, self._header, self._row, self._device = work, what, header, row, device

    def wait(self) -> Any:
        if self._result is None:
            raise RuntimeError(f"waited twice for: {self._what}")
        result, self._result = self._result, None
        if self._work is not None:
            begin = timeline.moment(self._device)
            try:
                self._work.wait()
            except CommunicationError:
                raise
            except RuntimeError as error:
                raise CommunicationError(f"rank {dist.get_rank()} failed in: {self._what}: {error}") from error
            self._arrived(begin)
        return result()

    def then(self, step: Callable[[Any], Any]) -> Pending:
        """The same, with `step` applied to its result when it is waited for."""
        return Pending(lambda: step(self.wait()), what=self._what)

    def drain(self) -> None:
        """Wait and discard, if nobody has waited."""
        if self._result is not None:
            self.wait()

    def _arrived(self, begin: float) -> None:
        end, header = timeline.moment(self._device), self._header
        if self._row is not None:
            self._row.arrived = end
        if header is not None:
            wait = Wait(
                what=self._what, tag=header.tag, direction=header.direction, call=header.call, begin=begin, end=end
            )
            timeline.note_wait(wait)


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


def start_texts(text: str, group: Group, what: str) -> Pending:
    """Launch an all-gather of a short text of every rank, over the CPU whatever the group's device: no device waits."""
    if size(group) == 1:
        return Pending(lambda: [text])
    mine = torch.frombuffer(bytearray(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8)
    every = bytearray(size(group) * _TEXT_BYTES)
    work = _all_gather_single(torch.frombuffer(every, dtype=torch.uint8), mine, group=_on_cpu(group), async_op=True)
    places = range(0, len(every), _TEXT_BYTES)
    return Pending(
        lambda: [every[i : i + _TEXT_BYTES].rstrip(b"\0").decode(errors="replace") for i in places], work, what
    )


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


def leave(group: Group) -> None:
    """End all process groups, when every rank of this one is ready to: an interpreter that ends with groups still alive
    may be aborted by their threads."""
    barrier(group)
    if dist.is_initialized():
        dist.destroy_process_group()


def rank(group: Group) -> int:
    """This process's place in the group."""
    return 0 if group is None else dist.get_rank(group)


def size(group: Group) -> int:
    """Number of ranks in the group."""
    return 1 if group is None else dist.get_world_size(group)


def device(group: Group) -> torch.device:
    """Where tensors are that a group's ranks send: with NCCL on this process's GPU, else on the CPU."""
    return torch.device("cuda" if group is not None and "nccl" in str(dist.get_backend_config(group)) else "cpu")


# -- messages from one rank to another --------------------------------------------------------------------------------

_twins: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()  # of a group: others by backend
_exchanges: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()  # by messages, made so far


def agree(header: Header, plan: str, x: Tensor, group: Group) -> Header:
    """The check before an exchange by messages: all ranks are about to make the same one. Makes the group's twin.

    Returns the header for its messages, whose number all ranks give this exchange: two exchanges in flight at a time
    may stem from two shards, both of whose calls are numbered from 0.
    """
    if size(group) == 1:
        return header
    if header.check:
        _compare(header.text(plan, x), group)
    _messages(group)
    return replace(header, exchange=next(_exchanges.setdefault(group, itertools.count())))


def start_send(x: Tensor, to: int, number: int, group: Group, header: Header) -> Pending:
    """Launch message `number` of an exchange to the rank `to` of the group. Both ends give it the same number."""
    x = x.detach().contiguous()
    what = header.text(f"message {number} to rank {_global_rank(group, to)}:", x)
    work = dist.isend(x, group=_messages(group), group_dst=to, tag=_message_tag(header, number))
    return Pending(lambda: x, work, what, header, device=x.device)


def start_receive(like: Tensor, source: int, number: int, group: Group, header: Header) -> Pending:
    """Launch the receipt of message `number` from the rank `source` of the group, in shape and dtype of `like`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
    what = header.text(f"message {number} from rank {_global_rank(group, source)}:", out)
    row = _note("message", header, out.nbytes, out.device)
    work = dist.irecv(out, group=_messages(group), group_src=source, tag=_message_tag(header, number))
    assert work is not None
    return Pending(lambda: out, _slowed(work, 1, out.nbytes), what, header, row, out.device)


def start_shift(x: Tensor, number: int, group: Group, header: Header) -> Pending:
    """Launch one hop around the ring of the group's ranks: x goes to the next one, the result is x of the one before.

    Of two neighbours one sends first and the other receives first, so that on a network which handles one message after
    the other the ranks do not wait for each other in a circle. One rank has what it sends.
    """
    ranks, me = size(group), rank(group)
    if ranks == 1:
        return Pending(lambda: x)
    send = functools.partial(start_send, x, (me + 1) % ranks, number, group, header)
    receive = functools.partial(start_receive, x, (me - 1) % ranks, number, group, header)
    first, second = (receive(), send()) if me % 2 else (send(), receive())
    sent, received = (second, first) if me % 2 else (first, second)

    def result() -> Tensor:
        out = received.wait()
        sent.wait()
        return out

    return Pending(result)


def start_aside(task: Callable[[], Any], what: str, header: Header, device: torch.device | None = None) -> Pending:
    """Launch a task that waits for messages and sends others, beside whatever this thread does meanwhile.

    On a CPU a thread of its own drives it. On CUDA nothing blocks a thread: the whole task, waits and all, is enqueued
    here on a stream of high priority, which begins where the current stream is now.
    """
    if device is not None and device.type == "cuda":
        return _enqueue_aside(task, what, header, device)
    done: Future[Any] = Future()

    def run() -> None:
        try:
            with torch.no_grad(), timeline.unexposed():
                done.set_result(task())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=what, daemon=True).start()
    return Pending(done.result, _Joined(done), what, header)


class _Joined:
    def __init__(self, done: Future[Any]) -> None:
        self._done = done

    def wait(self) -> None:
        """What the task has raised is raised by its result, as it is."""
        futures.wait([self._done])


def _global_rank(group: Group, rank: int) -> int:
    return dist.get_global_rank(group, rank) if group is not None else rank


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _enqueue_aside(task: Callable[[], Any], what: str, header: Header, device: torch.device) -> Pending:
    """Not run yet: written for CUDA where there was none."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=-1)
    stream = _streams[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad(), timeline.unexposed():
        outcome = task()
    return Pending(lambda: outcome, _Enqueued(task, outcome, stream), what, header, device=device)


class _Enqueued:
    """Work on a side stream. It holds the task, and so the memory that the task reads, until somebody has waited."""

    def __init__(self, task: Callable[[], Any], outcome: Any, stream: torch.cuda.Stream) -> None:
        self._task: Callable[[], Any] | None = task
        self._outcome, self._stream, self._done = outcome, stream, stream.record_event()

    def wait(self) -> None:
        """The current stream waits; the outcome's memory is not given to another before that stream has read it."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(self._done)
        for leaf in torch.utils._pytree.tree_leaves(self._outcome):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(current)
        self._task = self._outcome = None


def _messages(group: Group) -> Any:
    """The group's twin for messages: collectives and messages that share a communicator could be ordered differently on
    two ranks."""
    return _twin(group, str(dist.get_backend_config(group)))


def _on_cpu(group: Group) -> Any:
    """The group, or its twin on gloo if it cannot send what lies on the CPU."""
    assert group is not None
    return group if torch.device("cpu") in group._device_types else _twin(group, "gloo")


def _twin(group: Group, backend: str) -> Any:
    """Another group of the same ranks, made when all of them ask for it the first time."""
    assert group is not None
    twins = _twins.setdefault(group, {})
    if backend not in twins:
        timeout = group._get_backend(group._device_types[0]).options._timeout
        ranks, options = dist.get_process_group_ranks(group), group_options(backend, timeout)
        twins[backend] = dist.new_group(ranks, timeout, backend, options, use_local_synchronization=True)
    return twins[backend]


def group_options(backend: str, timeout: timedelta) -> Any:
    """Options of a new group, one object for each. NCCL's own stream is the communication stream: of high priority, so
    that what arrives does not queue behind kernels that need it not. Not run yet: written where there was no NCCL."""
    if "nccl" not in backend:
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options


def _message_tag(header: Header, number: int) -> int:
    """Ends of a message that disagree about what it is do not meet, and time out."""
    words = f"{header.tag} {header.direction} {header.call} {header.exchange} {number}"
    return zlib.crc32(words.encode()) >> 1


# -- a slow network, pretended ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Link:
    """A network on which a message takes latency + bytes / bandwidth; seconds, and bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, messages: float, bytes_: float) -> float:
        """For messages one after the other that carry so many bytes in all."""
        return messages * self.latency + bytes_ / self.bandwidth


_pretended: Link | None = None


@contextlib.contextmanager
def slowed(link: Link) -> Iterator[None]:
    """Pretend that what this process receives comes over such a link: it arrives so much later than it does, and one
    thing after the other. For measurements where no network can be slowed down for real."""
    global _pretended
    before, _pretended = _pretended, link
    try:
        yield
    finally:
        _pretended = before


_wire = threading.Lock()


class _Slowed:
    """Work that is done when the pretended link has carried it."""

    def __init__(self, work: Any, link: Link, messages: int, received: int) -> None:
        self._done: Future[None] = Future()

        def carry() -> None:
            try:
                work.wait()
                with _wire:
                    time.sleep(received / link.bandwidth)
                time.sleep(messages * link.latency)
                self._done.set_result(None)
            except BaseException as error:
                self._done.set_exception(error)

        threading.Thread(target=carry, daemon=True).start()

    def wait(self) -> None:
        self._done.result()


def _slowed(work: Any, messages: int, received: int) -> Any:
    return work if _pretended is None else _Slowed(work, _pretended, messages, received)


# -- what all have in common ------------------------------------------------------------------------------------------


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
        _compare(what, group)
    row = _note(collective, header, received, x.device)
    work, result = launch()
    return Pending(result, _slowed(work, size(group) - 1, received), what, header, row, x.device)


def _note(collective: str, header: Header, received: int, device: torch.device) -> Row:
    row = Row(
        collective=collective,
        tag=header.tag,
        direction=header.direction,
        call=header.call,
        bytes=received,
        launched=timeline.moment(device),
    )
    timeline.note_row(row)
    return row


def _compare(what: str, group: Group) -> None:
    """Raise on every rank if the ranks are about to make different collectives."""
    texts = start_texts(what, group, f"comparison before {what}").wait()
    if len(set(texts)) > 1:
        lines = "\n".join(f"  rank {r}: {text}" for r, text in enumerate(texts))
        raise RuntimeError(
            f"ranks are about to make different collectives:\n{lines}\nEvery rank must call the same operators on the "
            "same shapes, dtypes and requires_grad, and its loss must reach their outputs."
        )
