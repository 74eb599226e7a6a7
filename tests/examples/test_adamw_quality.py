"""The parts of examples/adamw_quality.py; trainings themselves take hours."""

import math

import pytest
import torch

from efsgd import GradientAverager
from examples import adamw_quality
from examples.adamw_quality import ROWS, Run, best_rate
from examples.distributed import Workers
from examples.models import GPTLanguageModel

ALONE = Workers(0, 1, torch.device("cpu"))


def test_a_gpt_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = GPTLanguageModel(11, 8, layers=2, heads=2, window=6).eval()
    words = torch.randint(11, (6, 3))
    later = words.clone()
    later[4:] = (later[4:] + 1) % 11
    found, other = model(words)[0], model(later)[0]
    assert torch.equal(found[:4], other[:4])
    assert not torch.equal(found[4:], other[4:])


def test_the_best_rate_is_that_of_the_tuning_seed() -> None:
    found = {
        Run("a row", rate, seed).key: {"perplexity": perplexity}
        for rate, seed, perplexity in [(0.1, 1, 9.0), (0.2, 1, 8.0), (0.1, 2, 7.0)]
    }
    assert best_rate("a row", [0.1, 0.2], found) == 0.2


@pytest.mark.parametrize("row", [row for row in ROWS if "hook" not in row])
def test_a_row_trains(row: str) -> None:
    settings = adamw_quality.SETTINGS
    task, model = adamw_quality.task_and_model(settings, ALONE)
    model, optimizer = ROWS[row](model, settings, ALONE)
    for _, batch in zip(range(2), task.batches(1, 0), strict=False):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
    assert math.isfinite(loss.item())
    averager = getattr(optimizer, "averager", None)
    assert (averager is None) == (row == "AdamW")
    if isinstance(averager, GradientAverager):
        sent = {len(g["params"]): g.get("min_compression_rate") for g in averager.param_groups}
        assert (math.inf in sent.values()) == ("embeddings uncompressed" in row)
