"""The gate: where a lane hands a heavy call to the engine loop and sleeps until the answer is there.

A lane's pipeline holds a :class:`GatedModule` in place of each of its modules. To the pipeline the stand-in is the
module itself (its class, config, dtype, device, parameters); only the calls that compute are turned into a
:class:`Call` that waits here. What the pipeline would *set* on the module stays in the lane's own stand-in, so that no
state of one lane touches another's.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from omni_ray.engine.deferred import answer, structure
from omni_ray.engine.replay import Computes, is_denoising
from omni_ray.errors import EngineFailed

if TYPE_CHECKING:
    from omni_ray.engine.lane import Lane

COMPUTING = ("forward", "encode", "decode", "generate", "get_image_features", "get_text_features")
"""The methods of a module that are handed to the gate; ``__call__`` counts as ``forward``."""

LATE_S = 120.0
"""How far a lane may be behind the same lane of the first rank: the time of one decode or text encoding, and more."""


class Call:
    """One waiting call of a lane: which module, which method, with what. The loop sets ``result`` or ``error``.

    ``id`` is the same on every rank: the lane's, and the call's number in it. ``is_denoising`` tells the forwards of
    the transformers from other calls, and ``ordinal`` counts them within a step of the lane. The lane sleeps until a
    call is answered, unless it is ``deferred``. A call that is ``alone`` shares its forward with none. ``skipped`` says
    whether a cache answers it, once that is decided.
    """

    __slots__ = (
        "alone",
        "args",
        "autocast",
        "branch",
        "deferred",
        "error",
        "id",
        "is_denoising",
        "key",
        "kwargs",
        "lane",
        "method",
        "name",
        "ordinal",
        "result",
        "skipped",
        "tokens",
        "wake",
    )

    def __init__(self, lane: Lane, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lane, self.name, self.method, self.args, self.kwargs = lane, name, method, args, kwargs
        self.id = f"{lane.id}/{lane.num_calls}"
        self.is_denoising = is_denoising(name, method)
        self.ordinal = lane.branches
        self.deferred = False
        self.skipped: bool | None = None
        self.branch: str | None = lane.branch
        self.autocast = _autocast_state(lane.device.type)
        self.key: Hashable = None
        self.alone = False
        self.tokens = 1
        self.result: Any = None
        self.error: BaseException | None = None
        self.wake = threading.Event()


class Gate:
    """Where lanes wait. A lane that has entered is either here, asleep, or between two calls.

    ``describe`` fills in a call's ``key`` and ``tokens``; it runs in the lane's thread, before the call is parked.
    ``defers`` lets both guidance branches of a step wait here together.
    """

    def __init__(self, describe: Callable[[Call], None], defers: bool = False) -> None:
        self._describe = describe
        self._defers = defers
        self._changed = threading.Condition()
        self._waiting: dict[str, Call] = {}
        self._lanes: set[str] = set()
        self._cancelled: set[str] = set()

    # -- the lane's side -------------------------------------------------------------------------------------------

    def enter(self, lane: Lane) -> None:
        with self._changed:
            self._lanes.add(lane.id)

    def leave(self, lane: Lane) -> None:
        """The lane needs the device no more: it is done, failed or cancelled."""
        with self._changed:
            self._lanes.discard(lane.id)
            self._cancelled.discard(lane.id)
            self._waiting = {call.id: call for call in self._waiting.values() if call.lane is not lane}
            self._changed.notify_all()

    def compute(self, lane: Lane, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Park the call, sleep, and return what the engine computed; raises what the engine raised.

        The first guidance branch of a step is not slept for (see :mod:`omni_ray.engine.deferred`).
        """
        call = Call(lane, name, method, args, kwargs)
        self._describe(call)
        spec = lane.structures.get(name) if self._defers and lane.begins_a_guided_step(call) else None
        if spec is not None:  # the pipeline goes on, and may change the dicts and lists that it passed
            call.deferred, (call.args, call.kwargs) = True, pytree.tree_map(lambda leaf: leaf, (args, kwargs))
        lane.count_call(call)
        with self._changed:
            if lane.id in self._cancelled:
                raise LaneCancelled(lane.id)
            self._waiting[call.id] = call
            self._changed.notify_all()
        if spec is not None:
            return answer(spec, functools.partial(self._result, call))
        result = self._result(call)
        if self._defers and method == "forward":
            lane.structures[name] = structure(result)
        return result

    def _result(self, call: Call) -> Any:
        """Sleep until the call is answered."""
        if call.deferred and not call.wake.is_set():
            with self._changed:
                if call.lane.id in self._cancelled:
                    raise LaneCancelled(call.lane.id)
                call.deferred = False
                self._changed.notify_all()
        call.wake.wait()
        if call.error is not None:
            raise call.error
        return call.result

    # -- the loop's side -------------------------------------------------------------------------------------------

    def has(self, lane_id: str) -> bool:
        """Whether the lane still needs the device."""
        return lane_id in self._lanes

    def take(self, call_ids: tuple[str, ...]) -> list[Call]:
        """These waiting calls, in this order. A rank that follows waits here for lanes that are behind.

        :raises EngineFailed: a call does not come. The ranks are no longer in step then.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting.keys() >= set(call_ids), timeout=LATE_S):
                raise EngineFailed(f"calls {sorted(set(call_ids) - self._waiting.keys())} did not come to the gate")
            return [self._waiting[call_id] for call_id in call_ids]

    def settle(
        self,
        is_full: Callable[[list[Call]], bool],
        has_news: Callable[[], bool],
        device_busy: Callable[[], bool],
        grace_s: float,
    ) -> list[Call]:
        """Wait until it is time to decide, and return the calls of the lanes that sleep.

        It is time when every lane sleeps, when ``is_full`` says that the parked calls fill a forward, or when the
        device has idled for ``grace_s`` while some lane was away. Nothing is returned if ``has_news`` says that
        something else is to be decided first.
        """
        idle_since: float | None = None
        with self._changed:
            while True:
                asleep = {call.lane.id for call in self._waiting.values() if not call.deferred}
                calls = [call for call in self._waiting.values() if call.lane.id in asleep]
                if has_news():
                    return []
                if len(asleep) == len(self._lanes) or is_full(calls):
                    return calls
                now = time.perf_counter()
                if device_busy():
                    idle_since = None
                elif idle_since is None:
                    idle_since = now
                elif now - idle_since >= grace_s:
                    return calls
                self._changed.wait(grace_s / 4)

    def wait(self, has_news: Callable[[], bool], timeout_s: float) -> None:
        """Sleep until a lane parks or leaves, or :meth:`nudge` is called."""
        with self._changed:
            if not self._waiting and not has_news():
                self._changed.wait(timeout_s)

    def nudge(self) -> None:
        """Wake the loop: something came in."""
        with self._changed:
            self._changed.notify_all()

    def release(self, calls: list[Call]) -> None:
        """Wake the lanes whose calls have their result or error."""
        with self._changed:
            for call in calls:
                self._waiting.pop(call.id, None)
        for call in calls:
            call.wake.set()

    def cancel(self, lane_id: str) -> None:
        """Unwind the lane: at once if it sleeps, else at its next call."""
        with self._changed:
            if lane_id not in self._lanes:
                return
            self._cancelled.add(lane_id)
            calls = [call for call in self._waiting.values() if call.lane.id == lane_id]
        for call in calls:
            call.error = LaneCancelled(lane_id)
        self.release(calls)


class LaneCancelled(BaseException):
    """Raised inside a lane whose request went away. Not an Exception: no pipeline may swallow it."""


class GatedModule:
    """Stands in for one module of a lane's pipeline. Reads go to the module, computing calls to the gate."""

    def __init__(self, gate: Computes, lane: Lane, name: str, module: torch.nn.Module) -> None:
        self.__dict__.update(_gate=gate, _lane=lane, _name=name, _module=module)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._gate.compute(self._lane, self._name, "forward", args, kwargs)

    def asking(self, other: Computes) -> GatedModule:
        """The same stand-in, whose calls go to ``other``."""
        return GatedModule(other, self._lane, self._name, self._module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name in COMPUTING and callable(value):
            return lambda *args, **kwargs: self._gate.compute(self._lane, self._name, name, args, kwargs)
        return value

    def modules(self) -> Iterator[torch.nn.Module]:
        """None. A pipeline looks through them for diffusers' own offload, each time that it asks for the device."""
        return iter(())

    @property
    def device(self) -> torch.device:
        """Where it computes: that is where its arguments belong, wherever its weights are."""
        device: torch.device = self._lane.device
        return device

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """The pipeline tells which guidance branch the next calls belong to; it is kept in the lane."""
        before, self._lane.branch = self._lane.branch, name
        try:
            yield
        finally:
            self._lane.branch = before

    def _reset_stateful_cache(self, *_: Any, **__: Any) -> None:
        """Pipelines reset the module's caches when they end; here other lanes are still using the module."""


class Exclusive:
    """Lets one lane at a time use a shared helper, such as a fast tokenizer, which keeps state while it works."""

    def __init__(self, helper: Any, lock: threading.RLock) -> None:
        self.__dict__.update(_helper=helper, _lock=lock)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._helper)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return self._helper(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._helper, name)
        if not callable(value):
            return value

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return value(*args, **kwargs)

        return locked


def _autocast_state(device_type: str) -> tuple[str, torch.dtype] | None:
    """The lane's autocast, which is kept per thread: the loop's thread has to take it over."""
    if torch.is_autocast_enabled(device_type):
        return device_type, torch.get_autocast_dtype(device_type)
    return None
