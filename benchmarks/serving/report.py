"""What a run came to: as a row for machines, and as a table for people."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.load import Run
from benchmarks.serving.outcome import Estimate, Outcome
from benchmarks.serving.slo import in_time

STATISTICS = ("mean", "p50", "p95", "p99")


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles, linear between the values; all 0 if there are none."""
    if not values:
        return dict.fromkeys(STATISTICS, 0.0)
    percentiles = np.percentile(values, [50, 95, 99])
    return dict(zip(STATISTICS, [float(np.mean(values)), *map(float, percentiles)], strict=True))


def summarise(
    run: Run, deadline_s: Mapping[str, float], max_concurrency: int | None, alone_s: Mapping[str, float]
) -> dict[str, Any]:
    """The row. Rates and latencies are of the requests that succeeded; a request sent again counts once, as it ended.

    ``late_p99_ms`` is how long after its arrival a request was sent: where nothing limits the concurrency, that is
    what this side adds by itself.
    """
    last = list({outcome.index: outcome for outcome in run.outcomes}.values())
    good = [outcome for outcome in last if outcome.failure is None]
    row: dict[str, Any] = {
        "concurrency": max_concurrency,
        "requests": len(last),
        "completed": len(good),
        "duration_s": run.duration_s,
        "req/s": len(good) / run.duration_s,
        "tok/s": sum(o.num_tokens for o in good) / run.duration_s,
        "prompt_tok/s": sum(o.num_prompt_tokens for o in good) / run.duration_s,
        "img/s": sum(o.num_outputs for o in good if o.kind != "videos") / run.duration_s,
        "video/s": sum(o.num_outputs for o in good if o.kind == "videos") / run.duration_s,
        "peak_in_flight": peak_in_flight(run.outcomes),
    }
    if max_concurrency is None:
        row["late_p99_ms"] = 1e3 * statistics([o.sent_s - o.arrival_s for o in last if not o.attempt])["p99"]
    row |= _latencies(good)
    row["failed"] = dict(collections.Counter(o.failure for o in last if o.failure))
    row["failed_because"] = {o.failure: o.detail for o in reversed(last) if o.failure}
    row["classes"] = {label: _class(list(some), deadline_s, alone_s) for label, some in _by_label(last)}
    if deadline_s:
        row["slo_attainment"] = sum(in_time(o, deadline_s) for o in last) / len(last)
    row["estimates"] = _estimates(good)
    row["refusals"] = _refusals(run.outcomes)
    return row


def peak_in_flight(outcomes: Iterable[Outcome]) -> int:
    """Most requests under way at one time."""
    changes = sorted(change for o in outcomes for change in ((o.sent_s, 1), (o.end_s, -1)))
    return int(np.max(np.cumsum([change for _, change in changes]), initial=0))


def _latencies(good: Sequence[Outcome]) -> dict[str, float]:
    """TTFT, TPOT and ITL are of chat alone, E2E is of everything; a plain answer's TTFT is its whole latency."""
    chat = [(o, o.first_s) for o in good if o.kind == "chat" and o.first_s is not None]
    values = {
        "ttft": [first_s for _, first_s in chat],
        "tpot": [(o.total_s - first_s) / (o.num_tokens - 1) for o, first_s in chat if o.gaps_s and o.num_tokens > 1],
        "itl": [gap for o, _ in chat for gap in o.gaps_s],
    }
    row = {f"{name}_{key}_ms": 1e3 * s for name, some in values.items() for key, s in statistics(some).items()}
    return row | {f"e2e_{key}_s": s for key, s in statistics([o.total_s for o in good]).items()}


def _by_label(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: o.label):
        found.setdefault(outcome.label, []).append(outcome)
    yield from found.items()


def _class(some: Sequence[Outcome], deadline_s: Mapping[str, float], alone_s: Mapping[str, float]) -> dict[str, Any]:
    good = [o for o in some if o.failure is None]
    row: dict[str, Any] = {"requests": len(some), "completed": len(good)}
    row |= {f"e2e_{key}_s": value for key, value in statistics([o.total_s for o in good]).items()}
    if deadline_s:
        label = some[0].label
        attained = sum(in_time(o, deadline_s) for o in some) / len(some)
        row |= {"alone_s": alone_s[label], "deadline_s": deadline_s[label], "slo_attainment": attained}
    return row


def _estimates(good: Iterable[Outcome]) -> dict[str, Any]:
    """By what was foretold, the start or the end: how often, and the median of estimated / real."""
    told = {
        "start": [o.start_estimate for o in good if o.start_estimate],
        "end": [o.end_estimate for o in good if o.end_estimate],
    }
    return {name: {"num": len(some), "ratio_p50": _median_ratio(some)} for name, some in told.items() if some}


def _median_ratio(estimates: Sequence[Estimate]) -> float:
    return float(np.median([e.estimated_s / max(e.real_s, 1e-3) for e in estimates]))


def _refusals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The 429s. ``ratio_p50`` is the first Retry-After of a request over the time until it was taken at last; of those
    that were not sent again, over the time until the model next took another one. ``came_again`` are the requests that
    were sent again after it, and how many of them were taken."""
    refused = [o for o in outcomes if o.refused]
    if not refused:
        return {}
    told = [o for o in refused if o.retry_after_s is not None]
    taken = {o.index: o.sent_s for o in outcomes if o.attempt and not o.refused}
    real = _until_taken(told, taken) if taken else _until_another_was(told, outcomes)
    again = [o for o in outcomes if o.attempt]
    return {
        "num": len(refused),
        "without_retry_after": len(refused) - len(told),
        "retry_after_s": statistics([o.retry_after_s for o in told if o.retry_after_s is not None]),
        "ratio_p50": _median_ratio(real) if real else None,
        "came_again": {"num": len(again), "taken": sum(not o.refused for o in again)},
    }


def _until_taken(told: Sequence[Outcome], taken: Mapping[int, float]) -> list[Estimate]:
    """The first Retry-After of each request beside the time until it was ``taken`` itself: when, by its index."""
    first = [o for o in told if not o.attempt and o.index in taken]
    return [Estimate(o.retry_after_s or 0.0, taken[o.index] - o.end_s) for o in first]


def _until_another_was(told: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[Estimate]:
    """Each Retry-After beside the time until the model took a later request."""
    sent: dict[str, list[float]] = {}
    for each in sorted(outcomes, key=lambda outcome: outcome.sent_s):
        if each.failure is None:
            sent.setdefault(each.model, []).append(each.sent_s)
    found = []
    for refused in told:
        times = sent.get(refused.model, [])
        if (place := bisect.bisect_right(times, refused.end_s)) < len(times):
            found.append(Estimate(refused.retry_after_s or 0.0, times[place] - refused.end_s))
    return found


def table(row: Mapping[str, Any]) -> str:
    """The row for people."""
    return "\n".join(_lines(row))


def _lines(row: Mapping[str, Any]) -> Iterator[str]:
    limit = "" if row["concurrency"] is None else f", at most {row['concurrency']} in flight"
    yield f"{row['completed']} of {row['requests']} requests in {row['duration_s']:.2f} s{limit}"
    rates = [f"{row[key]:.4g} {key}" for key in ("req/s", "tok/s", "prompt_tok/s", "img/s", "video/s") if row[key]]
    yield "  ".join([*rates, f"peak in flight {row['peak_in_flight']}"])
    if row.get("late_p99_ms", 0) > 20:
        yield f"sent {row['late_p99_ms']:.0f} ms after the arrival at P99: this side is too slow; lower --request-rate"
    yield ""
    yield f"{'':>12}" + "".join(f"{name:>10}" for name in ("mean", "P50", "P95", "P99"))
    for name, unit in (("ttft", "ms"), ("tpot", "ms"), ("itl", "ms"), ("e2e", "s")):
        values = [row[f"{name}_{key}_{unit}"] for key in STATISTICS]
        if any(values):
            yield f"{name.upper() + ' ' + unit:>12}" + "".join(f"{_short(value):>10}" for value in values)
    yield ""
    yield from _class_lines(row)
    for cause, num in row["failed"].items():
        yield f"failed: {num} x {cause}  {row['failed_because'][cause][:200]}".rstrip()
    yield from _forecast_lines(row)


def _class_lines(row: Mapping[str, Any]) -> Iterator[str]:
    width = max(len(label) for label in row["classes"])
    slo = "slo_attainment" in row
    yield f"{'class':<{width}}   done   of  E2E P50 s  P99 s" + ("  alone s  deadline s  in time" if slo else "")
    for label, some in row["classes"].items():
        line = f"{label:<{width}} {some['completed']:>6} {some['requests']:>4}"
        times = [_short(some[f"e2e_{key}_s"]) if some["completed"] else "-" for key in ("p50", "p99")]
        line += f" {times[0]:>10} {times[1]:>6}"
        if slo:
            line += f" {_short(some['alone_s']):>8} {_short(some['deadline_s']):>11} {some['slo_attainment']:>8.0%}"
        yield line
    if slo:
        yield f"SLO attainment {row['slo_attainment']:.1%}"


def _forecast_lines(row: Mapping[str, Any]) -> Iterator[str]:
    for name, some in row["estimates"].items():
        yield f"first estimate of the {name}: {some['ratio_p50']:.2f} of the real time at the median of {some['num']}"
    if refusals := row["refusals"]:
        said = refusals["retry_after_s"]
        yield f"refused: {refusals['num']}; Retry-After {said['p50']:.3g} s at P50, {said['p99']:.3g} s at P99" + (
            f"; {refusals['without_retry_after']} had none" if refusals["without_retry_after"] else ""
        )
        if refusals["ratio_p50"] is not None:
            yield f"Retry-After: {refusals['ratio_p50']:.2f} of the time until a request was taken, at the median"
        if refusals["came_again"]["num"]:
            yield "sent again after it: {num}, of which taken: {taken}".format(**refusals["came_again"])


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
