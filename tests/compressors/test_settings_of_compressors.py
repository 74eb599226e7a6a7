"""Settings of compressors in parameter groups: names of their own, kept when others are loaded."""

import copy
import dataclasses
import math
import re
from collections.abc import Sequence
from functools import partial
from types import NoneType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    Field,
    GradientAverager,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SpectralAtomo,
    SymmetricQuantized,
    TensorCompressor,
    TopK,
    UniformQuantized,
    WorkerMismatchError,
)
from efsgd.algorithms.operators import Payload
from efsgd.randomness import Draws
from tests.compressors.made_compressors import make_workers
from tests.simulation import step_with
from tests.strategies import gaussian


@dataclasses.dataclass(frozen=True)
class Everything(TensorCompressor):
    """Sends all elements."""

    share: float = 0.5

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return (Field(shape.numel()),)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.flatten().clone(),)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return payload[0].view(shape)


def a_parameter() -> Tensor:
    x = torch.zeros(8, 6, requires_grad=True)
    x.grad = gaussian((8, 6), 1).float()
    return x


def an_optimizer(compressor: Any) -> ErrorFeedbackSGD:
    return ErrorFeedbackSGD([a_parameter()], lr=0.1, momentum=0.9, compressor=compressor)


def test_names_of_the_optimizer_s_own_settings_are_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Clashing(Everything):
        momentum: float = 0.3

    for make in (an_optimizer, lambda compressor: GradientAverager([a_parameter()], compressor)):
        with pytest.raises(ValueError, match=r"Clashing has settings \['momentum'\].*rename them"):
            make(Clashing())


@pytest.mark.parametrize(
    ("saved", "present"),
    [
        (TopK(density=0.1), RandomK(density=0.3)),
        (TopK(density=0.1), PowerSGD(2)),
        (PowerSGD(1), SpectralAtomo(2)),
        (PowerSGD(1), TopK(density=0.2)),
        (PowerSGD(1), LQSGD(3, bits=4)),
    ],
    ids=lambda compressor: type(compressor).__name__,
)
def test_another_compressor_keeps_its_settings_and_gets_errors_and_momenta(
    saved: Any, present: Any
) -> None:
    first, second = an_optimizer(saved), an_optimizer(present)
    for _ in range(3):
        first.step()
    state_dict = copy.deepcopy(first.state_dict())
    with pytest.warns(UserWarning, match=f"saved with {type(saved).__name__}, and this optimizer"):
        second.load_state_dict(state_dict)
    for name, value in present.settings().items():
        assert second.param_groups[0][name] == value
    [kept], [loaded] = first.state.values(), second.state.values()
    assert torch.equal(loaded["error"], kept["error"])
    assert torch.equal(loaded["momentum_buffer"], kept["momentum_buffer"])
    assert loaded["error"].any()
    second.step()
    again = an_optimizer(present)
    again.load_state_dict(second.state_dict())  # of the same kind now: no warning


def test_a_compressor_of_the_same_kind_takes_the_saved_settings() -> None:
    first, second = an_optimizer(TopK(density=0.1)), an_optimizer(TopK(density=0.5))
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["density"] == 0.1


@pytest.mark.parametrize("other", [RandomK(density=0.1), PowerSGD(1)])
def test_workers_with_different_compressors_are_told_which(other: Any) -> None:
    workers = make_workers([torch.zeros(8, 6)], 2, TopK(density=0.1))
    workers[1] = make_workers([torch.zeros(8, 6)], 1, other)[0]
    words = rf"worker 0: compressor=TopK.*worker 1: compressor={type(other).__name__}"
    with pytest.raises(WorkerMismatchError, match=words):
        step_with(workers, [[gaussian((8, 6), worker)] for worker in range(2)])


def test_a_class_is_no_compressor() -> None:
    with pytest.raises(TypeError, match=r"not its class: write TopK\(\.\.\.\)"):
        an_optimizer(TopK)


AT_LEAST_1, BOOL = "an integer of at least 1", "a bool"
OUT_OF_RANGE: list[tuple[Any, str, Any, str]] = [
    *((PowerSGD, name, "yes", BOOL) for name in ("alternating", "compile", "warm_start")),
    *((PowerSGDPlus, "refresh_every", value, AT_LEAST_1) for value in (0, 2.0, True)),
    (PowerSGDPlus, "svd", "fast", "'exact' or 'randomized'"),
    (PowerSGDPlus, "refresh_update", None, "'low_rank' or 'exact'"),
    (PowerSGDPlus, "rank", 0, AT_LEAST_1),
    (LQSGD, "rank", 0, AT_LEAST_1),
    *((LQSGD, "bits", b, "an integer from 2 to 32. 8 is us") for b in (0, 1, 33, 8.0, True, "8")),
    *(
        (LQSGD, "alpha", value, "a finite number of at least 0")
        for value in (-1.0, math.nan, math.inf, 10**400, True, "10", None)
    ),
    (LQSGD, "min_compression_rate", -1.0, "a number of at least 0"),
    (LQSGD, "warm_start", 1, BOOL),
    (LQSGD, "aggregation", "reduce", "'gather' or 'scatter'"),
    *((SpectralAtomo, "rank", value, AT_LEAST_1) for value in (0, 2.0, True)),
    (SpectralAtomo, "sampling", "all", "'atomo' or 'rejection'"),
    *((UniformQuantized, "bits", b, "an integer from 1 to 16") for b in (0, 17, 4.0, True)),
    (UniformQuantized, "stochastic", 1, BOOL),
    *((SymmetricQuantized, "bits", b, "an integer from 2 to 16") for b in (1, 17, 4.0, True)),
    *((kind, "seed", -1, "an integer of at least 0") for kind in (LQSGD, SpectralAtomo)),
    *((kind, "seed", None, "an integer of at least 0") for kind in (PowerSGD, UniformQuantized)),
    *(
        (partial(kind, density=0.1), "seed", value, "an integer of at least 0")
        for kind in (RandomK, RandomBlock)
        for value in (-1, 0.5, True, None)
    ),
    *((partial(TopK, density=0.1), "scope", s, "'tensor' or 'model'") for s in ("layer", None, 1)),
]


@pytest.mark.parametrize(("kind", "name", "value", "words"), OUT_OF_RANGE)
def test_settings_out_of_range_are_refused(kind: Any, name: str, value: Any, words: str) -> None:
    text = re.escape(f"Invalid {name}: {value!r}. Must be {words}")
    with pytest.raises(ValueError, match=text):
        kind(**{name: value})
    with pytest.raises(ValueError, match=text):
        ErrorFeedbackSGD([{"params": [a_parameter()], name: value}], compressor=kind())


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (PowerSGD(np.int64(2), torch.tensor(1.0), np.bool_(True), seed=torch.tensor(3)),
         PowerSGD(2, seed=3)),
        (LQSGD(torch.tensor(2), np.int32(4), np.float32(10)), LQSGD(2, 4)),
        (TopK(density=np.float64(0.25)), TopK(density=0.25)),
        (UniformQuantized(np.uint8(3), torch.tensor(True)), UniformQuantized(3, True)),
        (RandomK(rank=np.int64(1), seed=np.int64(5)), RandomK(rank=1, seed=5)),
    ],
)  # fmt: skip
def test_scalars_of_numpy_and_torch_are_numbers(given: Any, same: Any) -> None:
    ends = []
    for compressor, settings in ((given, {}), (same, {}), (same, dataclasses.asdict(given))):
        x = a_parameter()
        optimizer = ErrorFeedbackSGD([{"params": [x], **settings}], compressor=compressor)
        for _ in range(3):
            optimizer.step()
        ends.append(x.detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[2], ends[1])
    assert given.settings() == same.settings()
    assert all(
        type(value) in (int, float, bool, str, NoneType) for value in given.settings().values()
    )
    assert given.payload_bytes([(8, 6)]) == same.payload_bytes([(8, 6)])


NO_TUPLE, OTHER = "must return a tuple of tensors", r"Invalid payload.*announce"


class TestMistakesOfAuthors:
    def test_a_compressor_that_is_no_dataclass(self) -> None:
        class Plain(TensorCompressor):
            pass

        with pytest.raises(TypeError, match="Plain is no dataclass"):
            an_optimizer(Plain())

    def test_a_dataclass_that_is_not_frozen(self) -> None:
        @dataclasses.dataclass
        class Unfrozen(TensorCompressor):
            share: float = 0.5

        with pytest.raises(TypeError, match=r"cannot be hashed.*frozen=True"):
            an_optimizer(Unfrozen())

    @pytest.mark.parametrize("name", ["fields", "compress", "decompress"])
    def test_a_method_that_is_missing(self, name: str) -> None:
        inherited = getattr(TensorCompressor, name)
        partial = type("Partial", (Everything,), {name: inherited})
        without = dataclasses.make_dataclass("Partial", [], bases=(partial,), frozen=True)
        optimizer = GradientAverager([a_parameter()], without())
        with pytest.raises(NotImplementedError, match=rf"Partial must define {name}\(self"):
            optimizer.average_()

    @pytest.mark.parametrize("averages", [True, False])
    @pytest.mark.parametrize(
        ("payload", "error", "words"),
        [
            *((bad, TypeError, NO_TUPLE) for bad in (None, torch.zeros(48), [1, 2])),
            ((torch.zeros(2),), ValueError, OTHER),
            ((torch.zeros(48), torch.zeros(1)), ValueError, OTHER),
            ((torch.zeros(48, dtype=torch.float64),), ValueError, OTHER),
            ((torch.zeros(48, 1),), ValueError, OTHER),
        ],
    )
    def test_a_payload_that_is_not_what_was_announced(
        self, payload: Any, error: type[Exception], words: str, averages: bool
    ) -> None:
        class Wrong(Everything):
            def compress(self, delta: Tensor, draws: Draws) -> Payload:
                found: Payload = payload
                return found

        Wrong.averages = averages
        x = a_parameter()
        before = x.grad.clone()
        with pytest.raises(error, match=words):
            GradientAverager([x], Wrong()).average_()
        assert torch.equal(x.grad, before)

    def test_a_result_of_another_shape(self) -> None:
        class Flat(Everything):
            def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
                return payload[0]

        with pytest.raises(ValueError, match=r"shape is \[48\] and must be \[8, 6\]"):
            GradientAverager([a_parameter()], Flat()).average_()

    def test_codes_that_are_to_be_averaged(self) -> None:
        class Codes(Everything):
            averages = True

            def fields(self, shape: torch.Size) -> Sequence[Field]:
                return (Field(shape.numel(), bits=4),)

        with pytest.raises(ValueError, match="must be plain values"):
            GradientAverager([a_parameter()], Codes()).average_()
