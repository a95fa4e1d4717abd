"""The messages from one rank to another, which have a process group of their own."""

from __future__ import annotations

import functools
import itertools
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import compare
from .groups import Group, global_rank, message_group, rank, size
from .link import carried
from .pending import Header, Pending, note_row

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


def start_send(x: Tensor, to: int, number: int, group: Group, header: Header) -> Pending:
    """Launch message `number` of an exchange to the rank `to` of the group. Both ends give it the same number."""
    x = x.detach().contiguous()
    what = header.text(f"message {number} to rank {global_rank(group, to)}:", x)
    work = dist.isend(x, group=message_group(group), group_dst=to, tag=_message_tag(header, number))
    return Pending(lambda: x, work, what, header, device=x.device)


def start_receive(like: Tensor, source: int, number: int, group: Group, header: Header) -> Pending:
    """Launch the receipt of message `number` from the rank `source` of the group, in shape and dtype of `like`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
    what = header.text(f"message {number} from rank {global_rank(group, source)}:", out)
    row = note_row("message", header, out.nbytes, out.device)
    work = dist.irecv(out, group=message_group(group), group_src=source, tag=_message_tag(header, number))
    assert work is not None
    return Pending(lambda: out, carried(work, 1, out.nbytes, out.device), what, header, row, out.device)


def start_shift(x: Tensor, number: int, group: Group, header: Header) -> Pending:
    """Launch one hop around the ring of the group's ranks: send x to the next rank, receive x of the rank before.

    Odd ranks receive first, even ranks send first. On a network that handles one message after the other, the ranks
    therefore do not wait for each other in a circle. A single rank receives its own x.
    """
    ranks, me = size(group), rank(group)
    if ranks == 1:
        return Pending(lambda: x)
    send = functools.partial(start_send, x, (me + 1) % ranks, number, group, header)
    receive = functools.partial(start_receive, x, (me - 1) % ranks, number, group, header)
    if me % 2:
        received, sent = receive(), send()
    else:
        sent, received = send(), receive()

    def result() -> Tensor:
        out = received.wait()
        sent.wait()
        return out

    return Pending(result)


def _message_tag(header: Header, number: int) -> int:
    """Return the tag of a message. If its two ends disagree about the exchange, their tags differ and they time out."""
    words = f"{header.tag} {header.direction} {header.call} {header.exchange} {number}"
    return zlib.crc32(words.encode()) >> 1
