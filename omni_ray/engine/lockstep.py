"""Lockstep: every rank of a gang carries out the turns that the first one decides, in its order.

So all ranks run the same lanes through the same calls, and the collectives inside the forwards always match.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from omni_ray.messages import Job

CONFIRM_TIMEOUT = timedelta(seconds=20)
HEARTBEAT_S = 30.0
"""An idle leader says so this often, lest its followers take it for dead (``world.TIMEOUT``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One decision: jobs that become lanes, lanes that unwind, calls that are computed.

    ``run`` has one share of calls for each part of the cfg axis; the calls of a share are joined into one forward.
    """

    admit: tuple[Job, ...] = ()
    cancel: tuple[str, ...] = ()
    run: tuple[tuple[str, ...], ...] = ()
    stop: bool = False

    def __bool__(self) -> bool:
        return bool(self.admit or self.cancel or self.run or self.stop)


class Alone:
    """The lockstep of a replica of one rank."""

    leads = True

    def agree(self, decide: Callable[[], Turn]) -> Turn:
        return decide()

    def confirm_failure(self) -> None:
        """A forward failed: there is no other rank to ask."""

    def same(self, value: list[bool]) -> list[bool]:
        return value


class Lockstep:
    """The turns of a gang, on every rank. Made in the same order on all of them: it opens a process group."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo")
        self.leads = dist.get_rank() == 0
        self._last = time.monotonic()

    def agree(self, decide: Callable[[], Turn]) -> Turn:
        """The next turn: the first rank decides it and tells the others, which wait for it here."""
        box: list[Turn | None] = [None]
        if self.leads:
            turn = decide()
            if not turn and time.monotonic() - self._last < HEARTBEAT_S:
                return turn
            box, self._last = [turn], time.monotonic()
        dist.broadcast_object_list(box, src=0, group=self._group)
        assert box[0] is not None
        return box[0]

    def confirm_failure(self) -> None:
        """See :func:`confirm_failure`."""
        confirm_failure(self._group)

    def same(self, value: list[bool]) -> list[bool]:
        """See :func:`same`."""
        return same(value, self._group)


def confirm_failure(group: Any) -> None:
    """Called by the ranks of ``group`` where a forward failed: returns if it failed on all of them, as a bad request's
    does. Raises if a rank is gone: then it was not the request's fault, and the gang is at its end."""
    dist.all_reduce(torch.ones(1), group=group, async_op=True).wait(CONFIRM_TIMEOUT)


def same(value: list[bool], group: Any) -> list[bool]:
    """The first rank's value, on all ranks of ``group``: what was measured may differ by rounding."""
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group)
    return box[0]
