"""Error feedback gives later what it hid."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from efsgd.audit import DLG, Message, combine, invert, psnr
from tests.audit.messages import clear, entries, gradients_of, low_rank, message, mlp, signs

STEPS = 16


def rank_one_steps(gradient: Tensor, error_feedback: bool) -> tuple[list[Message], Tensor]:
    """PowerSGD with a warm start on one gradient, and the last error."""
    error = torch.zeros_like(gradient)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(gradient.shape[1], 1, generator=generator, dtype=gradient.dtype)
    found = []
    for step in range(STEPS):
        delta = gradient + error
        seen = low_rank(0, delta, queries)
        error = delta - seen.decompressed if error_feedback else error
        queries = seen.values[1]
        found.append(message([seen], step))
    return found, error


def test_the_mean_is_the_gradient_up_to_the_last_error_by_the_number_of_steps() -> None:
    gradient = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    steps, error = rank_one_steps(gradient, True)
    mean = combine(steps).parameters[0].decompressed
    # Sixteen sums in float64.
    torch.testing.assert_close(mean - gradient, -error / STEPS, rtol=0, atol=1e-13)
    forgetful, _ = rank_one_steps(gradient, False)
    lost = combine(forgetful, error_feedback=False).parameters[0].decompressed - gradient
    assert lost.norm() > 2 * (mean - gradient).norm()


@pytest.mark.parametrize("error_feedback", [True, False])
def test_every_step_is_an_exact_measurement_of_the_gradient(error_feedback: bool) -> None:
    gradient = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    steps, _ = rank_one_steps(gradient, error_feedback)
    seen = combine(steps, error_feedback=error_feedback).parameters[0]
    assert len(seen.values) == 2 * STEPS
    for own, value in zip(seen.measure(gradient), seen.values, strict=True):
        torch.testing.assert_close(own, value, rtol=0, atol=1e-11)  # sums grow with the steps


def test_two_messages_give_away_what_one_does_not() -> None:
    model = mlp(classes=2, hidden=3)
    inputs = torch.rand(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([1])
    gradients = gradients_of(model, inputs, labels)
    errors = [torch.zeros_like(each) for each in gradients]
    steps = []
    for step in range(8):
        deltas = [g + e for g, e in zip(gradients, errors, strict=True)]
        seen = [entries(index, delta, 1) for index, delta in enumerate(deltas)]
        errors = [d - s.decompressed for d, s in zip(deltas, seen, strict=True)]
        steps.append(message(seen, step))
    attack = replace(DLG, adaptive=True, restarts=3)
    alone, together = (
        invert(each, model, inputs.shape, labels, attack=attack)
        for each in (steps[0], combine(steps))
    )
    assert psnr(inputs, alone.inputs) < 25 < 60 < psnr(inputs, together.inputs)


def test_of_signs_the_mean_is_compared() -> None:
    gradient = torch.tensor([1.0, -3.0])
    both = combine([message([signs(0, gradient)]), message([signs(0, -gradient)], 1)])
    seen = both.parameters[0]
    assert seen.kind == "clear" and seen.values[0].tolist() == [0.0, 0.0]
    assert seen.measure(gradient)[0] is gradient


def test_steps_that_do_not_follow_each_other_are_refused() -> None:
    one = message([clear(0, torch.ones(2))])
    for steps in (
        [],
        [one, one],
        [one, replace(one, step=1, worker=1)],
        [replace(one, applied=False)],
    ):
        with pytest.raises(ValueError, match="of one worker, and of all steps"):
            combine(steps)
