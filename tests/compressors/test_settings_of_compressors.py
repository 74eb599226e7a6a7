"""Settings of compressors in parameter groups: names of their own, kept when others are loaded."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    Field,
    GradientAverager,
    PowerSGD,
    RandomK,
    SpectralAtomo,
    TensorCompressor,
    TopK,
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


def test_workers_with_different_compressors_are_told_which() -> None:
    workers = make_workers([torch.zeros(8, 6)], 2, TopK(density=0.1))
    workers[1] = make_workers([torch.zeros(8, 6)], 1, RandomK(density=0.1))[0]
    with pytest.raises(WorkerMismatchError, match=r"compressor=TopK.*compressor=RandomK"):
        step_with(workers, [[gaussian((8, 6), worker)] for worker in range(2)])


def test_a_class_is_no_compressor() -> None:
    with pytest.raises(TypeError, match=r"not its class: write TopK\(\.\.\.\)"):
        an_optimizer(TopK)


class TestMistakesOfAuthors:
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
    @pytest.mark.parametrize("payload", [None, torch.zeros(48), [1, 2]], ids=type)
    def test_a_payload_that_is_no_tuple_of_tensors(self, payload: Any, averages: bool) -> None:
        class Wrong(Everything):
            def compress(self, delta: Tensor, draws: Draws) -> Payload:
                found: Payload = payload
                return found

        Wrong.averages = averages
        with pytest.raises(TypeError, match="must return a tuple of tensors"):
            GradientAverager([a_parameter()], Wrong()).average_()

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
