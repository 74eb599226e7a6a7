"""What L-GreCo accepts, what it refuses, and that it fails on all workers or on none."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import LQSGD, ErrorFeedbackSGD, PowerSGD, SpectralAtomo, TopK, UniformQuantized
from efsgd.algorithms.interfaces import Compressor
from efsgd.algorithms.operators import Payload
from efsgd.compressors import PowerSGDPlus
from efsgd.errors import CollectiveError
from efsgd.optimizers.signum import Signum
from efsgd.randomness import Draws
from efsgd.rank import Accordion, LGreCo, RankScheduler, StepTime
from efsgd.testing import LockstepError
from efsgd.wire.collectives import Exchange
from tests.rank.l_greco_runs import OPTIONS, SHAPES, Workers, greco, sparse_greco
from tests.rank.rank_runs import nothing_changes


def test_a_uniform_reference_of_another_setting_may_be_given_in_either_way() -> None:
    assert LGreCo(4, setting="bits").setting == "bits"
    assert LGreCo(Accordion(2, 4, setting="bits")).setting == "bits"
    assert LGreCo(Accordion(2, 4, setting="bits"), setting="bits").setting == "bits"


def scheduled(compressor: Compressor, policy: LGreCo, **group: Any) -> RankScheduler:
    parameter = torch.zeros(16, 12, requires_grad=True)
    groups = [{"params": [parameter], **group}]
    optimizer = ErrorFeedbackSGD(groups, lr=0.1, compressor=compressor, error_feedback=False)
    return RankScheduler(optimizer, policy)


@pytest.mark.parametrize(
    ("compressor", "policy", "group"),
    [
        (TopK(density=0.1, scope="model"), LGreCo(0.1, [0.1], setting="density"), {}),
        (TopK(density=0.1), LGreCo(0.1, [0.1], setting="density"), {"scope": "model"}),
        (PowerSGD(rank=2), LGreCo(1.0, [1.0], setting="min_compression_rate"), {}),
    ],
)
def test_compressors_are_refused_whose_errors_nobody_knows(
    compressor: Compressor, policy: LGreCo, group: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="it is not known how errors depend on values"):
        scheduled(compressor, policy, **group)


@pytest.mark.parametrize(
    ("compressor", "policy"),
    [
        (PowerSGD(rank=2), LGreCo(2)),
        (PowerSGD(rank=2, alternating=True), LGreCo(2)),
        (PowerSGDPlus(rank=2), LGreCo(2)),
        (LQSGD(rank=2), LGreCo(2)),
        (TopK(rank=2), LGreCo(2)),
        (SpectralAtomo(rank=2), LGreCo(2)),
        (UniformQuantized(bits=4), LGreCo(4, setting="bits")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_compressors_are_taken_whose_errors_can_be_told(
    compressor: Compressor, policy: LGreCo
) -> None:
    scheduler = scheduled(compressor, policy)
    (parameter,) = scheduler.optimizer.param_groups[0]["params"]
    for seed in range(3):
        parameter.grad = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
        scheduler.optimizer.step()
    before = scheduler.get_last_ranks()
    scheduler.step()
    # One layer alone has nobody to give to or to take from.
    assert scheduler.get_last_ranks() == before


def test_signum_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Invalid setting: .rank.\. Must be a setting of Majority"
    ):
        RankScheduler(Signum([torch.zeros(4, 4, requires_grad=True)], lr=0.1), LGreCo(2))


# ---- on all workers or on none ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sevens(TopK):
    """Refuses one tensor."""

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        if bool((delta == 7.0).all()):
            raise RuntimeError("seven")
        return super().compress(delta, draws)


def assert_fails_and_changes_nothing(workers: Workers, words: str, worker: int) -> None:
    """On the worker itself by its own error, and on the others since it could not decide."""
    raised = pytest.raises(Exception, match=words if worker == 0 else "could not decide")
    with nothing_changes(workers), raised as found:
        workers.decide()
    assert not isinstance(found.value, LockstepError)
    notes = " ".join(found.value.__notes__)
    assert (words if worker else "could not decide") in notes
    assert (type(found.value) is CollectiveError) == (worker != 0)


@pytest.mark.parametrize("gradients", ["mean", "worker 0"])
@pytest.mark.parametrize("worker", [0, 1])
def test_what_a_compressor_raises_on_one_worker_stops_the_decision_on_all(
    worker: int, gradients: str
) -> None:
    workers = sparse_greco(3, gradients=gradients, start={"compressor": Sevens(density=0.1)})
    workers.steps(2)
    if gradients == "mean" or worker == 0:
        kept = workers.sums[worker][1].clone()
        workers.sums[worker][1].fill_(7.0)
        assert_fails_and_changes_nothing(workers, "seven", worker)
        workers.sums[worker][1].copy_(kept)
    workers.decide()
    assert workers.values != [0.1] * 4


@pytest.mark.parametrize("worker", [0, 1])
def test_what_costs_raise_on_one_worker_stops_the_decision_on_all(worker: int) -> None:
    broken = {worker}

    def costs_of(own: int) -> Callable[..., Exchange[Any]]:
        def costs(_: Any, layers: Any, __: str, values: Any, ___: int) -> Exchange[Any]:
            yield from ()
            if own in broken:
                raise RuntimeError("no clock")
            return [list(values) for _ in layers]

        return costs

    numbers = iter(range(2))
    workers = Workers(lambda: LGreCo(2, costs=costs_of(next(numbers))), 2, SHAPES, **OPTIONS)
    workers.steps(2)
    assert_fails_and_changes_nothing(workers, "no clock", worker)
    broken.clear()
    workers.decide()
    assert workers.values != [2, 2, 2]


@pytest.mark.parametrize("options", [{}, {"spectrum": "svd"}, {"gradients": "worker 0"}], ids=str)
def test_a_collective_that_fails_leaves_all_as_it_was(options: dict[str, Any]) -> None:
    workers, twin = (greco(**options, steps=2) for _ in range(2))
    count = len(twin.decide())
    for number in range(count):
        with nothing_changes(workers), pytest.raises(CollectiveError):
            workers.decide(fail_at=number)
    assert len(workers.decide()) == count > 1
    assert workers.values == twin.values != [2, 2, 2]


@pytest.mark.parametrize("costs", ["time", StepTime])
def test_costs_that_cannot_be_called_are_refused(costs: Any) -> None:
    with pytest.raises(TypeError, match=re.escape("Must be None, for bytes, StepTime()")):
        LGreCo(4, costs=costs)


def test_costs_that_are_no_exchange_are_named() -> None:
    workers = greco(2, 1, costs=lambda *_: [[1.0]], steps=2)
    with pytest.raises(TypeError, match="Must be a generator"):
        workers.decide()
