"""The entry `per_parameter` of parameter groups: how it is given, checked, compared and saved."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from efsgd import (
    ErrorFeedbackSGD,
    GradientAverager,
    PowerSGD,
    PowerSGDOptimizer,
    Signum,
    TopK,
    WorkerMismatchError,
)
from efsgd.checkpoint import averaging_, consolidation
from efsgd.distributed_checkpoint import ElasticLoadPlanner, OptimizerState
from efsgd.testing import lockstep, step_together
from tests.misuse import Case, Run, ids
from tests.rank_changes import set_own
from tests.simulation import (
    a_run,
    bits,
    make_workers,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
)
from tests.strategies import gaussian

OWN = {"rank": (1, None, 3)}


def ranks(optimizer: torch.optim.Optimizer) -> list[int | None]:
    """How many columns the Q of each parameter has."""
    states = (optimizer.state[p] for p in parameters_of(optimizer))
    return [state["q"].shape[1] if "q" in state else None for state in states]


def matrices(count: int) -> list[torch.Tensor]:
    return [gaussian((12, 10), index).requires_grad_() for index in range(count)]


# ---- how it is given ----------------------------------------------------------------------------


def test_it_is_none_unless_it_is_given() -> None:
    optimizer = PowerSGDOptimizer([{"params": matrices(2)}, {"params": matrices(1)}], rank=2)
    assert [group["per_parameter"] for group in optimizer.param_groups] == [None, None]
    assert ranks(optimizer) == [2, 2, 2]


def test_it_is_given_with_a_group_at_construction_and_later() -> None:
    groups: list[dict[str, Any]] = [
        {"params": matrices(2), "per_parameter": {"rank": [3, None]}},
        {"params": matrices(1), "rank": 1},
    ]
    optimizer = PowerSGDOptimizer(groups, rank=2)
    assert ranks(optimizer) == [3, 2, 1]
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


def test_the_group_s_own_value_is_that_of_all_others() -> None:
    [optimizer], scenario = a_run(1)
    optimizer.param_groups[0].update(per_parameter=OWN, rank=4, min_compression_rate=0.0)
    step_with([optimizer], scenario.gradients(0))
    assert ranks(optimizer) == [1, None, 3]
    optimizer.param_groups[0]["per_parameter"] = {"rank": (1, None, None)}
    step_with([optimizer], scenario.gradients(1))
    assert ranks(optimizer) == [1, None, 4]


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


# ---- how it is checked --------------------------------------------------------------------------

KINDS = "Must be None, or a dict from names of settings to a value for each parameter"
NAMES = "Must be one of ['min_compression_rate', 'rank']"
LISTS = "Must be a list or a tuple, with a value or None for each parameter of the group"
COUNT = "Must have one, or None, for each"
RANK = "Must be an integer of at least 1"

MISUSES: list[tuple[str, Any, type[Exception], str, str]] = [
    ("a list", [1, 2, 3], TypeError, "Invalid per_parameter: [1, 2, 3]", KINDS),
    ("a string", "rank", TypeError, "Invalid per_parameter: 'rank'", KINDS),
    ("a number", 3, TypeError, "Invalid per_parameter: 3", KINDS),
    ("an unknown name", {"density": (0.1,) * 3}, ValueError, "'density' is no setting", NAMES),
    ("a name of the optimizer's", {"lr": (0.1,) * 3}, ValueError, "'lr' is no setting", NAMES),
    ("a shared setting", {"seed": (1, 2, 3)}, ValueError, "'seed' is no setting", NAMES),
    ("a name that is none", {0: (1, 2, 3)}, ValueError, "0 is no setting", NAMES),
    ("a string of ranks", {"rank": "123"}, TypeError, "'rank' has '123'", LISTS),
    ("bytes", {"rank": b"123"}, TypeError, "'rank' has b'123'", LISTS),
    ("a rank for all", {"rank": 3}, TypeError, "'rank' has 3", LISTS),
    ("a dict of ranks", {"rank": {0: 3}}, TypeError, "'rank' has {0: 3}", LISTS),
    ("a tensor", {"rank": torch.tensor([1, 2, 3])}, TypeError, "'rank' has tensor(", LISTS),
    ("too few", {"rank": (1, 2)}, ValueError, "'rank' has 2 values for 3 parameters", COUNT),
    ("too many", {"rank": (1,) * 4}, ValueError, "'rank' has 4 values for 3 parameters", COUNT),
    ("none", {"rank": ()}, ValueError, "'rank' has 0 values for 3 parameters", COUNT),
    ("zero", {"rank": (1, 0, 1)}, ValueError, "Invalid rank: 0.", RANK),
    ("a fraction", {"rank": (1, 1, 1.0)}, ValueError, "Invalid rank: 1.0.", RANK),
    ("a bool", {"rank": (1, True, 1)}, ValueError, "Invalid rank: True.", RANK),
    ("a string for a rank", {"rank": (1, "2", 1)}, ValueError, "Invalid rank: '2'.",
     "That is what per_parameter has for parameter 1 of the group"),
    ("a list for a rank", {"rank": (1, 1, [2])}, ValueError, "Invalid rank: [2].", RANK),
    ("a negative rate", {"min_compression_rate": (None, None, -1.0)}, ValueError,
     "Invalid min_compression_rate: -1.0.", "for parameter 2 of the group"),
]  # fmt: skip


def changing(own: Any) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        run.optimizer.param_groups[0]["per_parameter"] = own
        run.step()

    return act


def loading(own: Any) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        saved = copy.deepcopy(run.optimizer.state_dict())
        saved["param_groups"][0]["per_parameter"] = own
        run.optimizer.load_state_dict(saved)

    return act


def adding(own: Any) -> Callable[[Run], None]:
    return lambda run: run.optimizer.add_param_group({"params": matrices(3), "per_parameter": own})


def constructing(own: Any) -> Callable[[Run], None]:
    def act(_: Run) -> None:
        PowerSGDOptimizer([{"params": matrices(3), "per_parameter": own}])

    return act


@pytest.mark.parametrize("way", [constructing, adding, changing, loading])
@pytest.mark.parametrize(
    "case", ids([Case(name, lambda: None, *rest) for name, _, *rest in MISUSES])
)
def test_what_makes_no_sense_is_an_error_and_changes_nothing(
    case: Case, way: Callable[[Any], Callable[[Run], None]]
) -> None:
    own = next(value for name, value, *_ in MISUSES if name == case.name)
    run = Run()
    Case(case.name, way(own), case.error, case.given, case.remedy).check(run)
    run.optimizer.param_groups[0]["per_parameter"] = None
    run.assert_unchanged()


@pytest.mark.parametrize("name", ["too few", "a bool", "a list for a rank", "an unknown name"])
def test_on_one_worker_alone_it_is_an_error_on_all(name: str) -> None:
    own = next(value for each, value, *_ in MISUSES if each == name)
    run = Run(3)
    run.workers[1].param_groups[0]["per_parameter"] = own
    with pytest.raises(Exception, match="could not take part, and say themselves why: worker 1"):
        run.step()
    run.workers[1].param_groups[0]["per_parameter"] = None
    run.assert_unchanged()
    run.assert_goes_on()


def test_the_group_s_own_settings_are_checked_whatever_it_says() -> None:
    for own in ({}, {"rank": (1, 1, 1)}):
        [optimizer], scenario = a_run(1)
        optimizer.param_groups[0].update(per_parameter=own, rank=0)
        with pytest.raises(ValueError, match=r"Invalid rank: 0\."):
            step_with([optimizer], scenario.gradients(0))


def test_a_parameter_that_is_appended_to_a_group_needs_a_value() -> None:
    [optimizer], scenario = a_run(1)
    set_own([optimizer], OWN)
    step_with([optimizer], scenario.gradients(0))
    optimizer.param_groups[0]["params"].append(matrices(1)[0])
    with pytest.raises(ValueError, match="'rank' has 3 values for 4 parameters"):
        optimizer.step()
    optimizer.param_groups[0]["per_parameter"] = {"rank": (*OWN["rank"], 4)}
    optimizer.step()


def test_settings_that_exclude_each_other_are_found_for_single_parameters() -> None:
    with pytest.raises(ValueError, match="Invalid density and rank: 0.1 and 2"):
        ErrorFeedbackSGD([{"params": matrices(2), "per_parameter": {"rank": (None, 2)}}], lr=0.1,
                         compressor=TopK(density=0.1))  # fmt: skip


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
    before = bits(snapshot(workers))
    with pytest.raises(WorkerMismatchError, match=words) as caught:
        step_with(workers, scenario.gradients(1))
    assert caught.value.__notes__ == [f"worker 1: WorkerMismatchError: {caught.value}"]
    assert bits(snapshot(workers)) == before
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


# ---- how it is saved ----------------------------------------------------------------------------


def through_torch(saved: dict[str, Any]) -> Any:
    """What torch.load makes of it, which takes nothing but plain data."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("way", [copy.deepcopy, through_torch])
def test_a_loaded_run_goes_on_to_the_bit_also_in_the_middle_of_a_change(
    way: Callable[[Any], Any], kind: type
) -> None:
    workers, scenario = a_run(2)
    for step in range(2):
        set_own(workers, {"rank": kind((1, None, 3))})
        step_with(workers, scenario.gradients(step))
    for worker in workers:  # it is in the groups already, but not in the factors
        worker.param_groups[0]["per_parameter"] = {"rank": kind((None, None, 1))}
    others = make_workers([torch.zeros_like(p) for p in parameters_of(workers[0])], 2, lr=9.0)
    for old, new in zip(workers, others, strict=True):
        new.load_state_dict(way(old.state_dict()))
        assert new.param_groups[0]["per_parameter"] == {"rank": kind((None, None, 1))}
        with torch.no_grad():
            for own, theirs in zip(parameters_of(new), parameters_of(old), strict=True):
                own.copy_(theirs)
    for step in range(2, 4):
        step_with(workers, scenario.gradients(step))
        step_with(others, scenario.gradients(step))
    assert bits(snapshot(others)) == bits(snapshot(workers))
    assert ranks(others[0]) == [2, None, 1]


def test_what_was_saved_before_a_change_keeps_what_it_had() -> None:
    [optimizer], scenario = a_run(1)
    set_own([optimizer], OWN)
    saved = optimizer.state_dict()
    set_own([optimizer], {"rank": (4, None, 4)})
    assert saved["param_groups"][0]["per_parameter"] == OWN
    step_with([optimizer], scenario.gradients(0))
    assert saved["param_groups"][0]["per_parameter"] == OWN
    # Nor does what is loaded change with the dict that it came from.
    optimizer.load_state_dict(copy.deepcopy(saved))
    saved["param_groups"][0]["per_parameter"] = {"rank": [9, 9, 9]}
    assert optimizer.param_groups[0]["per_parameter"] == OWN


def older(saved: dict[str, Any]) -> dict[str, Any]:
    del saved["param_groups"][0]["per_parameter"]
    return saved


def of_sgd(_: dict[str, Any]) -> dict[str, Any]:
    parameters = [p.detach().requires_grad_() for p in parameters_of(a_run(1)[0][0])]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9).state_dict()


def of_top_k(_: dict[str, Any]) -> dict[str, Any]:
    parameters = [p.detach().requires_grad_() for p in parameters_of(a_run(1)[0][0])]
    own = {"density": (0.5, None, 0.25)}
    other = ErrorFeedbackSGD(
        [{"params": parameters, "per_parameter": own}], lr=0.05, compressor=TopK(density=0.1)
    )
    return copy.deepcopy(other.state_dict())


@pytest.mark.parametrize("edit", [older, of_sgd, of_top_k])
def test_a_dict_without_it_leaves_it_as_it_is(
    edit: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    [optimizer], scenario = a_run(1)
    saved = edit(copy.deepcopy(optimizer.state_dict()))
    set_own([optimizer], OWN)
    if edit is of_top_k:
        with pytest.warns(UserWarning, match="saved with TopK"):
            optimizer.load_state_dict(saved)
    else:
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["per_parameter"] == OWN
    assert ranks(optimizer) == [1, None, 3]
    step_with([optimizer], scenario.gradients(0))


def test_one_of_another_length_is_refused_with_the_groups() -> None:
    [optimizer], _ = a_run(1)
    other = PowerSGDOptimizer([{"params": matrices(2), "per_parameter": {"rank": (1, 2)}}])
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["per_parameter"] is None


def test_copies_and_pickles_have_it() -> None:
    [optimizer], scenario = a_run(1)
    set_own([optimizer], OWN)
    step_with([optimizer], scenario.gradients(0))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for twin in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        assert twin.param_groups[0]["per_parameter"] == OWN and ranks(twin) == [1, None, 3]


def test_checkpoints_for_any_number_of_workers_keep_it() -> None:
    workers, scenario = a_run(3)
    set_own(workers, OWN)
    for step in range(2):
        step_with(workers, scenario.gradients(step))
    saved = lockstep([consolidation(worker) for worker in workers]).results
    lockstep([averaging_(worker) for worker in workers])
    for own in (saved[0], saved[2], copy.deepcopy(workers[1].state_dict())):
        newcomers = make_workers(parameters_of(workers[0]), 2, lr=9.0, rank=4)
        for worker in newcomers:
            worker.load_state_dict(through_torch(own))
            assert worker.param_groups[0]["per_parameter"] == OWN
            assert ranks(worker) == [1, None, 3]
        set_gradients(newcomers, scenario.gradients(2)[:2])
        step_together(newcomers)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # there is no process group
def test_checkpoints_of_torch_distributed_keep_it(tmp_path: Path) -> None:
    def made() -> tuple[Any, PowerSGDOptimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 12))
        own = {"rank": (1, None, 3, None), "min_compression_rate": (None, None, 0.5, None)}
        groups = [{"params": model.parameters(), "per_parameter": own}]
        return model, PowerSGDOptimizer(groups, lr=0.1, rank=2)

    model, optimizer = made()
    model(torch.ones(1, 12)).sum().backward()
    optimizer.step()
    dcp.save({"own": OptimizerState(model, optimizer)}, checkpoint_id=tmp_path)
    expected = copy.deepcopy(optimizer.state_dict())
    model, optimizer = made()
    # The groups are those of the checkpoint; what decides the shapes has to be as it was saved.
    optimizer.param_groups[0]["per_parameter"] = None
    state = {"own": OptimizerState(model, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path, planner=ElasticLoadPlanner())
    assert bits(optimizer.state_dict()) == bits(expected)
    assert optimizer.param_groups[0]["per_parameter"]["rank"] == (1, None, 3, None)
