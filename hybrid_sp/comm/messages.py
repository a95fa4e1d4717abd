"""The messages from one rank to another, which have a process group of their own."""

from __future__ import annotations

import itertools
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import compare
from .groups import Group, device, global_rank, message_group, rank, size
from .link import carried
from .pending import Header, Pending, note_row
from .reporter import launching

T = TypeVar("T")

# The exchanges made so far, numbered, by group.
_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()


def open_exchange(header: Header, plan: str, x: Tensor, group: Group) -> Header:
    """Check that all ranks are about to make the same exchange by messages, and make the group's twin.

    Returns the header for the messages. It carries a number that all ranks give this exchange. Two exchanges in flight
    at once may come from two shards, and both shards number their calls from 0.
    """
    if group is None or size(group) == 1:
        return header
    if header.check:
        compare(header.text(plan, x), group)
    message_group(group)
    return replace(header, exchange=next(_exchanges.setdefault(group, itertools.count())))


def early(group: Group, post: Callable[[], T]) -> Callable[[], T]:
    """Return a function that returns what `post` posts. It posts now; over NCCL when the function is called.

    NCCL takes the messages of two ranks in one order, so those of two exchanges may not mix. There each exchange makes
    all of its messages when it is waited for.
    """
    if in_one_order(group):
        return post
    posted = post()
    return lambda: posted


def in_one_order(group: Group) -> bool:
    """Tell whether the messages of two ranks have no tags, so that both must make them in one order."""
    return device(group).type == "cuda"


def start_send(x: Tensor, to: int, number: int, group: Group, header: Header) -> Pending:
    """Launch message `number` of an exchange to the rank `to` of the group. Both ends give it the same number."""
    x = x.detach().contiguous()
    what = header.text(f"message {number} to rank {global_rank(group, to)}:", x)
    with launching(what, group, x.device):
        work = dist.isend(x, group=message_group(group), group_dst=to, tag=_message_tag(header, number))
    return Pending(lambda: x, work, what, header, device=x.device, group=group)


def start_receive(like: Tensor, source: int, number: int, group: Group, header: Header) -> Pending:
    """Launch the receipt of message `number` from the rank `source` of the group, in shape and dtype of `like`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
    what = header.text(f"message {number} from rank {global_rank(group, source)}:", out)
    row = note_row("message", header, out.nbytes, out.device)
    with launching(what, group, out.device):
        work = dist.irecv(out, group=message_group(group), group_src=source, tag=_message_tag(header, number))
    assert work is not None
    return Pending(lambda: out, carried(work, 1, out.nbytes, out.device), what, header, row, out.device, group)


def start_shift(x: Tensor, number: int, group: Group, header: Header) -> Pending:
    """Launch one hop around the ring of the group's ranks: send x to the next rank, receive x of the rank before.

    Both messages are one operation, so they need no order, and NCCL carries them in both directions at once. A single
    rank receives its own x.
    """
    ranks, me = size(group), rank(group)
    if ranks == 1:
        return Pending(lambda: x)
    x = x.detach().contiguous()
    out, to, source = torch.empty_like(x), (me + 1) % ranks, (me - 1) % ranks
    ends = f"to rank {global_rank(group, to)} and from rank {global_rank(group, source)}"
    what = header.text(f"message {number} {ends}:", x)
    row = note_row("message", header, out.nbytes, out.device)
    twin, tag = message_group(group), _message_tag(header, number)
    sent = dist.P2POp(dist.isend, x, group=twin, group_peer=to, tag=tag)
    received = dist.P2POp(dist.irecv, out, group=twin, group_peer=source, tag=tag)
    with launching(what, group, x.device):
        works = dist.batch_isend_irecv([sent, received])
    work = carried(_Both(works, x), 1, out.nbytes, out.device)
    return Pending(lambda: out, work, what, header, row, out.device, group)


class _Both:
    """The work of a batch. It holds what is sent until somebody waits."""

    def __init__(self, works: list[dist.Work], sent: Tensor) -> None:
        self._works, self._sent = works, sent

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _message_tag(header: Header, number: int) -> int:
    """Return the tag of a message. If its two ends disagree about the exchange, their tags differ and they time out."""
    words = f"{header.tag} {header.direction} {header.call} {header.exchange} {number}"
    return zlib.crc32(words.encode()) >> 1
