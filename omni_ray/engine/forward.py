"""Computes what waits at the gate: joins calls into one forward, runs it, and hands each call its slice."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from omni_ray.accel.cache.teacache import Kept, TeaCache
from omni_ray.engine import batch
from omni_ray.engine.clock import DeviceClock
from omni_ray.engine.gate import Call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from omni_ray.engine.exchange import Answer, Exchange
    from omni_ray.engine.lockstep import Alone, Lockstep

logger = logging.getLogger(__name__)


class Forward:
    """Runs calls on ``pipe``'s modules. ``alone`` names the module methods whose answers could not be cut.

    On a cfg axis each part of the gang computes its own share of the calls, and ``exchange`` brings the answers of the
    others. A ``cache`` answers the transformers' calls that need not be computed.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        clock: DeviceClock,
        lockstep: Alone | Lockstep,
        exchange: Exchange | None = None,
        cache: TeaCache | None = None,
    ) -> None:
        self.alone: set[tuple[str, str]] = set()
        self._ranks = exchange or lockstep  # those that compute the same calls as this one
        self._cache = cache
        self._pipe = pipe
        self._clock = clock
        self._exchange = exchange

    def compute(self, shares: list[list[Call]]) -> list[Call]:
        """Answer every call of the shares, and return them. One call alone is cut along its batch if it can be."""
        calls = [call for share in shares for call in share]
        if self._exchange is None:
            self._answer(calls, self._run(calls))
        elif len(shares) == self._exchange.size:
            own = self._run(shares[self._exchange.index], calls)
            for share, answers in zip(shares, self._exchange.all(own), strict=True):
                self._answer(share, answers)
        elif self._exchange.size > 1 and batch.is_even(calls, self._exchange.size):
            self._answer(calls, [self._in_parts(calls[0], self._exchange)])
        else:
            self._answer(calls, self._run(calls))
        return calls

    @staticmethod
    def _answer(calls: list[Call], answers: list[Answer]) -> None:
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, BaseException):
                call.error = answer
            else:
                call.result = answer

    def _in_parts(self, call: Call, exchange: Exchange) -> Answer:
        """One call whose batch is cut over the cfg axis, such as one that brings both guidance branches itself."""
        try:
            own = self._forward([call], *batch.part(call, exchange.index, exchange.size))
        except Exception as error:
            self._ranks.confirm_failure()
            own = error
        parts = [part for (part,) in exchange.all([own])]
        return next((part for part in parts if isinstance(part, BaseException)), None) or batch.concat(parts)

    def _run(self, calls: list[Call], charged: list[Call] | None = None) -> list[Answer]:
        """The answers of ``calls``, computed in one forward if possible; its time goes to the calls ``charged``."""
        first = calls[0]
        try:
            if self._cache is not None and batch.is_denoising(first):
                return self._cached(self._cache, calls, charged)
            return batch.split(self._forward(charged or calls, *batch.join(calls), first), calls)
        except batch.Unsplittable as reason:
            logger.warning("%s.%s is computed one request at a time: %s", first.name, first.method, reason)
            self.alone.add((first.name, first.method))
        except torch.OutOfMemoryError as error:
            if len(calls) == 1:
                return [error]
            logger.warning(
                "no memory for %d requests in one forward, so each is computed alone; "
                "lower batching.max_num_batched_tokens",
                len(calls),
            )
        except Exception as error:  # the lanes whose forward it was fail; the others go on
            self._ranks.confirm_failure()
            return [error] * len(calls)
        return [answer for call in calls for answer in self._run([call], charged)]

    def _cached(self, cache: TeaCache, calls: list[Call], charged: list[Call] | None) -> list[Answer]:
        """The answers of a transformer's calls, of which the cache knows some."""
        name = calls[0].name
        answers: dict[str, Answer] = {}

        def run(some: list[Call]) -> Callable[[], Any]:
            return lambda: self._forward(charged or some, *batch.join(some), calls[0])

        def kept(some: list[Call]) -> list[Kept]:
            return [call.lane.kept.setdefault((name, call.ordinal), Kept()) for call in some]

        def sizes(some: list[Call]) -> list[int]:
            return [batch.batch_size(call) for call in some]

        ends = [call.lane.step in (0, call.lane.num_steps - 1) for call in calls]
        skips = self._ranks.same(cache.can_skip(name, kept(calls), sizes(calls), ends, run(calls)))
        for call, skip in zip(calls, skips, strict=True):
            call.skipped = skip
        if known := [call for call in calls if call.skipped]:
            answer = cache.reuse(name, kept(known), run(known))
            answers |= zip([call.id for call in known], batch.split(answer, known), strict=True)
        if unknown := [call for call in calls if not call.skipped]:
            answer = cache.compute(name, kept(unknown), sizes(unknown), run(unknown))
            answers |= zip([call.id for call in unknown], batch.split(answer, unknown), strict=True)
        return [answers[call.id] for call in calls]

    def _forward(
        self, charged: list[Call], args: tuple[Any, ...], kwargs: dict[str, Any], call: Call | None = None
    ) -> Any:
        """One run of the method that ``call`` (else the first charged) names."""
        call = call or charged[0]
        module = getattr(self._pipe, call.name)
        compute = module if call.method == "forward" else getattr(module, call.method)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if call.autocast is not None:
                stack.enter_context(torch.autocast(call.autocast[0], call.autocast[1]))
            if call.branch is not None and hasattr(module, "cache_context"):
                stack.enter_context(module.cache_context(call.branch))
            stack.enter_context(self._clock.measure(charged))
            return compute(*args, **kwargs)
