"""The compressor that the documentation writes is short, keeps the laws, and trains."""

import io
import tokenize
from pathlib import Path

import pytest
import torch
from torch import Tensor

from docs.tutorials.your_own_compressor import Sketch
from efsgd import ErrorFeedbackSGD
from efsgd.algorithms.interfaces import Compressor
from efsgd.testing import check_compressor, step_together

SOURCE = Path(__file__).parents[2] / "docs" / "tutorials" / "your_own_compressor.py"
NO_CODE = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.ENDMARKER),
    *(tokenize.INDENT, tokenize.DEDENT),
)


def test_it_has_at_most_thirty_lines_of_code() -> None:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(SOURCE.read_text()).readline):
        is_docstring = token.type == tokenize.STRING and token.string.startswith('"""')
        if token.type not in NO_CODE and not is_docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    assert 20 < len(lines) <= 30


def test_it_keeps_the_laws_for_all_compressors() -> None:
    check_compressor(Sketch(bin_size=4), world_sizes=(1, 3), processes=0)


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid bin_size: 0"):
        Sketch(bin_size=0)
    group = {"params": [torch.zeros(4, 4, requires_grad=True)], "bin_size": -1}
    with pytest.raises(ValueError, match="Invalid bin_size: -1"):
        ErrorFeedbackSGD([group], lr=0.1, compressor=Sketch())


def test_what_it_sends_is_a_projection_of_what_it_was_given() -> None:
    gradient = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, sent = _one_step(gradient)
    _, sent_again = _one_step(sent)
    # Averages of up to four numbers of float64, rounded twice.
    assert torch.allclose(sent_again, sent, rtol=0, atol=1e-14)
    assert float(((gradient - sent) * sent).sum()) == pytest.approx(0, abs=1e-12)


def test_two_workers_that_use_it_come_near_to_the_solution_of_a_regression() -> None:
    assert _distance_after_training(Sketch(bin_size=4)) < 1e-3
    # It takes steps to get there, since what is not sent arrives later.
    assert _distance_after_training(Sketch(bin_size=4), steps=5) > 0.5


def _one_step(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Error and update of a first step on one worker."""
    x = torch.zeros_like(gradient, requires_grad=True)
    x.grad = gradient
    optimizer = ErrorFeedbackSGD([x], lr=1.0, momentum_form="sgd", compressor=Sketch(bin_size=4))
    optimizer.step()
    return optimizer.state[x]["error"], -x.detach()


def _distance_after_training(compressor: Compressor, steps: int = 200) -> float:
    """How far from the solution, relative to the start, two workers are that share a problem."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 64, 12, generator=generator)
    solution = torch.randn(12, 6, generator=generator)
    weights = [torch.zeros(12, 6, requires_grad=True) for _ in range(2)]
    optimizers = [
        ErrorFeedbackSGD([w], lr=0.1, momentum_form="sgd", compressor=compressor) for w in weights
    ]
    for _ in range(steps):
        for w, x in zip(weights, inputs, strict=True):
            w.grad = x.T @ (x @ w.detach() - x @ solution) / len(x)
        step_together(optimizers)
    assert torch.equal(*weights)
    return float((weights[0].detach() - solution).norm() / solution.norm())
