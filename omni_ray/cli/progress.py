"""Progress lines: they change in place on a terminal; elsewhere each change of phase is a new line."""

from __future__ import annotations

import shutil
import time
from typing import TextIO


class ProgressLines:
    """A line per name, in the order of ``names``."""

    def __init__(self, names: list[str], out: TextIO) -> None:
        self._out = out
        self._width = max(map(len, names), default=0)
        self._state = dict.fromkeys(names, (0.0, "waiting", ""))
        self._since = time.monotonic()
        self._num_drawn = 0

    def update(self, name: str, phase: str, detail: str) -> None:
        """``name`` is in ``phase``; ``detail`` may change often. The clock of a line stops when it is ready."""
        seconds, last, _ = self._state[name]
        if phase != last or phase != "ready":
            seconds = time.monotonic() - self._since
        self._state[name] = (seconds, phase, " ".join(detail.split()))
        if phase != last and not self._out.isatty():
            print(self._line(name), file=self._out, flush=True)

    def draw(self) -> None:
        """Put the lines where they were. Does nothing where lines cannot be put anywhere."""
        if not self._out.isatty():
            return
        columns = shutil.get_terminal_size().columns
        up = f"\x1b[{self._num_drawn}A" if self._num_drawn else ""
        lines = "".join(f"\x1b[2K{self._line(name)[: columns - 1]}\n" for name in self._state)
        print(up + lines, end="", file=self._out, flush=True)
        self._num_drawn = len(self._state)

    def _line(self, name: str) -> str:
        seconds, phase, detail = self._state[name]
        return f"{seconds:4.0f} s  {name.ljust(self._width)}  {phase}  {detail}".rstrip()
