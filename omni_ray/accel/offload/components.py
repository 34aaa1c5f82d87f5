"""Model-level offload and sequential exclusion: whole components live in host memory, and one at a time comes to the
device when it is called."""

from __future__ import annotations

from collections.abc import Mapping

from omni_ray.accel.offload.packed import Packed
from omni_ray.accel.offload.transfers import Recorder

BYTES_PER_S = 20e9
MIN_SWITCH_S = 0.01
"""What a switch of components is reckoned to take: a PCIe copy, and never less than this."""


class Components:
    """``packed`` are the components that live in host memory, by name."""

    def __init__(self, packed: Mapping[str, list[Packed]], recorder: Recorder) -> None:
        self._packed = packed
        self._recorder = recorder
        self.resident: str | None = None

    def need(self, name: str) -> None:
        """Have component ``name`` on the device, in the place of the one that is there. Copies nothing back."""
        if name == self.resident or name not in self._packed:
            return
        self.evict()
        num_bytes = sum(each.num_bytes for each in self._packed[name])
        self.resident = name
        try:
            with self._recorder.copy(num_bytes, hidden=False):
                for each in self._packed[name]:
                    each.bring()
        except BaseException:
            self.evict()  # what has come of it already
            raise

    def evict(self) -> None:
        """Free the device of the component that is there."""
        for each in self._packed.get(self.resident or "", ()):
            each.park()
        self.resident = None

    def switch_s(self, name: str) -> float:
        """About how many seconds it takes to bring ``name``; 0 where it need not be brought."""
        if name == self.resident or name not in self._packed:
            return 0.0
        return max(MIN_SWITCH_S, sum(each.num_bytes for each in self._packed[name]) / BYTES_PER_S)
