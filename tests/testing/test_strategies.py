"""The public strategies give what they say, and hypothesis is needed by them alone."""

import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd.testing import strategies
from efsgd.testing.gradients import EVERY_KIND
from tests.strategies import examples
from tests.test_floors import FILES, IMPORTS

SHAPES = st.just([(8, 6), (5,), (8, 6)])


@examples(50)
@given(strategies.gradients())
def test_all_workers_have_gradients_of_the_same_shapes(made: list[list[Tensor]]) -> None:
    assert 1 <= len(made) <= 8
    shapes = [gradient.shape for gradient in made[0]]
    assert 1 <= len(shapes) <= 5
    for own in made:
        assert [gradient.shape for gradient in own] == shapes
        for gradient in own:
            assert gradient.dtype == torch.float64
            assert gradient.device.type == "cpu"
            assert gradient.float().isfinite().all()


def magnitudes(made: list[list[Tensor]]) -> list[float]:
    return [float(own[0].abs().max()) for own in made]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_gradients_are_of_the_kind_that_was_asked_for(kind: str) -> None:
    @settings(max_examples=5)
    @given(strategies.gradients(SHAPES, st.just(3), kinds=[kind]))
    def are_of_the_kind(made: list[list[Tensor]]) -> None:
        assert [len(own) for own in made] == [3, 3, 3]
        flat = torch.stack([own[0].flatten() for own in made])
        nonzero = flat.count_nonzero(dim=1).tolist()
        ranks = [int(torch.linalg.matrix_rank(own[0])) for own in made]
        sizes = flat.abs().amax(dim=1)
        expected = {"huge": 1e30, "tiny": 1e-30}.get(kind, 1.0)
        if kind == "scaled":
            assert [round(math.log10(size / 2.5)) for size in sizes.tolist()] == [-3, 0, 3]
        elif kind not in ("zero", "sparse", "constant"):
            assert (sizes / expected).log10().abs().max() < 1.5
        if kind == "zero":
            assert nonzero == [0, 0, 0]
        elif kind == "one_hot":
            assert nonzero == [1, 1, 1]
            assert flat.sum() == 3
        elif kind == "sparse":
            assert max(nonzero) < 24
        elif kind == "constant":
            assert (flat == flat[:, :1]).all()
        elif kind == "rank_deficient":
            assert ranks == [1, 1, 1]
        else:
            assert nonzero == [48, 48, 48]
            assert ranks == [6, 6, 6]
        assert kind in ("zero", "one_hot") or not torch.equal(flat[0], flat[1]) or not flat.any()

    are_of_the_kind()


@pytest.mark.parametrize(
    "condition",
    [
        lambda tensor: tensor.numel() == 0,
        lambda tensor: tensor.ndim == 5,
        lambda tensor: tensor.numel() > 0 and tensor.abs().max() > 1e29,
        lambda tensor: tensor.numel() > 9 and tensor.count_nonzero() == 1,
    ],
    ids=["empty", "five dimensions", "huge", "one element"],
)
def test_tensors_are_of_any_shape_and_kind(condition: Callable[[Tensor], bool]) -> None:
    only_find = settings(max_examples=500, phases=[Phase.generate])
    find(strategies.tensors(), condition, settings=only_find)


def test_a_tensor_has_the_shape_and_kind_that_were_asked_for() -> None:
    @settings(max_examples=3)
    @given(strategies.tensors(st.just((2, 3)), kinds=["zero"]))
    def is_zero(tensor: Tensor) -> None:
        assert torch.equal(tensor, torch.zeros(2, 3).double())

    is_zero()


def test_no_other_module_needs_hypothesis() -> None:
    assert [name for name, file in FILES.items() if needs_hypothesis(file)] == [strategies.__name__]
    assert [name for name, to in IMPORTS.items() if strategies.__name__ in to] == []


def needs_hypothesis(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return re.search(r"^\s*(import|from) hypothesis\b", text, re.MULTILINE) is not None


def test_without_hypothesis_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, strategies.__name__)
    with pytest.raises(ImportError, match="pip install hypothesis"):
        importlib.import_module(strategies.__name__)
