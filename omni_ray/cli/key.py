"""``omni-ray key NAME``: makes an API key."""

from __future__ import annotations

import json

from pydantic import ValidationError

from omni_ray.config.keys import ApiKey, hash_of, new_key
from omni_ray.errors import ConfigError


def key(name: str) -> int:
    """Print a key, which is kept nowhere, and the line of the keys file that lets it in."""
    secret = new_key()
    try:
        made = ApiKey(name=name, hash=hash_of(secret))
    except ValidationError as error:
        raise ConfigError(f"NAME: came {name!r}; {error.errors(include_url=False)[0]['msg']}") from None
    print(f"the key, which is shown this once:\n  {secret}\n")
    print("its line under `keys:` in the file that api.keys_file names:")
    print(f"  - {{name: {json.dumps(made.name)}, hash: {json.dumps(made.hash)}}}")
    return 0
