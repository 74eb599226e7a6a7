"""Workers that train with a variant of PowerSGD, for the tests."""

from typing import Any

from efsgd import ErrorFeedbackSGD
from efsgd.algorithms.interfaces import Compressor
from tests.compressors.made_compressors import make_workers
from tests.strategies import Scenario

LR = 0.5
#: Of scenarios whose parameters show what was applied.
PLAIN: dict[str, Any] = {
    "lr": LR, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    "maximize": False, "momentum_form": "sgd", "error_feedback": True,
}  # fmt: skip
SHAPES = [(9, 8), (8,), (9, 8), (4, 3, 3, 3)]


def a_run(
    compressor: Compressor, world_size: int = 3, **options: Any
) -> tuple[list[ErrorFeedbackSGD], Scenario]:
    """Workers with matrices of two batches and a vector, and gradients for some steps."""
    scenario = Scenario(SHAPES, world_size, {}, 9, 2)
    options = {"lr": LR, **options}
    return make_workers(scenario.parameters(), world_size, compressor, **options), scenario
