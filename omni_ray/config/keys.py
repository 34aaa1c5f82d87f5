"""The file of API keys that ``api.keys_file`` names: who may call, and how much each may ask for.

A key is 256 random bits, so the file keeps its plain SHA-256: nobody can guess what it is the hash of. Slow, salted
hashes are for passwords, which can be guessed; here they would only cost every request their time.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from omni_ray.config.block import Block, Positive
from omni_ray.errors import ConfigError

PREFIX = "omni-"


class KeyLimits(Block):
    """What one key may ask for; null does not bound it."""

    requests_per_minute: Positive | None = Field(
        None, description="POST requests in any 60 seconds, over all ingress replicas; more get a 429."
    )
    outstanding_s: float | None = Field(
        None,
        gt=0,
        description="Estimated device seconds of the key's unfinished DiT jobs; more get a 429. A key without any may "
        "always have one.",
    )
    max_pixels: Positive | None = Field(None, description="Width x height; more gets a 400.")
    max_frames: Positive | None = Field(None, description="Frames of a video; more get a 400.")
    max_tokens: Positive | None = Field(
        None,
        description="Tokens of all answers of a request to an AR model; more get a 400. A request that leaves its "
        "length open gets at most these.",
    )
    models: list[str] | None = Field(
        None, description="Models, by name or `name:profile`, that it may use; others get a 403. `[]` is none of them."
    )


class ApiKey(Block):
    """One key."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@/-]*$", max_length=64)] = Field(
        description="What the audit log and messages call it."
    )
    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] = Field(
        description="SHA-256 of the key, as `omni-ray key NAME` prints it."
    )
    limits: KeyLimits = Field(default_factory=KeyLimits, description="What it may ask for.")


class KeysFile(Block):
    """The whole file, YAML or JSON."""

    keys: list[ApiKey] = Field(description="The keys that are let in.")

    @model_validator(mode="after")
    def _unique(self) -> Self:
        for what in ("name", "hash"):
            values = [getattr(key, what) for key in self.keys]
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"two keys have the {what} {twice[0]!r}; remove one")
        return self


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What the file keeps of ``key``."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises ConfigError with a line per problem; no line shows a value of the file."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api.keys_file: {path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        where = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"api.keys_file: {path}{where} is no YAML: {error.problem}") from None
    try:
        return tuple(KeysFile.model_validate(data).keys)
    except ValidationError as error:
        lines = [
            f"api.keys_file: {path}: {'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}"
            for each in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigError("\n".join(lines)) from None
