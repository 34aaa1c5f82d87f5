"""Computes what waits at the gate: joins calls into one forward, runs it, and hands each call its slice."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from omni_ray.accel.apply import Accelerators
from omni_ray.accel.cache.teacache import Kept, TeaCache
from omni_ray.engine import batch
from omni_ray.engine.clock import DeviceClock
from omni_ray.engine.gate import Call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from omni_ray.accel.cache.cache_dit import CacheDit
    from omni_ray.engine.exchange import Answer, Exchange
    from omni_ray.engine.lockstep import Alone, Lockstep

logger = logging.getLogger(__name__)


class Forward:
    """Runs calls on ``pipe``'s modules. ``alone`` names the module methods whose answers could not be cut.

    On a cfg axis each part of the gang computes its own share of the calls, and ``exchange`` brings the answers of the
    others. Of the ``accelerators``, the caches answer the transformers' calls that need not be computed, and the
    offload brings a module that is not on the device.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        clock: DeviceClock,
        lockstep: Alone | Lockstep,
        exchange: Exchange | None = None,
        accelerators: Accelerators | None = None,
    ) -> None:
        accelerators = accelerators or Accelerators()
        self.alone: set[tuple[str, str]] = {(name, "forward") for name in accelerators.alone}
        self._lockstep = lockstep
        self._teacache = accelerators.teacache
        self._cache_dit = accelerators.cache_dit
        self._offload = accelerators.offload
        self._pipe = pipe
        self._clock = clock
        self._exchange = exchange

    def compute(self, shares: list[list[Call]]) -> list[Call]:
        """Answer every call of the shares, and return them. One call alone is cut along its batch if it can be."""
        calls = [call for share in shares for call in share]
        exchange = self._exchange
        if exchange is not None and len(shares) == exchange.size:
            share = shares[exchange.index]
            own = self._run(share, exchange, calls) if share else []
            told = exchange.all(own, [call.skipped for call in share])
            for share, (answers, skipped) in zip(shares, told, strict=True):
                self._answer(share, answers, skipped)
        elif exchange is not None and batch.is_even(calls, exchange.size):
            self._in_parts(calls[0], exchange)
        else:
            answers = self._run(calls, self._lockstep)
            self._answer(calls, answers, [call.skipped for call in calls])
        return calls

    @staticmethod
    def _answer(calls: list[Call], answers: list[Answer], skipped: list[bool | None]) -> None:
        for call, answer, is_skipped in zip(calls, answers, skipped, strict=True):
            call.lane.branches_skipped += bool(is_skipped)
            if isinstance(answer, BaseException):
                call.error = answer.with_traceback(None)  # its frames hold the activations of the forward
            else:
                call.result = answer

    def _in_parts(self, call: Call, exchange: Exchange) -> None:
        """One call whose batch is cut over the cfg axis, such as one that brings both guidance branches itself."""
        piece = batch.piece(call, exchange.index, exchange.size)
        with self._cache_dit.comparing_everywhere() if self._cache_dit else contextlib.nullcontext():
            own = self._run([piece], exchange, [call])
        told = exchange.all(own, [piece.skipped])
        parts, skipped = [answer for (answer,), _ in told], [each for _, (each,) in told]
        error = next((part for part in parts if isinstance(part, BaseException)), None)
        self._answer([call], [error or batch.concat(parts)], [all(skipped)])

    def _run(
        self, calls: list[Call], ranks: Alone | Lockstep | Exchange, charged: list[Call] | None = None
    ) -> list[Answer]:
        """The answers of ``calls``, computed in one forward if possible; its time goes to the calls ``charged``.

        ``ranks`` are those that compute the same calls. What fails together is tried one by one, so that no request
        fails for another.
        """
        first = calls[0]
        try:
            if self._teacache is not None and first.is_denoising:
                return self._cached(self._teacache, calls, ranks, charged)
            return batch.split(self._forward(charged or calls, *batch.join(calls), first), calls)
        except batch.Unsplittable as reason:
            logger.warning("%s.%s is computed one request at a time: %s", first.name, first.method, reason)
            self.alone.add((first.name, first.method))
        except Exception as error:
            self._check(error, ranks)
            if len(calls) == 1:
                logger.warning("%s.%s failed", first.name, first.method, exc_info=error)
                return [error]
            advice = "; lower batching.max_num_batched_tokens" if isinstance(error, torch.OutOfMemoryError) else ""
            logger.warning("%d requests failed together, and are computed alone: %s%s", len(calls), error, advice)
        return [answer for call in calls for answer in self._run([call], ranks, charged)]

    @staticmethod
    def _check(error: Exception, ranks: Alone | Lockstep | Exchange) -> None:
        """Raise where the failure is not the request's: another rank did not fail, or the device is lost."""
        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            raise error
        ranks.confirm_failure()

    def _cached(
        self, cache: TeaCache, calls: list[Call], ranks: Alone | Lockstep | Exchange, charged: list[Call] | None
    ) -> list[Answer]:
        """The answers of a transformer's calls, of which the cache knows some. Each call is decided about once."""
        name = calls[0].name
        answers: dict[str, Answer] = {}

        def run(some: list[Call]) -> Callable[[], Any]:
            return lambda: self._forward(charged or some, *batch.join(some), calls[0])

        def kept(some: list[Call]) -> list[Kept]:
            return [call.lane.kept.setdefault(("teacache", name, call.ordinal), Kept()) for call in some]

        def sizes(some: list[Call]) -> list[int]:
            return [batch.batch_size(call) for call in some]

        if new := [call for call in calls if call.skipped is None]:
            ends = [call.lane.is_at_an_end for call in new]
            skips = ranks.same(cache.can_skip(name, kept(new), sizes(new), ends, run(new)))
            for call, skip in zip(new, skips, strict=True):
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
            if self._offload is not None:
                self._offload.need(call.name)
            if self._cache_dit is not None and call.is_denoising:
                return self._reusing(self._cache_dit, call, lambda: compute(*args, **kwargs))
            return compute(*args, **kwargs)

    @staticmethod
    def _reusing(cache: CacheDit, call: Call, run: Callable[[], Any]) -> Any:
        """The answer of a forward that may use again what the last ones of this branch of the request left."""
        key = ("cache_dit", call.name, call.ordinal)
        if key not in call.lane.kept:
            call.lane.kept[key] = cache.contexts(call.name, call.lane.steps_of_window)
        with cache.using(call.name, call.lane.kept[key]) as skipped:
            answer = run()
        call.skipped = call.skipped or any(skipped)
        return answer
