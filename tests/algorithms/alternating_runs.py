"""Workers that train with `alternating=True`, for the tests."""

from typing import Any

from efsgd import PowerSGDOptimizer
from tests.simulation import make_workers
from tests.strategies import Scenario

LR = 0.5
PLAIN: dict[str, Any] = {
    "lr": LR, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    "maximize": False, "momentum_form": "sgd", "error_feedback": True,
}  # fmt: skip
SHAPES = [(9, 8), (8,), (9, 8), (4, 3, 3, 3)]


def workers_of(scenario: Scenario, **options: Any) -> list[PowerSGDOptimizer]:
    options = {**scenario.hyperparameters, **options}
    return make_workers(scenario.parameters(), scenario.world_size, alternating=True, **options)


def a_run(world_size: int = 3, **options: Any) -> tuple[list[PowerSGDOptimizer], Scenario]:
    scenario = Scenario(SHAPES, world_size, {}, 9, 2, ["gaussian"] * 4, ["contiguous"] * 4)
    return workers_of(scenario, **{"lr": 0.1, "rank": 2, **options}), scenario
