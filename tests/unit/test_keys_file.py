"""The file of API keys: what is read of it, and how a line of it is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omni_ray.api import access
from omni_ray.cli import main
from omni_ray.config.keys import hash_of, new_key, read_keys
from omni_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: [{name: a}]", r"keys\.0\.hash: Field required"),
        ("keys: [{name: a, hash: 'omni-plain'}]", r"keys\.0\.hash: String should match"),
        ("keys: [{name: a, hash: x, limit: {}}]", r"keys\.0\.limit: Extra inputs"),
        (f"keys: [{{name: a, hash: '{hash_of('x')}'}}, {{name: a, hash: '{hash_of('y')}'}}]", "two keys have the name"),
        ("[", "is no YAML"),
        ("", "the file: Input should be"),
    ],
)
def test_a_broken_file_is_refused_without_its_values(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_keys(tmp_path / "keys")
    assert "omni-plain" not in refused.value.message


def test_a_made_key_is_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["key", "0x1"])
    assert end.value.code == 0
    out = capsys.readouterr().out.splitlines()
    (tmp_path / "keys").write_text(f"keys:\n{out[-1]}\n")
    found = access.Keys(tmp_path / "keys").find(out[1].strip())
    assert found is not None
    assert found.name == "0x1"
    assert out[1].strip() not in out[-1]


def test_the_file_may_be_a_link_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes mounts a secret."""
    monkeypatch.setattr(access, "LOOK_EVERY_S", 0.0)
    alice, bob = new_key(), new_key()
    for name, key in (("1", alice), ("2", bob)):
        (tmp_path / name).write_text(f"keys: [{{name: a, hash: '{hash_of(key)}'}}]")
    for each in "12":
        os.utime(tmp_path / each, (1, 1))
    (tmp_path / "keys").symlink_to("1")
    keys = access.Keys(tmp_path / "keys")
    assert keys.find(alice)
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").replace(tmp_path / "keys")
    assert (keys.find(alice), bool(keys.find(bob))) == (None, True)
