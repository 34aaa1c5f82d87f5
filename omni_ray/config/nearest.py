"""What somebody who misspelt a word most likely meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, choices: Iterable[str], similarity: float = 0.6) -> str | None:
    """The choice most like ``word``, if one is at least that similar (difflib's ratio, 0 to 1). Case does not count."""
    folded = {choice.lower(): choice for choice in choices}
    found = get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=similarity)
    return folded[found[0]] if found else None


def hint(word: str, choices: Iterable[str]) -> str:
    """``did you mean 'x'?``, or all choices where none is near."""
    choices = list(choices)
    near = nearest(word, choices)
    return f"did you mean {near!r}?" if near else "choose from " + ", ".join(map(repr, choices))
