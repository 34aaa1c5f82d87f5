"""Server-sent events, cut out of the pieces of a body in which they come."""

from __future__ import annotations

DONE = b"[DONE]"


class Decoder:
    """Feed it the pieces of a body; each event comes out once, when its last byte is there."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The `data` of every event that ``piece`` completes; events without data are left out."""
        self._rest.append(piece)
        if b"\n" not in piece:  # in the middle of an image: joining now would copy it again with every piece
            return []
        text = b"".join(self._rest).replace(b"\r\n", b"\n")
        *blocks, rest = text.split(b"\n\n")
        self._rest = [rest]
        return [data for block in blocks if (data := _data(block)) is not None]


def _data(block: bytes) -> bytes | None:
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
