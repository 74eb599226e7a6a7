"""Compressors of one tensor at a time, in error-feedback SGD: beside a naive loop over tensors."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd import ErrorFeedbackSGD, TensorCompressor
from efsgd.randomness import Draws
from efsgd.wire.payload import Format
from tests.compressors.made_compressors import Mask, Signs, make_workers
from tests.simulation import parameters_of, replicated, step_with
from tests.strategies import LAYOUTS, Scenario, gaussian, scenarios


class Naive:
    """Algorithm 2, lines 7 to 11, one tensor and one worker at a time."""

    def __init__(self, compressor: TensorCompressor, shapes: Sequence[Any], workers: int) -> None:
        self.compressor, self.step = compressor, 0
        zeros = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        self.errors = [list(zeros) for _ in range(workers)]

    def updates(self, gradients: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for index, error in enumerate(self.errors[0]):
            shape = error.shape
            present = [own[index] for own in gradients]
            if all(gradient is None for gradient in present):
                found.append(None)
                continue
            deltas = [
                errors[index] + (0 if gradient is None else gradient)
                for errors, gradient in zip(self.errors, present, strict=True)
            ]
            if shape.numel() == 0 or not self.compressor.compresses(shape):
                found.append(sum(deltas) / len(deltas))
                continue
            sent = []
            for worker, delta in enumerate(deltas):
                draws = Draws(self.compressor.seed_of_draws, index, self.step, worker)
                payload = self.compressor.compress(delta.contiguous(), draws)
                sent.append(self.compressor.decompress(payload, shape, draws))
                self.errors[worker][index] = delta - sent[-1]
            found.append(sum(sent) / len(sent))
        self.step += 1
        return found


def assert_equals_naive(compressor: TensorCompressor, scenario: Scenario) -> None:
    parameters = scenario.parameters()
    workers = make_workers(parameters, scenario.world_size, compressor)
    naive = Naive(compressor, scenario.shapes, scenario.world_size)
    expected = [p.clone() for p in parameters]
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        for x, update in zip(expected, naive.updates(gradients), strict=True):
            x -= 0 if update is None else update
        for worker, errors in zip(workers, naive.errors, strict=True):
            for p, x, error in zip(parameters_of(worker), expected, errors, strict=True):
                # Sums in another order differ in their last digits.
                assert torch.allclose(p, x, rtol=1e-12, atol=1e-9)
                kept = worker.state[p].get("error", torch.zeros_like(p))
                assert torch.allclose(kept, error, rtol=1e-12, atol=1e-9)
        assert all(replicated(worker) == replicated(workers[0]) for worker in workers)


@pytest.mark.parametrize("compressor", [Mask(), Signs()], ids=["averaged", "gathered"])
@settings(max_examples=60)
@given(scenario=scenarios(kinds=("gaussian", "scaled", "one_hot"), layouts=LAYOUTS))
def test_steps_are_those_of_a_loop_over_tensors(
    compressor: TensorCompressor, scenario: Scenario
) -> None:
    assert_equals_naive(compressor, scenario)


@given(world_size=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_all_tensors_of_a_group_can_be_seen_as_one(world_size: int, seed: int) -> None:
    # Odd sizes come last in memory, so that the tensors of a group do not lie in one piece.
    shapes = [(4, 4), (5,), (2, 8), (7, 1), (16,), (9,)]
    workers = []
    for _ in range(world_size):
        own = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        groups = [{"params": own[:3]}, {"params": own[3:], "factor": 0.5}]
        compressor = Signs(all_at_once=True)
        workers.append(ErrorFeedbackSGD(groups, lr=1.0, momentum_form="sgd", compressor=compressor))
    gradients = [[gaussian(shape, worker, seed, i) for i, shape in enumerate(shapes)]
                 for worker in range(world_size)]  # fmt: skip
    step_with(workers, gradients)
    for first, end, factor in ((0, 3, 1.0), (3, 6, 0.5)):
        total = 0.0
        for own in gradients:
            flat = torch.cat([each.flatten() for each in own[first:end]])
            scale = flat.abs().mean() * factor
            sent = torch.where(flat >= 0, scale, -scale)
            sent[flat.abs().argmax()] *= 2
            total = total - sent / world_size
        moved = torch.cat([p.detach().flatten() for p in parameters_of(workers[0])[first:end]])
        # The mean of absolute values is a sum in another order.
        assert torch.allclose(moved, total, rtol=1e-12, atol=0)


def test_complex_and_bfloat16_parameters_are_compressed() -> None:
    parameters = [
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros((), dtype=torch.complex64),
        torch.zeros(3, 4, dtype=torch.bfloat16),
    ]
    workers = make_workers(parameters, 2, Mask(keep=1.0))
    gradients = [[torch.full_like(p, 2 + worker) for p in parameters] for worker in range(2)]
    step_with(workers, gradients)
    for worker in workers:
        for p in parameters_of(worker):
            assert torch.equal(p.detach(), torch.full_like(p, -2.5))
        assert worker.state[parameters_of(worker)[0]]["error"].shape == (4, 2)


def test_settings_may_differ_between_groups_and_change_between_steps() -> None:
    own = [torch.zeros(4, 4, requires_grad=True) for _ in range(2)]
    groups = [{"params": own[:1]}, {"params": own[1:], "factor": 0.25}]
    optimizer = ErrorFeedbackSGD(groups, lr=1.0, momentum_form="sgd", compressor=Signs())
    for p in own:
        p.grad = torch.full_like(p, 8.0)
    optimizer.step()
    assert (own[0][1, 1].item(), own[1][1, 1].item()) == (-8.0, -2.0)
    optimizer.param_groups[0]["factor"] = 0.5
    optimizer.step()  # the first error was 0 but for the largest element, the second's is 6
    assert own[0][1, 1].item() < -8.0 < -4.0


def test_what_workers_sent_is_unpacked_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, made = Format.unpack, list[weakref.ref[Tensor]]()

    def watched(self: Format, buffer: Tensor) -> list[tuple[Tensor, ...]]:
        assert all(earlier() is None for earlier in made)
        payloads = unpack(self, buffer)
        made.extend(weakref.ref(part) for payload in payloads for part in payload)
        return payloads

    monkeypatch.setattr(Format, "unpack", watched)
    workers = make_workers([torch.zeros(4, 5), torch.zeros(7)], 3, Signs())
    step_with(workers, [[gaussian((4, 5), w), gaussian((7,), w)] for w in range(3)])
    assert len(made) == 3 * 3 * 2 * 3  # by each worker, from each: three fields of two tensors
