"""An error of one worker is heard by all: nobody waits, and nothing changes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import (
    CollectiveError,
    ErrorFeedbackSGD,
    NonFiniteGradientError,
    PowerSGD,
    PowerSGDOptimizer,
    TopK,
    WorkerMismatchError,
)
from efsgd.algorithms.operators import Payload
from efsgd.layout import Blocks
from efsgd.profiling import Phases
from efsgd.randomness import Draws
from efsgd.testing import LockstepError, lockstep, step_together
from tests.engine.test_handshake import change
from tests.simulation import (
    a_run,
    bits,
    parameters_of,
    replicated,
    set_gradients,
    snapshot,
    step_with,
    train,
)


def replace_momentum(optimizer: PowerSGDOptimizer) -> None:
    optimizer.state[parameters_of(optimizer)[0]]["momentum_buffer"] = torch.zeros(3)


MISTAKES: dict[str, Callable[[PowerSGDOptimizer], object]] = {
    "another momentum": replace_momentum,
    "rank 0": change("rank", 0),
    "infinite lr": change("lr", math.inf),
    "no rank": lambda optimizer: optimizer.param_groups[0].pop("rank"),
    "differentiable": change("differentiable", True),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("options", [{}, {"check_every": 2}, {"start_compressing_at": 2}], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_error_on_one_worker_keeps_nobody_waiting(
    steps: int, options: dict[str, int], mistake: Callable[[PowerSGDOptimizer], object]
) -> None:
    workers, scenario = a_run(3, **options)
    train(scenario, range(steps), workers)
    set_gradients(workers, scenario.gradients(steps))
    group, state = workers[1].param_groups[0], workers[1].state[parameters_of(workers[1])[0]]
    kept = dict(group), dict(state)
    mistake(workers[1])
    before = bits(snapshot([workers[0], workers[2]]))
    for _ in range(2):
        with pytest.raises((CollectiveError, WorkerMismatchError), match="worker 1") as caught:
            step_together(workers)
        own, others = caught.value.__notes__
        assert own.startswith(("worker 1: ValueError", "worker 1: NotImplementedError"))
        assert type(caught.value).__name__ in others
    assert bits(snapshot([workers[0], workers[2]])) == before
    group.update(kept[0])
    state.update(kept[1])
    step_with(workers, scenario.gradients(steps))


def test_a_sparse_gradient_that_comes_with_a_change_elsewhere_is_known_to_all() -> None:
    workers, scenario = a_run(3)
    step_with(workers, scenario.gradients(0))
    for undo in (False, True):  # a change, then an error
        set_gradients(workers, scenario.gradients(1))
        parameter = parameters_of(workers[2])[0]
        parameter.grad = torch.ones_like(parameter).to_sparse()
        workers[1].param_groups[0]["rank"] = 0 if undo else 1
        with pytest.raises((CollectiveError, WorkerMismatchError), match="worker 1"):
            step_together(workers)
    workers[1].param_groups[0]["rank"] = 2
    step_with(workers, scenario.gradients(1))
    step_with(workers, scenario.gradients(2))


class Failing(PowerSGD):
    """Its aggregators raise while `fails` is set, unless there is nothing to compress."""

    fails = False

    def aggregator(self, *arguments: Any) -> Any:
        made = super().aggregator(*arguments)
        compress = made.compress

        def failing(deltas: Blocks, step: int) -> Any:
            if self.fails and bool(deltas.flat.any()):
                raise MemoryError("no memory left")
            return (yield from compress(deltas, step))

        made.compress = failing
        return made


def failing_top_k() -> TopK:
    """Of a class of its own, which raises while `fails` is set, whatever it is given."""

    class FailingTopK(TopK):
        fails = False

        def compress(self, delta: Tensor, draws: Draws) -> Payload:
            if self.fails:
                raise MemoryError("no memory left")
            return super().compress(delta, draws)

        def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
            if self.fails:
                raise MemoryError("no memory left")
            return super().decompress(payload, shape, draws)

    return FailingTopK(density=0.1)


@pytest.mark.parametrize("make", [lambda: Failing(rank=2), failing_top_k], ids=["rank", "top k"])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_what_a_compressor_raises_on_one_worker_reaches_all(
    make: Callable[[], Any], error_feedback: bool
) -> None:
    _, scenario = a_run(3)
    compressors = [make() for _ in range(3)]
    options: dict[str, Any] = {"lr": 0.1, "error_feedback": error_feedback}
    workers = [
        ErrorFeedbackSGD(
            [p.requires_grad_() for p in scenario.parameters()], compressor=c, **options
        )
        for c in compressors
    ]
    step_with(workers, scenario.gradients(0))
    set_gradients(workers, scenario.gradients(1))
    before = bits(snapshot(workers))
    owner = compressors[1] if make is not failing_top_k else type(compressors[1])
    owner.fails = True
    with pytest.raises(CollectiveError, match="say themselves why: worker 1") as caught:
        step_together(workers)
    assert caught.value.__notes__[0] == "worker 1: MemoryError: no memory left"
    assert bits(snapshot(workers)) == before
    owner.fails = False
    step_together(workers)
    assert replicated(workers[0]) == replicated(workers[1]) == replicated(workers[2])


def test_a_worker_without_a_scaler_skips_with_those_that_have_one() -> None:
    # As one that has joined: it steps without gradients, and its scaler does not ask for it.
    workers, scenario = a_run(3)
    step_with(workers, scenario.gradients(0))
    for overflows in (True, False):
        set_gradients(workers, scenario.gradients(1))
        for parameter in parameters_of(workers[0]):
            parameter.grad = None
        for worker in workers[1:]:
            worker.grad_scale = torch.tensor(2.0)
            worker.found_inf = torch.tensor(0.0)
        if overflows:
            workers[2].found_inf += 1
        before = bits(snapshot(workers))
        exchanges = [worker.exchange(3, place) for place, worker in enumerate(workers)]
        assert lockstep(exchanges).results == [not overflows] * 3
        assert (bits(snapshot(workers)) == before) == overflows


class FailingPhases(Phases):
    """Raises once, at the beginning of a phase."""

    fails_at = "nowhere"

    def __call__(self, name: str) -> Any:
        if name.startswith(self.fails_at):
            self.fails_at = "nowhere"
            raise MemoryError("no memory left")
        return super().__call__(name)


def fail_at(optimizer: ErrorFeedbackSGD, phase: str) -> None:
    phases: Any = optimizer.engine.phases
    phases.__class__ = FailingPhases
    phases.fails_at = phase


@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 1}], ids=["one bucket", "several"])
@pytest.mark.parametrize("phase", ["Alg. 1, line 5", "Alg. 1, line 6"])
def test_an_error_between_p_and_q_is_found_by_all(phase: str, options: dict[str, Any]) -> None:
    workers, scenario = a_run(3, **options)
    train(scenario, range(2), workers)
    set_gradients(workers, scenario.gradients(2))
    before = bits(snapshot(workers))
    fail_at(workers[1], phase)
    with pytest.raises(
        NonFiniteGradientError, match="met an error, which it raises itself"
    ) as caught:
        step_together(workers)
    assert caught.value.__notes__[0] == "worker 1: MemoryError: no memory left"
    assert bits(snapshot(workers)) == before
    step_together(workers)
    assert replicated(workers[0]) == replicated(workers[1]) == replicated(workers[2])


def test_those_who_skip_steps_that_are_not_finite_skip_this_one() -> None:
    workers, scenario = a_run(2, nonfinite="skip")
    train(scenario, range(2), workers)
    set_gradients(workers, scenario.gradients(2))
    before = bits(snapshot(workers))
    fail_at(workers[1], "Alg. 1, line 6")
    exchanges = [worker.exchange(2, place) for place, worker in enumerate(workers)]
    with pytest.raises(
        LockstepError, match=r"worker 0 returned False; worker 1 raised MemoryError"
    ):
        lockstep(exchanges)
    assert bits(snapshot(workers)) == before
    step_together(workers)
    assert replicated(workers[0]) == replicated(workers[1])


def test_an_error_in_one_of_several_buckets_spoils_those_after_it() -> None:
    workers, scenario = a_run(3, bucket_bytes=1)
    train(scenario, range(2), workers)
    assert len(workers[0].engine.plan.buckets) > 2
    set_gradients(workers, scenario.gradients(2))
    before = bits(snapshot(workers))
    fail_at(workers[1], "Alg. 2, line 9")  # the first bucket's Q is on its way
    with pytest.raises(NonFiniteGradientError, match="met an error, which it raises itself"):
        step_together(workers)
    assert bits(snapshot(workers)) == before
    step_together(workers)
    assert replicated(workers[0]) == replicated(workers[1]) == replicated(workers[2])


@pytest.mark.parametrize("phase", ["Alg. 2, line 9", "Alg. 1, line 7"])
def test_an_error_after_all_is_sent_is_one_of_the_next_step(phase: str) -> None:
    workers, scenario = a_run(2)
    train(scenario, range(2), workers)
    set_gradients(workers, scenario.gradients(2))
    fail_at(workers[1], phase)
    exchanges = [worker.exchange(2, place) for place, worker in enumerate(workers)]
    with pytest.raises(LockstepError, match=r"worker 0 returned True; worker 1 raised MemoryError"):
        lockstep(exchanges)
    set_gradients(workers, scenario.gradients(3))
    with pytest.raises(WorkerMismatchError, match="worker 1"):
        step_together(workers)
