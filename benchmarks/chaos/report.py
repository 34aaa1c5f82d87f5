"""What each fault cost, and what the clients saw in all."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.chaos.compare import same
from benchmarks.chaos.faults import Fault
from benchmarks.chaos.traffic import Outcome

HEAD = "fault                noticed s  whole s  in flight  retried  failed  steps lost"


@dataclass(frozen=True)
class Toll:
    """What was seen from a fault until the next one.

    ``in_flight`` are the requests that ran when it struck; ``retried`` are those that were sent again, ``failed`` those
    with an error that no retry could have hidden, or that were in flight and never answered.
    """

    in_flight: int
    retried: int
    failed: int
    steps_lost: int

    @classmethod
    def of(cls, start: float, end: float, outcomes: Sequence[Outcome]) -> Toll:
        def meanwhile(moments: Iterable[float]) -> bool:
            return any(start <= moment < end for moment in moments)

        running = [each for each in outcomes if each.started <= start < each.ended]
        failed = [each for each in outcomes if meanwhile(at for at, _ in each.errors)]
        failed += [each for each in running if each.answer is None and each not in failed]
        return cls(
            len(running),
            sum(meanwhile(at for at, _ in each.retries) for each in outcomes),
            len(failed),
            sum(num for each in outcomes for at, num in each.steps_again if start <= at < end),
        )


def tolls(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> list[Toll]:
    """One for each fault, in their order."""
    ends = [*(fault.at for fault in faults[1:]), math.inf]
    return [Toll.of(fault.at, end, outcomes) for fault, end in zip(faults, ends, strict=True)]


def line(fault: Fault) -> str:
    """The fault and how long it took."""

    def after(moment: float | None) -> str:
        return "-" if moment is None else f"{moment - fault.at:.1f}"

    return f"{fault.name:<20} {after(fault.noticed):>9} {after(fault.whole):>8}"


def table(faults: Sequence[Fault], costs: Sequence[Toll]) -> str:
    """A line for each fault."""
    rows = [
        f"{line(fault)} {cost.in_flight:>10} {cost.retried:>8} {cost.failed:>7} {cost.steps_lost:>11}"
        for fault, cost in zip(faults, costs, strict=True)
    ]
    return "\n".join([HEAD, *rows])


def by_kind(faults: Sequence[Fault], costs: Sequence[Toll]) -> dict[str, str]:
    """By the kind of fault: how often, the median and the longest time until it was noticed and until all was whole,
    and what those of the kind cost together."""
    told = {}
    for name in sorted({fault.name for fault in faults}):
        pairs = [(fault, cost) for fault, cost in zip(faults, costs, strict=True) if fault.name == name]
        moments = {
            "noticed": [fault.noticed - fault.at for fault, _ in pairs if fault.noticed is not None],
            "whole": [fault.whole - fault.at for fault, _ in pairs if fault.whole is not None],
        }
        words = [
            f"{what} {statistics.median(times):.1f} (longest {max(times):.1f})"
            for what, times in moments.items()
            if times
        ]
        words += [
            f"{sum(getattr(cost, what) for _, cost in pairs)} {what.replace('_', ' ')}"
            for what in ("in_flight", "retried", "failed", "steps_lost")
        ]
        told[name] = ", ".join([f"{len(pairs)} times", *words])
    return told


def summary(outcomes: Sequence[Outcome], right: dict[tuple[str, int], bytes], stored: set[str]) -> dict[str, object]:
    """What the clients saw. ``stored`` are the jobs of the store that were made for ``outcomes``."""
    pairs = [(each, each.answer) for each in outcomes if each.answer is not None]
    wrong = [each for each, answer in pairs if not same(answer, right[each.kind.name, each.variant])]
    told = {job_id for each in outcomes for job_id in each.job_ids}
    return {
        "requests": dict(Counter(each.kind.name for each in outcomes)),
        "unanswered": len(outcomes) - len(pairs),
        "errors": dict(Counter(error for each in outcomes for _, error in each.errors)),
        "retries": dict(Counter(what for each in outcomes for _, what in each.retries)),
        "other answers than without faults": dict(Counter(each.kind.name for each in wrong)),
        "jobs that no client knows of": len(stored - told),
        "jobs that two requests share": sum(len(set(each.job_ids)) for each in outcomes) - len(told),
        "steps computed again": sum(num for each in outcomes for _, num in each.steps_again),
        "slowest s": {
            name: round(max(each.ended - each.started for each in outcomes if each.kind.name == name), 1)
            for name in sorted({each.kind.name for each in outcomes})
        },
    }
