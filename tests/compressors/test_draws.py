"""Random numbers of one tensor and step: drawn once where that takes long, and not kept longer."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd.compressors import random_k
from efsgd.compressors.random_k import RandomK, draw_subset
from efsgd.randomness import Draws
from tests.compressors.made_compressors import make_workers
from tests.simulation import step_with
from tests.strategies import gaussian

SHAPES = [(12, 10), (40,), (5, 6, 3)]


def numbers(generator: torch.Generator) -> Tensor:
    return torch.rand(5, generator=generator)


def test_what_is_made_once_is_made_from_the_shared_numbers() -> None:
    expected = numbers(Draws(1, 2, 3, None).shared())
    forgetful, remembering = Draws(1, 2, 3, None), Draws(1, 2, 3, None, {})
    assert torch.equal(forgetful.shared_once("five", numbers), expected)
    assert forgetful.shared_once("five", numbers) is not forgetful.shared_once("five", numbers)
    first = remembering.shared_once("five", numbers)
    assert torch.equal(first, expected)
    assert remembering.shared_once("five", numbers) is first


def test_what_is_remembered_is_that_of_one_seed_tensor_step_and_key() -> None:
    drawn: dict[Any, Any] = {}
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    made = [Draws(*place, worker, drawn) for place in places for worker in (None, 0, 1)]
    found = [each.shared_once("five", numbers) for each in made]
    assert len({tuple(values.tolist()) for values in found}) == len(places) == len(drawn)
    other = made[0].shared_once("six", lambda generator: torch.rand(6, generator=generator))
    assert len(other) == 6


def test_private_numbers_are_not_for_decompressing() -> None:
    with pytest.raises(RuntimeError, match="Only compress"):
        Draws(0, 0, 0, None).private()


def test_draws_that_remember_are_equal_to_those_that_do_not() -> None:
    drawn: dict[Any, Any] = {"some": "thing"}
    assert Draws(1, 2, 3, None, drawn) == Draws(1, 2, 3, None)
    assert hash(Draws(1, 2, 3, None, drawn)) == hash(Draws(1, 2, 3, None))


@pytest.mark.parametrize("error_feedback", [True, False])
def test_random_positions_are_drawn_once_in_a_step_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, error_feedback: bool
) -> None:
    drawn: list[weakref.ref[Tensor]] = []

    def counting(numel: int, k: int, generator: torch.Generator) -> Tensor:
        found = draw_subset(numel, k, generator)
        drawn.append(weakref.ref(found))
        return found

    monkeypatch.setattr(random_k, "draw_subset", counting)
    values = [gaussian(shape, 1) for shape in SHAPES]
    compressor = RandomK(density=0.3)
    workers = make_workers(values, 2, compressor, error_feedback=error_feedback)
    for step in range(3):
        step_with(workers, [[gaussian(s, worker, step) for s in SHAPES] for worker in range(2)])
        assert len(drawn) == (step + 1) * len(workers) * len(SHAPES)
        assert all(found() is None for found in drawn)
