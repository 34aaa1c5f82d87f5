"""Pieces of error messages: values cut to a readable length, and the name that was probably meant."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def shown(value: object) -> str:
    """A value that came with a request, cut to what a message can hold."""
    return _REPR.repr(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` where a known name is close to ``name``, else nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
