"""The base of every block of the spec."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class Block(BaseModel):
    """Base of every block: frozen, and an unknown key is an error.

    The message of a validator of several keys has a line per problem, which begins with the key that it means, so that
    `load` can point at it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    aliases: ClassVar[dict[str, str]] = {}
    """Other names that people know for the block's keys."""
