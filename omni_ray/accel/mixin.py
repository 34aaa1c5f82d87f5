"""Classes made from a class of diffusers and one of ours."""

from __future__ import annotations

from typing import Any

_made: dict[tuple[type, type], Any] = {}


def mixed(mixin: type, cls: type) -> Any:
    """``cls`` with the methods of ``mixin`` before its own, under its own name, which diffusers goes by; always the
    same one, which the compiler goes by.
    """
    if (mixin, cls) not in _made:
        _made[mixin, cls] = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
    return _made[mixin, cls]
