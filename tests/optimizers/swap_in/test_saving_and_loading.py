"""D: state_dict and load_state_dict. D5 and D6, copies of whole optimizers: test_copies.py.

D8 with several workers is the matter of the tests of torch.distributed.checkpoint; exact resumption
and checkpoints for other numbers of workers are in tests/optimizers/test_state.py.
"""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Optimizer

from efsgd import PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import FULL_RANK, gradients, pair, start, train
from tests.simulation import bits, copied, parameters_of, snapshot, through_a_file

OPTIONS = {"lr": 0.1, "momentum": 0.9, "rank": 1, "min_compression_rate": 0.0}


def a_run(dtype: torch.dtype = torch.float32, steps: int = 2) -> PowerSGDOptimizer:
    optimizer = PowerSGDOptimizer(start(dtype), **OPTIONS)
    train([optimizer], range(steps))
    return optimizer


def fresh(like: PowerSGDOptimizer) -> PowerSGDOptimizer:
    """Made for copies of the same parameters, with other settings."""
    return PowerSGDOptimizer(copied(parameters_of(like)), lr=9.0)


def all_of(optimizer: Optimizer) -> Any:
    return bits(snapshot([optimizer]))


def assert_continues(twin: Optimizer, original: Optimizer) -> None:
    """Both take the same further steps, bit by bit."""
    train([twin, original], range(2, 5))
    assert all_of(twin) == all_of(original)


def test_state_dict_refers() -> None:
    """D1: to the tensors themselves, under packed indices; asked twice, it is the same."""
    optimizer = a_run()
    saved = optimizer.state_dict()
    for index, p in enumerate(parameters_of(optimizer)):
        for name, value in saved["state"].get(index, {}).items():
            assert value is optimizer.state[p][name]
    assert saved["param_groups"][0]["params"] == list(range(len(parameters_of(optimizer))))
    assert bits(optimizer.state_dict()) == bits(saved)


def test_equal_histories_give_equal_dicts() -> None:
    """D1: also with groups of their own."""
    assert all_of(a_run()) == all_of(a_run())
    grouped = []
    for _ in range(2):
        parameters = start()
        groups = [{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.3}]
        grouped.append(PowerSGDOptimizer(groups, **OPTIONS))
        train(grouped[-1:], range(2))
    assert all_of(grouped[0]) == all_of(grouped[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loading_copies(dtype: torch.dtype) -> None:
    """D2: exactly, in our own dtypes; nothing is shared with the source, which stays as it is."""
    original = a_run(dtype)
    twin, saved = fresh(original), copy.deepcopy(original.state_dict())
    before = bits(saved)
    twin.load_state_dict(saved)
    assert all_of(twin) == all_of(original)
    places = {v.untyped_storage().data_ptr() for s in saved["state"].values() for v in s.values()}
    for own in twin.state.values():
        for value in own.values():
            assert value.numel() == 0 or value.untyped_storage().data_ptr() not in places
    assert_continues(twin, original)
    assert bits(saved) == before


@pytest.mark.parametrize("change", ["groups", "sizes"])
def test_what_does_not_fit(change: str) -> None:
    """D2: SGD's errors with SGD's texts, and nothing has changed."""
    groups = [[(4, 3)], [(3,)]] if change == "groups" else [[(4, 3), (3,), (3,)]]
    saved = PowerSGDOptimizer([{"params": start(shapes=s)} for s in groups], lr=0.1).state_dict()
    ours, theirs = pair(start(shapes=[(4, 3), (3,)]), FULL_RANK, lr=0.1, momentum=0.9)
    before = all_of(ours)
    with pytest.raises(ValueError, match="parameter group") as expected:
        theirs.load_state_dict(saved)
    with pytest.raises(ValueError, match="parameter group") as caught:
        ours.load_state_dict(saved)
    assert str(caught.value) == str(expected.value)
    assert all_of(ours) == before


@pytest.mark.parametrize("cls", [PowerSGDOptimizer, SGD])
def test_dicts_of_older_versions(cls: type) -> None:
    """D3: settings that they do not know keep the value they have."""
    optimizer = a_run()
    own = OPTIONS if cls is PowerSGDOptimizer else {"lr": 0.1, "momentum": 0.9}
    older = cls(start(), **own)
    train([older], range(2))
    saved = copy.deepcopy(older.state_dict())
    present = dict(optimizer.param_groups[0])
    known = {"params", "lr", "momentum", "dampening", "weight_decay"}
    for group in saved["param_groups"]:
        for name in set(group) - known:
            del group[name]
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert {k: group[k] for k in group.keys() - known} == {
        k: present[k] for k in present.keys() - known
    }
    train([optimizer], range(2, 4))


def test_pickles_of_older_versions() -> None:
    """D3: `__setstate__` fills in what a pickled optimizer lacks."""
    state = a_run().__getstate__()
    for name in ("maximize", "foreach", "differentiable", "fused", "nesterov", "nonfinite", "rank"):
        del state["param_groups"][0][name]
    twin = PowerSGDOptimizer.__new__(PowerSGDOptimizer)
    twin.__setstate__(state)
    assert twin.param_groups[0]["rank"] == 1  # of its defaults
    train([twin], range(2, 4))


def test_hooks_of_state_dict() -> None:
    """D4: before and after saving, in order, with a replaced dict."""
    optimizer, calls = a_run(), []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre first"), prepend=True)

    def post(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**saved, "extra": len(saved["state"])}

    handle = optimizer.register_state_dict_post_hook(post)
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("post first"), prepend=True)
    saved = optimizer.state_dict()
    assert calls == ["pre first", "pre", "post first", "post"]
    assert saved["extra"] == len(saved["state"])
    handle.remove()
    assert "extra" not in optimizer.state_dict()


def test_hooks_of_load_state_dict() -> None:
    """D4: before and after loading, in order; a dict that a hook returns is loaded."""
    original = a_run()
    saved, calls = copy.deepcopy(original.state_dict()), []
    before = bits(saved)
    twin = fresh(original)

    def replace(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        groups = [{**group, "lr": 0.5} for group in given["param_groups"]]
        return {"state": given["state"], "param_groups": groups}

    def edit(_: Optimizer, given: dict[str, Any]) -> None:
        calls.append("pre first")
        given["seen"] = True  # of a shallow copy: the caller does not see it

    twin.register_load_state_dict_pre_hook(replace)
    twin.register_load_state_dict_pre_hook(edit, prepend=True)
    twin.register_load_state_dict_post_hook(lambda _: calls.append("post"))
    twin.register_load_state_dict_post_hook(lambda _: calls.append("post first"), prepend=True)
    twin.load_state_dict(saved)
    assert calls == ["pre first", "pre", "post first", "post"]
    assert twin.param_groups[0]["lr"] == 0.5
    assert bits(saved) == before
    assert bits(twin.state_dict()["state"]) == bits(original.state_dict()["state"])


@pytest.mark.parametrize("is_named", [False, True])
def test_files_without_code(is_named: bool) -> None:
    """D7: a saved state_dict holds nothing that torch.load would refuse."""

    def given(parameters: list[Tensor]) -> list[Any]:
        return [(f"layer{i}", p) if is_named else p for i, p in enumerate(parameters)]

    optimizer = PowerSGDOptimizer(given(start()), **OPTIONS)
    train([optimizer], range(2))
    twin = PowerSGDOptimizer(given(copied(parameters_of(optimizer))), lr=9.0)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_continues(twin, optimizer)


@pytest.mark.parametrize("flatten", [False, True])
def test_dicts_by_name(flatten: bool) -> None:
    """D8: torch.distributed.checkpoint's functions save and load one worker's optimizer."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    models = [torch.nn.Linear(6, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    original, twin = (PowerSGDOptimizer(m.parameters(), **OPTIONS) for m in models)
    train([original], range(2))
    models[1].load_state_dict(models[0].state_dict())
    saved = through_a_file(get_optimizer_state_dict(models[0], original, options=options))
    set_optimizer_state_dict(models[1], twin, saved, options=options)
    assert bits(twin.state_dict()["state"]) == bits(original.state_dict()["state"])
    assert_continues(twin, original)


def test_asking_for_a_dict_takes_no_step() -> None:
    """D8: torch takes one, with zero gradients, where it finds no state; ours has some at once."""
    model = torch.nn.Linear(6, 5)
    optimizer = PowerSGDOptimizer(model.parameters(), **OPTIONS)
    saved = get_optimizer_state_dict(model, optimizer)
    assert optimizer.communication_stats()["steps"] == 0
    assert set(saved["state"]["weight"]) == {"momentum_buffer", "momentum_started", "error", "q"}


def test_sharded_parameters() -> None:
    """D9: refused in words."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        with pytest.raises(NotImplementedError, match="DTensor"):
            PowerSGDOptimizer([sharded], lr=0.1)
    finally:
        dist.destroy_process_group()


def test_swapping_parameters_and_state_in() -> None:
    """D10: torch's functional form of a step works, and leaves the optimizer as it was."""
    stateless = pytest.importorskip("torch.optim._stateless", reason="new in torch 2.13")
    optimizer, twin = a_run(), a_run()
    before = all_of(optimizer)
    swapped_in = {str(i): p for i, p in enumerate(copied(parameters_of(optimizer)))}
    saved = copy.deepcopy(optimizer.state_dict())
    with stateless.swap_in_optimizer_params_and_state(optimizer, swapped_in, saved):
        for p, g in zip(swapped_in.values(), gradients(swapped_in.values(), 2), strict=True):
            p.grad = g
        optimizer.step()
    assert all_of(optimizer) == before
    train([twin], range(2, 3))
    for p, expected in zip(swapped_in.values(), parameters_of(twin), strict=True):
        assert torch.equal(p, expected)
    assert_continues(optimizer, a_run())


@pytest.mark.parametrize("load_first", [False, True])
def test_loading_beside_a_scheduler(load_first: bool) -> None:
    """D11: before or after a scheduler is made, with the effect that it has on SGD."""
    ends: list[list[Tensor]] = []
    for optimizer in pair(
        start(), {**FULL_RANK, "min_compression_rate": 1e9}, lr=0.1, momentum=0.9
    ):
        make = torch.optim.lr_scheduler.StepLR
        scheduler = make(optimizer, step_size=2, gamma=0.5)
        train([optimizer], range(3), [scheduler])
        saved, saved_scheduler = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
        again = type(optimizer)(copied(parameters_of(optimizer)), lr=7.0)
        if load_first:
            again.load_state_dict(saved)
            other = make(again, step_size=2, gamma=0.5, last_epoch=scheduler.last_epoch)
        else:
            other = make(again, step_size=2, gamma=0.5)
            again.load_state_dict(saved)
        other.load_state_dict(saved_scheduler)
        if optimizer.__class__ is PowerSGDOptimizer:
            assert again.param_groups[0]["momentum_form"] == "sgd"
        train([optimizer, again], range(3, 8), [scheduler, other])
        if not load_first:  # else the scheduler sets the rate of its first step once more
            assert bits(parameters_of(again)) == bits(parameters_of(optimizer))
        ends.append([*parameters_of(again), torch.tensor(again.param_groups[0]["lr"])])
    assert bits(ends[0]) == bits(ends[1])
