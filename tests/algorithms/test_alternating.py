"""PowerSGD in one all-reduce per step: what alternates, what is sent, what is kept."""

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from efsgd import GradientAverager, PowerSGD, PowerSGDOptimizer
from efsgd.algorithms.alternating import initial_left
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.algorithms.low_rank.fusion import has_compiler
from examples.models import CifarResNet18
from tests.algorithms.alternating_runs import LR, PLAIN, SHAPES, a_run, workers_of
from tests.promises.test_nothing_is_lost import Balance
from tests.simulation import (
    SEED,
    bits,
    difference,
    errors_of,
    make_workers,
    parameters_of,
    snapshot,
    step_with,
)
from tests.strategies import (
    FULL_RANK_KINDS,
    Scenario,
    gaussian,
    matrix_dimensions,
    scenarios,
)

# ---- as naively as it can be written -------------------------------------------------------------


class Naive:
    """One parameter on all workers: float64, one matrix at a time, projectors in place of bases."""

    def __init__(self, scenario: Scenario, index: int) -> None:
        hyper, shape = scenario.hyperparameters, scenario.shapes[index]
        n, m = matrix_dimensions(shape)
        r = min(n, m, hyper["rank"])
        self.is_matrix = n * m > hyper["min_compression_rate"] * r * (n + m)
        self.rank, self.form, self.index = r, (n, m), index
        self.start, self.warm = hyper["start_compressing_at"], hyper["warm_start"]
        self.x = scenario.parameters()[index]
        self.errors = [torch.zeros(shape, dtype=torch.float64) for _ in range(scenario.world_size)]
        self.q = initial_query(SEED, index, m, r) if self.is_matrix else None
        self.p = initial_left(SEED, index, n, r) if self.is_matrix else None

    def step(self, number: int, gradients: list[Tensor]) -> None:
        deltas = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        mean = torch.stack(deltas).mean(0)
        if self.q is None or self.p is None or number < self.start:
            self.x = self.x - LR * mean
            return
        if not self.warm:
            self.q = initial_query(SEED, self.index, self.form[1], self.rank, step=number)
            self.p = initial_left(SEED, self.index, self.form[0], self.rank, step=number)
        matrix = mean.reshape(self.form)
        if (number - self.start) % 2 == 0:
            projector = self.q @ torch.linalg.pinv(self.q)
            self.p = matrix @ torch.linalg.qr(self.q).Q
            send = [d.reshape(self.form) @ projector for d in (*deltas, mean)]
        else:
            projector = self.p @ torch.linalg.pinv(self.p)
            self.q = matrix.mT @ torch.linalg.qr(self.p).Q
            send = [projector @ d.reshape(self.form) for d in (*deltas, mean)]
        *local, update = (sent.reshape(mean.shape) for sent in send)
        self.errors = [delta - own for delta, own in zip(deltas, local, strict=True)]
        self.x = self.x - LR * update


@settings(max_examples=40)
@given(
    scenarios(kinds=FULL_RANK_KINDS, layouts=["contiguous", "transposed"], max_steps=5,
              with_missing=False, **PLAIN)
)  # fmt: skip
def test_steps_are_those_of_a_naive_reference(scenario: Scenario) -> None:
    workers = workers_of(scenario)
    naive = [Naive(scenario, index) for index in range(len(scenario.shapes))]
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        for index, reference in enumerate(naive):
            reference.step(step, [own[index] for own in gradients])
    for index, reference in enumerate(naive):
        # Float64, times the condition of the factors that are orthogonalized; pseudo-inverses
        # square it.
        assert difference(parameters_of(workers[0])[index], reference.x) < 1e-8
        for optimizer, error in zip(workers, reference.errors, strict=True):
            scale = 1 + (float(reference.x.abs().max()) if error.numel() else 0.0)
            ours = errors_of(optimizer)[index]
            assert error.numel() == 0 or (ours - error).abs().max() < 1e-8 * scale


@pytest.mark.parametrize("seed", range(3))
def test_repetition_finds_the_best_approximation(seed: int) -> None:
    left = torch.linalg.qr(gaussian((12, 8), seed, 1)).Q
    right = torch.linalg.qr(gaussian((8, 8), seed, 2)).Q
    values = 2.0 ** -torch.arange(8, dtype=torch.float64)
    matrix = (left * values) @ right.mT
    best = (left[:, :2] * values[:2]) @ right[:, :2].mT
    workers = make_workers(
        [torch.zeros(12, 8).double()], 1, lr=1.0, momentum_form="sgd", rank=2, alternating=True,
        error_feedback=False,
    )  # fmt: skip
    for _ in range(60):  # the subspace converges by a factor of 2 in each
        before = parameters_of(workers[0])[0].detach().clone()
        step_with(workers, [[matrix]])
    update = before - parameters_of(workers[0])[0].detach()
    assert difference(update, best) < 1e-11


# ---- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
def test_one_all_reduce_carries_all_and_is_as_long_as_announced(start: int) -> None:
    workers, scenario = a_run(start_compressing_at=start)
    compressor = PowerSGD(rank=2, alternating=True)
    words = 8 * (len(SHAPES) + len(workers))
    missing = [[None] * 4] * 3
    for step in range(7):
        trace = step_with(workers, missing if step > 4 else scenario.gradients(step))
        own = [traced for traced in trace if traced.kind == "AllReduceMean"]
        assert len(own) == 1 and len(trace) == (1 if step > start + 1 else len(trace))
        if step >= start:
            announced = compressor.payload_bytes(SHAPES, torch.float64, step - start)
            # Of three matrices r n, or r m; and a vector.
            is_even = (step - start) % 2 == 0
            expected = 8 + 2 * (9 + 9 + 4 if is_even else 8 + 8 + 27)
            assert own[0].nbytes == announced + words == 8 * expected + words


@pytest.mark.parametrize(("rank", "nbytes"), [(1, 111_090), (2, 183_740)])
def test_what_is_sent_of_a_resnet_in_the_mean(rank: int, nbytes: int) -> None:
    shapes = [p.shape for p in CifarResNet18().parameters()]
    compressor = PowerSGD(rank=rank, alternating=True)
    first, second, third = (compressor.payload_bytes(shapes, step=step) for step in range(3))
    assert (first + second) / 2 == nbytes
    assert first == third < second


# ---- settings and state --------------------------------------------------------------------------


def test_the_state_has_both_factors_which_a_new_rank_keeps() -> None:
    workers, scenario = a_run()
    for step in range(3):
        step_with(workers, scenario.gradients(step))
    before = {k: workers[0].state[parameters_of(workers[0])[0]][k].clone() for k in ("p", "q")}
    assert before["p"].shape == (9, 2) and before["q"].shape == (8, 2)
    for optimizer in workers:
        optimizer.param_groups[0]["rank"] = 3
    step_with(workers, scenario.gradients(3))  # from the left: P stays, but for its new column
    p = workers[0].state[parameters_of(workers[0])[0]]["p"]
    assert torch.equal(p[:, :2], before["p"])
    # What is new has the direction that was drawn, and another length. Two quotients in float64.
    drawn = initial_left(SEED, 0, 9, 3)[:, 2]
    assert difference(p[:, 2] / p[:, 2].norm(), drawn / drawn.norm()) < 1e-15


def test_a_loaded_state_goes_on_to_the_bit_on_either_side() -> None:
    for step in (2, 3):
        workers, scenario = a_run()
        for number in range(step):
            step_with(workers, scenario.gradients(number))
        others = make_workers(parameters_of(workers[0]), 3, lr=1.0, rank=1)
        for old, new in zip(workers, others, strict=True):
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        for number in range(step, step + 2):
            step_with(workers, scenario.gradients(number))
            step_with(others, scenario.gradients(number))
        assert bits(snapshot(others)) == bits(snapshot(workers))


def test_changing_the_form_loses_nothing() -> None:
    workers, scenario = a_run(lr=LR, momentum_form="sgd")
    balance = Balance(workers)
    for step in range(8):
        for optimizer in workers:
            optimizer.param_groups[0]["alternating"] = step not in (2, 3, 4)
        balance.step(workers, scenario.gradients(step))


def test_an_averager_takes_it_as_well() -> None:
    x = torch.zeros(9, 8, requires_grad=True)
    averager = GradientAverager([x], compressor=PowerSGD(rank=2, alternating=True))
    total = torch.zeros(9, 8)
    for step in range(4):
        x.grad = gaussian((9, 8), step).float()
        total += x.grad
        averager.average_()
        total -= x.grad
        assert torch.linalg.matrix_rank(x.grad) == 2
    assert difference(averager.state[x]["error"], total) < 1e-5  # float32


def test_what_is_no_bool_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid alternating: 'yes'\. Must be a bool"):
        PowerSGDOptimizer([torch.zeros(3, requires_grad=True)], alternating="yes")
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(9, 8)]} for _ in range(2)]
    groups[1]["alternating"] = True
    with pytest.raises(ValueError, match="Invalid alternating"):
        PowerSGDOptimizer(groups)


def test_compiled_steps_are_the_same_to_rounding() -> None:
    with warnings.catch_warnings():  # of a missing compiler, or torch's own deprecations
        warnings.simplefilter("ignore")
        if not has_compiler(torch.device("cpu")):
            pytest.skip("torch.compile finds no C++ compiler here")
        ends = []
        for compile in (True, False):
            workers = make_workers(
                [torch.zeros(512, 512, dtype=torch.float64)], 1, lr=0.1, rank=2, compile=compile,
                alternating=True,
            )  # fmt: skip
            for step in range(4):
                step_with(workers, [[gaussian((512, 512), step)]])
            ends.append((parameters_of(workers[0])[0], errors_of(workers[0])[0]))
    for ours, theirs in zip(*ends, strict=True):
        assert difference(ours, theirs) < 1e-12  # sums of two products, in another order
