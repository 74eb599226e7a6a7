"""Changes of ranks use the memory of errors and scratch again, and nothing else's."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import NonFiniteGradientError, PowerSGDOptimizer
from tests.strategies import examples

# Three of as many elements, so that one fits where another was; the first and the third share a
# batch where they share a rank, and then lie side by side.
SHAPES = [(8, 6), (6, 8), (8, 6), (5,)]


def made() -> tuple[list[Tensor], PowerSGDOptimizer]:
    parameters = [torch.zeros(s, device="cpu", requires_grad=True) for s in SHAPES]
    return parameters, PowerSGDOptimizer(parameters, lr=0.1, momentum=0.5, rank=3)


def set_ranks(optimizer: PowerSGDOptimizer, ranks: Sequence[int | None]) -> None:
    """Of the first parameters; None sends one uncompressed."""
    ranks = ranks[: len(optimizer.param_groups[0]["params"])]
    rates = tuple(math.inf if rank is None else 0.0 for rank in ranks)
    given = tuple(1 if rank is None else rank for rank in ranks)
    optimizer.param_groups[0]["per_parameter"] = {"rank": given, "min_compression_rate": rates}


def step(parameters: Sequence[Tensor], optimizer: PowerSGDOptimizer, number: int) -> None:
    generator = torch.Generator("cpu").manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, device="cpu")
    optimizer.step()


def addresses(parameters: Sequence[Tensor], optimizer: PowerSGDOptimizer) -> set[int]:
    """Of the buffers in which there are errors."""
    states = [optimizer.state[parameter] for parameter in parameters]
    return {s["error"].untyped_storage().data_ptr() for s in states if "error" in s}


def test_a_change_of_ranks_takes_no_other_memory_for_errors() -> None:
    parameters, optimizer = made()
    seen = set()
    for number, ranks in enumerate([(3, 3, 3), (3, 3, 3), (1, 1, 1), (2, 1, 2), (3, 3, 3)]):
        set_ranks(optimizer, (*ranks, None))
        step(parameters, optimizer, number)
        seen |= addresses(parameters, optimizer)
    assert len(seen) == 2  # errors and scratch, by turns


levels = st.tuples(*[st.sampled_from([1, 2, 3, None])] * 3, st.just(None))


@example([((1, 1, 1, None), 0), ((1, 1, 2, None), 0)])  # another order in the buffer
@examples(40)
@given(st.lists(st.tuples(levels, st.integers(0, 2**3 - 1)), min_size=2, max_size=5))
def test_nothing_differs_from_an_optimizer_that_is_loaded_and_has_new_memory(
    changes: Sequence[tuple[Sequence[int | None], int]],
) -> None:
    runs = [made(), made()]
    for number, (ranks, frozen) in enumerate(changes):
        for parameters, optimizer in runs:
            for position, parameter in enumerate(parameters):
                parameter.requires_grad = not frozen >> position & 1
            set_ranks(optimizer, ranks)
        fresh = runs[1][1]
        fresh.load_state_dict(copy.deepcopy(fresh.state_dict()))
        for parameters, optimizer in runs:
            step(parameters, optimizer, number)
        (parameters, optimizer), (others, other) = runs
        for own, like in zip(parameters, others, strict=True):
            assert torch.equal(own, like)
            assert optimizer.state[own].keys() == other.state[like].keys()
            for name, value in optimizer.state[own].items():
                assert torch.equal(value, other.state[like][name]), name


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("position", range(3))
def test_the_error_of_a_parameter_that_was_taken_out_stays_what_it_is(
    position: int, is_replaced: bool
) -> None:
    parameters, optimizer = made()
    set_ranks(optimizer, (1, 1, 1, None))
    step(parameters, optimizer, 0)
    error = optimizer.state[parameters[position]]["error"]
    before = error.clone()
    new = [torch.zeros_like(parameters[position], requires_grad=True)] if is_replaced else []
    left = [*parameters[:position], *new, *parameters[position + 1 :]]
    optimizer.param_groups[0].update(params=left, per_parameter=None, rank=2)
    for number in range(1, 4):
        step(left, optimizer, number)
    assert bool(before.any())
    assert torch.equal(error, before)


def step_that_sends_all(parameters: Sequence[Tensor], optimizer: PowerSGDOptimizer) -> None:
    """Checks that what arrives is the gradient and the error that was kept."""
    states = [optimizer.state[parameter] for parameter in parameters]
    errors = [state["error"].double() for state in states]
    momenta = [state["momentum_buffer"].double() for state in states]
    assert all(bool(error.any()) for error in errors)
    set_ranks(optimizer, (8, 8, 8, None))
    step(optimizer.param_groups[0]["params"], optimizer, 1)
    for own, m, e in zip(parameters, momenta, errors, strict=True):
        assert own.grad is not None
        found = optimizer.state[own]["momentum_buffer"].double()
        # Rounding of float32 in sums of a few numbers of about 1.
        assert torch.allclose(found, 0.5 * m + own.grad.double() + e, rtol=0, atol=1e-5)


def test_without_error_feedback_errors_are_sent_and_not_written_over() -> None:
    parameters, optimizer = made()
    optimizer.param_groups[0]["params"] = parameters[:1]  # alone in its buffer
    set_ranks(optimizer, (1,))
    step(parameters, optimizer, 0)
    optimizer.param_groups[0]["error_feedback"] = False
    parameters[0].grad = torch.full_like(parameters[0], math.nan)
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    step_that_sends_all(parameters[:1], optimizer)


def test_where_a_parameter_has_got_another_shape_the_errors_of_others_are_kept() -> None:
    parameters, optimizer = made()
    set_ranks(optimizer, (1, 1, 1, None))
    step(parameters, optimizer, 0)
    parameters[0].grad = None
    parameters[0].data = torch.zeros(9, 7, device="cpu")
    del optimizer.state[parameters[0]]
    step_that_sends_all(parameters[1:3], optimizer)
    assert optimizer.state[parameters[0]]["error"].shape == (9, 7)
