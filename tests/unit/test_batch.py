"""Which calls may share a forward, and whether each gets its own answer back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from omni_ray.engine import batch
from omni_ray.engine.gate import Call


def call(*args: Any, name: str = "transformer", method: str = "forward", **kwargs: Any) -> Call:
    lane: Any = SimpleNamespace(id=str(id(args)), num_calls=0, branches=0, branch=None, device=torch.device("cpu"))
    made = Call(lane, name, method, args, kwargs)
    made.key, made.tokens = batch.signature(made), batch.num_tokens(made)
    return made


IDS = torch.arange(12.0).reshape(4, 3)


def test_equal_shapes_join_and_split() -> None:
    calls = [
        call(torch.full((b, 4, 2), float(b)), timestep=torch.full((b,), b / 10), ids=IDS.clone(), guidance=3.5)
        for b in (1, 2)
    ]
    assert calls[0].key == calls[1].key
    (hidden,), kwargs = batch.join(calls)
    assert hidden.shape == (3, 4, 2)
    assert kwargs["timestep"].tolist() == pytest.approx([0.1, 0.2, 0.2])
    assert kwargs["ids"].shape == (4, 3)
    assert kwargs["guidance"] == 3.5
    first, second = batch.split((hidden * 2,), calls)
    assert first[0].tolist() == [[[2.0, 2.0]] * 4]
    assert second[0].shape == (2, 4, 2)


@pytest.mark.parametrize(
    "other",
    [
        call(torch.zeros(1, 5, 2), ids=IDS, scale=1),
        call(torch.zeros(1, 4, 2, dtype=torch.float64), ids=IDS, scale=1),
        call(torch.zeros(1, 4, 2), ids=IDS + 1, scale=1),
        call(torch.zeros(1, 4, 2), ids=IDS, scale=2),
        call(torch.zeros(1, 4, 2), ids=IDS, scale=1, name="transformer_2"),
        call(torch.zeros(1, 4, 2), ids=None, scale=1),
        call(torch.zeros(1, 4, 2), ids=IDS, scale=1, img_ids=IDS[None]),
    ],
)
def test_what_differs_is_not_joined(other: Call) -> None:
    assert call(torch.zeros(1, 4, 2), ids=IDS, scale=1).key != other.key


def test_an_upright_and_a_lying_image_are_not_joined() -> None:
    upright, lying = (call(torch.zeros(1, 4, 2), img_ids=ids[None]) for ids in (IDS, IDS.flip(0)))
    assert upright.key != lying.key


def test_broadcast_tensors_are_widened() -> None:
    calls = [
        call(torch.zeros(2, 4, 2), timestep=torch.tensor([0.5])),
        call(torch.zeros(2, 4, 2), timestep=torch.tensor([0.7])),
    ]
    _, kwargs = batch.join(calls)
    assert kwargs["timestep"].tolist() == pytest.approx([0.5, 0.5, 0.7, 0.7])


def test_lists_of_tensors_join_by_concatenation() -> None:
    """Z-Image takes one tensor per image, and captions of unequal length."""
    calls = [call([torch.zeros(4, 1, 8, 8)], torch.tensor([0.1]), [torch.zeros(length, 6)]) for length in (3, 9)]
    assert calls[0].key == calls[1].key
    (images, timestep, captions), _ = batch.join(calls)
    assert len(images) == 2
    assert timestep.shape == (2,)
    assert [len(caption) for caption in captions] == [3, 9]
    assert batch.split(([torch.ones(1), torch.zeros(1)],), calls)[1] == ([torch.zeros(1)],)
    assert calls[0].key != call([torch.zeros(4, 1, 8, 16)], torch.tensor([0.1]), [torch.zeros(3, 6)]).key


def test_an_answer_without_a_batch_axis_is_not_cut() -> None:
    calls = [call(torch.zeros(1, 4, 2)), call(torch.zeros(1, 4, 2))]
    for answer in (torch.zeros(7), torch.tensor(1.0), object()):
        with pytest.raises(batch.Unsplittable):
            batch.split((answer,), calls)


@pytest.mark.parametrize(
    ("shapes", "patch", "tokens"),
    [
        ([(1, 4096, 64), (1, 512, 4096), (1, 768)], 1, 4608),
        ([(2, 16, 64, 64), (2, 77, 4096)], 2, 2 * 1024 + 2 * 77),
        ([(1, 16, 5, 60, 104)], 2, 7800),
    ],
)
def test_tokens_are_counted(shapes: list[tuple[int, ...]], patch: int, tokens: int) -> None:
    assert batch.num_tokens(call(*[torch.zeros(shape) for shape in shapes]), patch) == tokens


def test_the_budget_limits_a_batch_and_the_most_urgent_goes_first() -> None:
    calls = [call(torch.zeros(1, 100, 2)) for _ in range(4)]
    urgency = {id(c): -i for i, c in enumerate(calls)}
    assert batch.choose(calls, lambda c: urgency[id(c)], budget=250) == [calls[3], calls[2]]
    assert batch.choose(calls, lambda c: urgency[id(c)], budget=1) == [calls[3]]
    assert batch.is_full(calls[:2], 250)
    assert not batch.is_full(calls[:1], 250)


def test_methods_without_a_batch_axis_run_alone() -> None:
    calls = [call(torch.zeros(1, 100, 2), method="encode") for _ in range(2)]
    assert len(batch.choose(calls, lambda c: 0.0, budget=10_000)) == 1


def test_who_shares_with_none_waits_for_none() -> None:
    lonely = call(torch.zeros(1, 100, 2))
    lonely.alone = True
    assert batch.is_full([lonely], budget=10_000)


def branch(number: int, ordinal: int, rows: int = 1) -> Call:
    made = call(torch.zeros(rows, 4, 2))
    made.lane.number, made.ordinal = number, ordinal
    return made


def test_a_branch_of_a_request_is_always_computed_by_the_same_part() -> None:
    calls = [branch(number, ordinal) for number in range(3) for ordinal in range(2)]
    shares = batch.share_at_home(calls, lambda c: float(calls.index(c)), budget=10_000, num=2)
    assert shares == [[calls[0], calls[3], calls[4]], [calls[1], calls[2], calls[5]]]
    shares = batch.share_at_home(calls[:1], lambda c: 0.0, budget=10_000, num=2)
    assert shares == [calls[:1], []]
    shares = batch.share_at_home(calls[2:3], lambda c: 0.0, budget=10_000, num=2)
    assert shares == [[], calls[2:3]]


def test_a_call_with_both_branches_is_cut_and_has_no_company() -> None:
    both, other = branch(0, 0, rows=2), branch(1, 0)
    assert batch.share_at_home([both, other], lambda c: float(c is other), budget=10_000, num=2) == [[both]]
    first, second = (batch.piece(both, index, 2) for index in range(2))
    assert first.args[0].shape == second.args[0].shape == (1, 4, 2)
    assert (first.lane, first.id, both.args[0].shape[0]) == (both.lane, both.id, 2)
