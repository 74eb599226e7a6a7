"""Workers that train with PowerSGD+, for the tests."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from efsgd import ErrorFeedbackSGD, PowerSGD
from efsgd.compressors.powersgd_plus import PowerSGDPlus
from tests.strategies import Scenario

LR = 0.5
PLAIN: dict[str, Any] = {
    "lr": LR, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    "maximize": False, "momentum_form": "sgd", "error_feedback": True,
}  # fmt: skip
VARIANTS = st.fixed_dictionaries(
    {
        "refresh_every": st.integers(1, 3),
        "svd": st.sampled_from(["exact", "randomized"]),
        "refresh_update": st.sampled_from(["low_rank", "exact"]),
    }
)


def make_workers(
    parameters: Sequence[Tensor], world_size: int, compressor: PowerSGD, **options: Any
) -> list[ErrorFeedbackSGD]:
    options = {"lr": LR, "momentum_form": "sgd", **options}
    return [
        ErrorFeedbackSGD(
            [p.detach().clone().requires_grad_() for p in parameters],
            compressor=compressor,
            **options,
        )
        for _ in range(world_size)
    ]


def workers_of(scenario: Scenario, **variant: Any) -> list[ErrorFeedbackSGD]:
    hyper = dict(scenario.hyperparameters)
    own = {name: hyper.pop(name) for name in ("rank", "min_compression_rate", "warm_start")}
    compressor = PowerSGDPlus(**own, **variant)
    return make_workers(scenario.parameters(), scenario.world_size, compressor, **hyper)


SHAPES = [(9, 8), (8,), (9, 8), (4, 3, 3, 3)]


def a_run(world_size: int = 3, **options: Any) -> tuple[list[ErrorFeedbackSGD], Scenario]:
    names = ("refresh_every", "refresh_update", "svd")
    variant = {name: options.pop(name) for name in names if name in options}
    scenario = Scenario(SHAPES, world_size, {}, 9, 2, ["gaussian"] * 4, ["contiguous"] * 4)
    compressor = PowerSGDPlus(rank=2, **{"refresh_every": 2, **variant})
    return make_workers(scenario.parameters(), world_size, compressor, **options), scenario
