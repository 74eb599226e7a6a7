"""The volumes of the paper's Table 3, counted from the buffers handed to collectives."""

import functools

import pytest
import torch

from efsgd import PowerSGDOptimizer
from efsgd.testing import Traced, step_together
from examples.models import CifarResNet18, LSTMLanguageModel
from tests.simulation import copied

MIB = 2**20
WORKERS = 16  # of the paper; two of them are simulated, the control words are those of two
STEPS_PER_EPOCH = {"resnet": 24, "lstm": 70}

# model, rank, floats per step and worker, and what the paper prints: MB (of 2^20 bytes) per epoch
# and the ratio to uncompressed SGD. None is SGD itself.
TABLE_3 = [
    ("resnet", None, 11_173_962, "1023", "1"),
    ("resnet", 1, 45_935, "4", "243"),
    ("resnet", 2, 82_260, "8", "136"),
    ("resnet", 4, 154_910, "14", "72"),
    ("lstm", None, 28_949_319, "7730", "1"),
    ("lstm", 1, 93_488, "25", "310"),
    ("lstm", 2, 142_507, "38", "203"),
    ("lstm", 4, 240_545, "64", "120"),
]


@functools.cache
def a_model(name: str) -> torch.nn.Module:
    """One of the paper's two models with a real gradient from one small batch."""
    torch.manual_seed(0)
    if name == "resnet":
        model: torch.nn.Module = CifarResNet18()
        loss = model(torch.randn(2, 3, 32, 32)).square().mean()
    else:
        model = LSTMLanguageModel(28_869, 650, 650, 3, dropout=0.0)
        output, _ = model(torch.randint(28_869, (3, 2)))
        loss = output.square().mean()
    loss.backward()
    return model


def test_the_models_are_the_paper_s() -> None:
    resnet, lstm = list(a_model("resnet").parameters()), list(a_model("lstm").parameters())
    assert sum(p.numel() for p in resnet) == 11_173_962
    assert len(resnet) == 62
    assert sum(p.numel() for p in lstm) == 28_949_319
    matrices = [p for p in resnet if p.ndim > 1]
    assert len(matrices) == 21
    assert sum(p.shape[0] + p[0].numel() for p in matrices) == 36_325
    assert sum(p.shape[0] + p[0].numel() for p in lstm if p.ndim > 1) == 49_019


def one_step(name: str, rank: int | None) -> tuple[list[Traced], list[Traced], dict[str, float]]:
    """A step of two workers: the checks before it, the step's collectives, the statistics."""
    parameters = list(a_model(name).parameters())
    optimizers = []
    for _ in range(2):
        own = copied(parameters)
        for copy, p in zip(own, parameters, strict=True):
            copy.grad = p.grad
        options = {"rank": rank} if rank else {"min_compression_rate": float("inf")}
        optimizers.append(PowerSGDOptimizer(own, lr=0.1, **options))
    with pytest.warns(UserWarning, match="bitwise equal gradients"):
        trace = step_together(optimizers)
    checks = [traced for traced in trace if traced.kind == "AllGather"]
    return checks, trace[len(checks) :], optimizers[0].communication_stats()


@pytest.mark.parametrize(("name", "rank", "floats", "megabytes", "ratio"), TABLE_3)
def test_table_3(name: str, rank: int | None, floats: int, megabytes: str, ratio: str) -> None:
    checks, step, stats = one_step(name, rank)
    parameters = list(a_model(name).parameters())
    control_words = len(parameters) + 2
    assert [t.kind for t in step] == ["AllReduceMean"] * (1 if rank is None else 2)
    assert stats["collectives"] == len(step)
    assert {t.dtype for t in step} == {torch.float32}
    sent = sum(t.nbytes for t in step)
    assert stats["bytes_sent"] == sent
    assert stats["bytes_uncompressed"] == 4 * sum(p.numel() for p in parameters)
    # Exactly the paper's floats, and a word for each parameter and each worker.
    assert sent == 4 * (floats + control_words)
    # With the words of all the paper's workers aboard, its printed digits still stand.
    sent += 4 * (WORKERS - 2)
    assert f"{STEPS_PER_EPOCH[name] * sent / MIB:.0f}" == megabytes
    assert f"{stats['bytes_uncompressed'] / sent:.0f}" == ratio
    assert sum(t.nbytes for t in checks) == stats["check_bytes_sent"]
