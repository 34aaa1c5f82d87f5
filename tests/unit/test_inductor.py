"""What the compiler is told: it is followed, in what is compiled from then on."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.utils import run_and_get_code

from omni_ray.accel import inductor
from omni_ray.accel.compile import apply_compile
from omni_ray.accel.inductor import ENOUGH_ROWS, LONGEST_ROW
from omni_ray.config.spec import Compile
from tests.ranks import CPU, load


@pytest.fixture(autouse=True)
def taught() -> None:
    inductor.teach()
    inductor.teach()  # once is enough


def test_gelu_without_a_tanh() -> None:
    torch.manual_seed(0)
    for x in (torch.randn(64, 256) * 3, torch.randn(64, 256).bfloat16() * 3):
        made, (code,) = run_and_get_code(torch.compile(lambda x: torch.nn.functional.gelu(x, approximate="tanh")), x)
        wanted = torch.nn.functional.gelu(x.double(), approximate="tanh")
        assert "tanh" not in code
        assert (made - wanted).abs().max() < (1e-6 if x.dtype == torch.float32 else 0.02)
        exact = torch.compile(torch.nn.functional.gelu)(x)
        assert torch.allclose(exact, torch.nn.functional.gelu(x), atol=0.02)


def test_rows_stay_in_registers_where_their_length_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def stays(length: Any) -> bool:
        features: Any = SimpleNamespace(reduction_numel=length)
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction=False)

    monkeypatch.setattr(inductor, "_is_short", lambda *_: False)
    assert stays(sympy.Integer(LONGEST_ROW))
    assert not stays(sympy.Integer(LONGEST_ROW + 1))
    assert not stays(sympy.Symbol("n"))


def test_rows_are_whole_where_there_are_many() -> None:
    def parts(num_rows: int) -> int:
        return InductorChoices.reduction_split_factor(torch.device("cuda"), 589_824, num_rows, inner_reduction=False)

    assert parts(ENOUGH_ROWS) == 1


def test_what_was_compiled_without_these_rules_is_not_found(monkeypatch: pytest.MonkeyPatch, tiny_folder: Any) -> None:
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", "/kept")
    pipe = load(tiny_folder("flux"))
    for _ in range(2):
        apply_compile(pipe, Compile(mode="regional"), CPU)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"/kept/{inductor.RULES}"
