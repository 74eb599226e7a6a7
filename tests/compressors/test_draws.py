"""Random numbers of one tensor and step: drawn once where that takes long, and not kept longer."""

import hashlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd.compressors import random_k
from efsgd.compressors.random_k import RandomK
from efsgd.randomness import Draws, RowDraws, random_bits
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


def test_rows_draw_what_each_draws_by_itself() -> None:
    numbers, device = (5, 0, 2**40, 9), torch.device("cpu")
    rows = RowDraws(1, numbers, 3, 2)
    assert [rows[row] for row in range(len(rows))] == [Draws(1, n, 3, 2) for n in numbers]
    for name in ("shared_bits", "private_bits"):
        together = getattr(rows, name)(6, device)
        alone = [getattr(rows[row].as_rows(), name)(6, device) for row in range(len(rows))]
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(together[:, :4], getattr(rows, name)(4, device))


def test_bits_depend_on_seed_step_and_number_and_private_ones_on_the_worker() -> None:
    device, places = torch.device("cpu"), [(0, (0,), 0), (1, (0,), 0), (0, (1,), 0), (0, (0,), 1)]
    shared = [RowDraws(*place, worker).shared_bits(3, device).view(-1).tolist()
              for place in places for worker in (None, 0, 1)]  # fmt: skip
    private = [RowDraws(*place, worker).private_bits(3, device).view(-1).tolist()
               for place in places for worker in (0, 1)]  # fmt: skip
    assert shared[::3] == shared[1::3] == shared[2::3]
    values = [value for row in shared[::3] + private for value in row]
    assert len(set(values)) == 3 * 3 * len(places)
    with pytest.raises(RuntimeError, match="Only compress"):
        RowDraws(0, (0,), 0, None).private_bits(1, device)


def test_bits_are_those_of_the_published_generator() -> None:
    def scrambled(number: int) -> int:
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    stride, path, indices = 0x9E3779B97F4A7C15, (3, 4), (0, 7, 2**33)
    digest = hashlib.blake2b(b"3/4", digest_size=8).digest()
    starts = [scrambled((int.from_bytes(digest, "big") + i * stride) % 2**64) for i in indices]
    expected = [[scrambled((s + (j + 1) * stride) % 2**64) for j in range(5)] for s in starts]
    found = random_bits(path, torch.tensor(indices), 5)
    assert [[value % 2**64 for value in row] for row in found.tolist()] == expected


@pytest.mark.parametrize(("name", "few"), [("draw_subset", 0), ("draw_subsets", 2**12)])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_random_positions_are_drawn_once_in_a_step_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, error_feedback: bool, name: str, few: int
) -> None:
    drawn: list[weakref.ref[Tensor]] = []
    draw = getattr(random_k, name)

    def counting(*arguments: Any) -> Tensor:
        found: Tensor = draw(*arguments)
        drawn.append(weakref.ref(found))
        return found

    monkeypatch.setattr(random_k, name, counting)
    monkeypatch.setattr(random_k, "FEW", few)
    values = [gaussian(shape, 1) for shape in SHAPES]
    compressor = RandomK(density=0.3)
    workers = make_workers(values, 2, compressor, error_feedback=error_feedback)
    for step in range(3):
        step_with(workers, [[gaussian(s, worker, step) for s in SHAPES] for worker in range(2)])
        assert len(drawn) == (step + 1) * len(workers) * len(SHAPES)
        assert all(found() is None for found in drawn)
