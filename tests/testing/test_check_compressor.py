"""`check_compressor` lets good compressors pass, and names the law that a broken one breaks."""

import dataclasses
import math
from typing import Any

import pytest

from efsgd import LQSGD, PowerSGD, PowerSGDPlus, RandomK, SpectralAtomo
from efsgd.algorithms.interfaces import Claims
from efsgd.testing import LAWS, CompressorLawError, check_compressor, check_in_processes
from efsgd.testing.laws import contracts_as_claimed, draws_as_claimed
from efsgd.testing.laws.claims import _divergence, _is_above
from efsgd.testing.trial import Trial
from tests.testing.broken_compressors import BROKEN
from tests.testing.broken_runs import FailsInProcesses, KnowsTheProcess
from tests.testing.broken_values import DecompressesPrivately, WrongBytes
from tests.testing.good_compressors import GOOD, Half, Largest, Rounded

#: What finds all that is broken here, in little time.
FEW: dict[str, Any] = {"world_sizes": (1, 2), "shapes": [(7, 6), (30,), (7, 6)], "processes": 0}


def name_of(value: object) -> str | None:
    return None if isinstance(value, str | dict) else type(value).__name__


WITHOUT_FEEDBACK = {**FEW, "error_feedback": False, "seed": 3}


@pytest.mark.parametrize(
    ("compressor", "options"),
    [
        *((compressor, FEW) for compressor in GOOD),
        (Largest(together=True), {"processes": 0}),
        (PowerSGD(rank=2), WITHOUT_FEEDBACK),
        (Rounded(), WITHOUT_FEEDBACK),
    ],
    ids=repr,
)
def test_good_compressors_pass(compressor: Any, options: dict[str, Any]) -> None:
    check_compressor(compressor, **options)


@pytest.mark.parametrize(("law", "compressor", "options"), BROKEN, ids=name_of)
def test_a_broken_compressor_is_caught_by_the_law_it_breaks(
    law: str, compressor: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(CompressorLawError) as caught:
        check_compressor(compressor, **FEW, **options)
    assert caught.value.law == law
    assert caught.value.compressor is compressor
    text = str(caught.value)
    assert f"breaks the law {law}: " in text
    assert type(compressor).__name__ in text
    assert text.endswith(".") and ".." not in text


@pytest.mark.parametrize(
    "compressor",
    [
        RandomK(density=1.0),
        SpectralAtomo(rank=6),
        PowerSGD(rank=6, min_compression_rate=0.0, warm_start=False),
    ],
    ids=name_of,
)
def test_what_sends_all_need_not_be_random_as_it_claims(compressor: Any) -> None:
    draws_as_claimed(Trial(compressor, shapes=[(7, 6)]))


def test_without_a_warm_start_low_rank_is_random() -> None:
    for kind in (PowerSGD, PowerSGDPlus, LQSGD):
        assert not kind(rank=2).claims().is_random
        assert kind(rank=2, warm_start=False).claims().is_random
    assert PowerSGDPlus(rank=2, svd="randomized").claims().is_random


def test_every_law_has_a_compressor_that_breaks_it() -> None:
    in_processes = {"agrees_in_processes"}  # below
    broken = {law for law, *_ in BROKEN}
    assert broken | in_processes == {law.__name__ for law in LAWS}
    assert all(law.__doc__ for law in LAWS)


def test_an_error_inside_a_compressor_is_shown_with_its_words_and_its_place() -> None:
    with pytest.raises(CompressorLawError, match="Only compress can draw private") as caught:
        check_compressor(DecompressesPrivately(), **FEW)
    assert "step 0 with 1 worker in torch.float32 raised RuntimeError" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_shape_is_named_if_it_is_only_one_that_differs() -> None:
    with pytest.raises(CompressorLawError, match=r"for shapes \[\(7, 6\)\], announced are 16"):
        check_compressor(WrongBytes(), **FEW)


@dataclasses.dataclass(frozen=True)
class Claiming(Half):
    claimed: float = 0.5

    def claims(self) -> Claims:
        return Claims(True, is_random=True, contraction=lambda shape: self.claimed)


@pytest.mark.parametrize("claimed", [-0.1, 1.1, math.nan])
def test_a_contraction_is_from_0_to_1(claimed: float) -> None:
    with pytest.raises(CompressorLawError, match="it claims δ"):
        contracts_as_claimed(Trial(Claiming(claimed=claimed), shapes=[(5, 4)]))


def test_the_bound_for_coins_is_chernoff_s() -> None:
    # A fair coin that shows heads in 100 of 100 throws: 100 ln 2 nats, more than 18.4.
    assert _divergence(1.0, 0.5) == pytest.approx(math.log(2))
    assert _divergence(0.3, 0.3) == 0.0
    assert _is_above([1.0] * 100, 0.5, is_smooth=False)
    assert not _is_above([1.0] * 25, 0.5, is_smooth=False)  # which is 17.3 nats
    # One element of a hundred is sent: that none was hit in 150 draws says nothing.
    assert not _is_above([1.0] * 150, 0.99, is_smooth=True)
    assert not _is_above([1.0] * 150, 1.0, is_smooth=True)


@pytest.mark.parametrize("name", ["world_sizes", "shapes", "steps", "processes"])
def test_arguments_out_of_range_are_refused(name: str) -> None:
    bad = {"world_sizes": (0,), "shapes": [(0, 2)], "steps": 0, "processes": -1}[name]
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        check_compressor(Half(), **{"processes": 0, name: bad})
    with pytest.raises(ValueError, match="Invalid processes"):
        check_in_processes([Half()], processes=0)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("compressor", "words"),
    [
        (KnowsTheProcess(), "of 2 processes: .* is not what it is in lockstep"),
        (FailsInProcesses(), "worker 1 of 2 processes: ValueError: only in a process"),
    ],
    ids=name_of,
)
def test_a_compressor_that_differs_or_fails_in_processes_is_named(
    compressor: Any, words: str
) -> None:
    with pytest.raises(CompressorLawError, match=words) as caught:
        check_in_processes([Half(), compressor, Half()], shapes=[(3, 2)], steps=2)
    assert caught.value.compressor is compressor
    assert caught.value.law == "agrees_in_processes"


def test_a_compressor_that_cannot_be_pickled_is_told_so() -> None:
    class Local(Half):
        pass

    with pytest.raises(CompressorLawError, match=r"cannot be pickled.*at the top of a module"):
        check_compressor(Local(), **{**FEW, "processes": 2})
