"""The entry `per_parameter` of parameter groups: how it is given, and compared between workers."""

import copy
from typing import Any

import pytest
import torch

from efsgd import GradientAverager, PowerSGD, PowerSGDOptimizer, Signum, WorkerMismatchError
from tests.rank.rank_changes import OWN, matrices, ranks, set_own
from tests.simulation import a_run, parameters_of, step_with, unchanged


def test_it_is_given_with_a_group_at_construction_and_later() -> None:
    groups: list[dict[str, Any]] = [
        {"params": matrices(2), "per_parameter": {"rank": [3, None]}},
        {"params": matrices(1), "rank": 1},
    ]
    optimizer = PowerSGDOptimizer(groups, rank=2)
    assert ranks(optimizer) == [3, 2, 1]
    assert optimizer.param_groups[1]["per_parameter"] is None  # unless it is given
    optimizer.add_param_group({"params": matrices(2), "per_parameter": {"rank": (None, 5)}})
    assert ranks(optimizer) == [3, 2, 1, 2, 5]
    named = [(f"layer {index}", p) for index, p in enumerate(matrices(2))]
    optimizer = PowerSGDOptimizer([{"params": named, "per_parameter": {"rank": (1, 4)}}])
    assert ranks(optimizer) == [1, 4]


def test_a_change_takes_effect_with_the_next_step() -> None:
    [optimizer], scenario = a_run(1)
    step_with([optimizer], scenario.gradients(0))
    group = optimizer.param_groups[0]
    for own, expected in [
        (OWN, [1, None, 3]),
        ({"rank": (None, None, 5)}, [2, None, 5]),
        ({"rank": [4, 4, 4]}, [4, None, 4]),
        ({}, [2, None, 2]),
        ({"rank": (5, 1, 1)}, [5, None, 1]),
        ({"rank": (99, 1, 1)}, [5, None, 1]),  # uncompressed: its Q waits
        (None, [2, None, 2]),
    ]:
        group["per_parameter"] = own
        step_with([optimizer], scenario.gradients(1))
        assert ranks(optimizer) == expected
    group["per_parameter"] = {"rank": [3, 3, 3]}
    step_with([optimizer], scenario.gradients(2))
    group["per_parameter"]["rank"][0] = 1  # in place: seen, if not recommended
    step_with([optimizer], scenario.gradients(3))
    assert ranks(optimizer) == [1, None, 3]
    # The group's own value is that of all others.
    group.update(per_parameter={"rank": (1, None, None)}, rank=4, min_compression_rate=0.0)
    step_with([optimizer], scenario.gradients(4))
    assert ranks(optimizer) == [1, None, 4]


def test_a_parameter_that_is_appended_to_a_group_has_the_groups_value() -> None:
    [optimizer], scenario = a_run(1)
    set_own([optimizer], OWN)
    step_with([optimizer], scenario.gradients(0))
    optimizer.param_groups[0]["params"].append(matrices(1)[0])
    optimizer.step()
    assert optimizer.param_groups[0]["per_parameter"] == {"rank": (*OWN["rank"], None)}


def test_other_optimizers_have_it_too() -> None:
    compressor = PowerSGD(rank=2, min_compression_rate=0.0)
    averager = GradientAverager(
        [{"params": matrices(2), "per_parameter": {"rank": (3, None)}}], compressor=compressor
    )
    assert ranks(averager) == [3, 2]
    for own in (None, {}):
        signum = Signum([{"params": matrices(1), "per_parameter": own}])
        parameters_of(signum)[0].grad = torch.ones(12, 10, dtype=torch.float64)
        signum.step()
        signum.load_state_dict(copy.deepcopy(signum.state_dict()))
        assert signum.param_groups[0]["per_parameter"] == own
    with pytest.raises(ValueError, match=r"'momentum' is no setting .* None: this compressor has"):
        Signum([{"params": matrices(1), "per_parameter": {"momentum": (0.5,)}}])


# ---- how workers compare it ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (({"rank": (2, None, 3)}, {"rank": (2, None, 1)}),
         r"parameter 2, .* with rank=3 of its own; worker 1: parameter 2, .* rank=1 of its own"),
        ((None, {"rank": (None, None, 3)}),
         r"parameter 2, shape \[12, 10\], float64 on cpu, compressed at level 2; "
         r"worker 1: parameter 2, .* level 3, with rank=3 of its own"),
        # Nothing else would show that they mean something else by the group's rank.
        ((None, {"rank": (2, None, None)}), r"worker 1: parameter 0, .* with rank=2 of its own"),
        ((None, {"rank": (None, 3, None)}), r"worker 1: parameter 1, .* with rank=3 of its own"),
        ((None, {"min_compression_rate": (0.5, None, None)}),
         r"parameter 0, .* with min_compression_rate=0.5 of its own"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["before the first step", "in mid-run"])
def test_workers_that_disagree_about_it_name_the_parameter(
    own: tuple[Any, Any], words: str, when: str
) -> None:
    workers, scenario = a_run(2)
    if when == "in mid-run":
        step_with(workers, scenario.gradients(0))
    for worker, each in zip(workers, own, strict=True):
        worker.param_groups[0]["per_parameter"] = each
    with unchanged(workers), pytest.raises(WorkerMismatchError, match=words) as caught:
        step_with(workers, scenario.gradients(1))
    assert caught.value.__notes__ == [f"worker 1: WorkerMismatchError: {caught.value}"]
    set_own(workers, OWN)
    step_with(workers, scenario.gradients(1))


def test_the_same_settings_may_be_written_differently() -> None:
    workers, scenario = a_run(3)
    rates = (None, None, 0.5)
    workers[0].param_groups[0]["per_parameter"] = {
        "rank": [1, None, 3], "min_compression_rate": rates,
    }  # fmt: skip
    workers[1].param_groups[0]["per_parameter"] = {
        "min_compression_rate": list(rates), "rank": (1, None, 3),
    }  # fmt: skip
    workers[2].param_groups[0]["per_parameter"] = {
        "rank": (1, None, 3), "min_compression_rate": rates,
    }  # fmt: skip
    step_with(workers, scenario.gradients(0))
    for worker, own in zip(workers, (None, {}, {"rank": [None] * 3}), strict=True):
        worker.param_groups[0]["per_parameter"] = own
    step_with(workers, scenario.gradients(1))


def test_what_says_nothing_new_is_no_change() -> None:
    workers, scenario = a_run(2)
    set_own(workers, OWN)
    for step in range(2):
        usual = step_with(workers, scenario.gradients(step))
    for worker in workers:
        worker.param_groups[0]["per_parameter"] = {"rank": list(OWN["rank"])}
    assert step_with(workers, scenario.gradients(2)) == usual
