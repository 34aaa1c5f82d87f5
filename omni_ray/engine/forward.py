"""Computes what waits at the gate: joins calls into one forward, runs it, and hands each call its slice."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from omni_ray.engine import batch
from omni_ray.engine.clock import DeviceClock
from omni_ray.engine.gate import Call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from omni_ray.engine.exchange import Answer, Exchange

logger = logging.getLogger(__name__)


class Forward:
    """Runs calls on ``pipe``'s modules. ``alone`` names the module methods whose answers could not be cut.

    On a cfg axis each part of the gang computes its own share of the calls, and ``exchange`` brings the answers of the
    others. ``confirm`` is called after a failure, and raises if it is the gang's and not the request's.
    """

    def __init__(
        self, pipe: DiffusionPipeline, clock: DeviceClock, confirm: Callable[[], None], exchange: Exchange | None
    ) -> None:
        self.alone: set[tuple[str, str]] = set()
        self._confirm = confirm
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
            self._confirm()
            own = error
        parts = [part for (part,) in exchange.all([own])]
        return next((part for part in parts if isinstance(part, BaseException)), None) or batch.concat(parts)

    def _run(self, calls: list[Call], charged: list[Call] | None = None) -> list[Answer]:
        """The answers of ``calls``, computed in one forward if possible; its time goes to the calls ``charged``."""
        first = calls[0]
        try:
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
            self._confirm()
            return [error] * len(calls)
        return [answer for call in calls for answer in self._run([call], charged)]

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
