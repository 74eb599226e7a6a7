"""D1, D4 to D6, D10: state dicts in memory, and copies."""

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contract.adapters import Adapter, Loop
from benchmarks.contract.made import given, noise, same
from benchmarks.contract.questions import require, row


def trained(adapter: Adapter, steps: int = 4, **options: Any) -> Loop:
    """A loop after some steps, always the same."""
    torch.manual_seed(0)
    model = given()
    loop = adapter.loop(model, **{"momentum": 0.9, **options})
    for step in range(steps):
        loop.train(noise(model, step))
    return loop


def require_same_continuation(first: Loop, second: Loop, part: int = 0, what: str = "it") -> None:
    """Both must make the same four steps, to 1e-6."""
    for step in range(10, 14):
        for loop in (first, second):
            torch.manual_seed(step)
            loop.train(noise(loop.model, step, part))
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    difference = max(float((p - q).abs().max()) for p, q in pairs)
    require(
        same(second.model, first.model, 1e-6),
        f"{what} goes on in another way: parameters differ by {difference:.1g} after four steps",
    )


@row(
    "D1",
    "`state_dict()` refers to the live tensors; equal runs give equal dicts",
    "Tensors share memory with `optimizer.state`; two equal runs are compared bit by bit.",
)
def live_state_dict(adapter: Adapter) -> None:
    first, second = trained(adapter), trained(adapter)
    saved, other = first.optimizer.state_dict(), second.optimizer.state_dict()
    listed = [p for group in first.optimizer.param_groups for p in group["params"]]
    require(sorted(saved["state"]) == list(range(len(listed))), "keys are not the indexes")
    for index, p in enumerate(listed):
        for name, value in saved["state"][index].items():
            live = first.optimizer.state[p][name]
            require(not isinstance(live, Tensor) or live is value, f"{name} is a copy")
            equal = torch.equal(torch.as_tensor(value), other["state"][index][name])
            require(equal, f"{name} differs between equal runs")
    require(saved["param_groups"] == other["param_groups"], "groups differ between equal runs")


@row(
    "D4",
    "Hooks of `state_dict` and `load_state_dict`",
    "Before and after both, with `prepend`; a dict that a hook returns is used.",
)
def state_dict_hooks(adapter: Adapter) -> None:
    loop, seen = trained(adapter), []
    optimizer = loop.optimizer

    def replaced(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("replaced")
        groups = [{**group, "lr": 0.025} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("second"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("first"), prepend=True)
    handle = optimizer.register_state_dict_post_hook(replaced)
    saved = optimizer.state_dict()
    require(seen == ["first", "second", "replaced"], f"state_dict called {seen}")
    require(saved["param_groups"][0]["lr"] == 0.025, "what a hook returned is not used")
    handle.remove()
    seen.clear()
    optimizer.register_load_state_dict_pre_hook(replaced)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    require(seen == ["first", "second", "replaced", "after"], f"load_state_dict called {seen}")
    require(optimizer.param_groups[0]["lr"] == 0.025, "what a hook returned is not loaded")


@row(
    "D5",
    "`copy.deepcopy` of model and optimizer goes on alike",
    "Four steps of both are the same, to 1e-6; all public attributes are there. For what is not an "
    "optimizer, its state is copied along.",
)
def deep_copies(adapter: Adapter) -> None:
    loop = trained(adapter)
    model, parts = copy.deepcopy((loop.model, loop.parts()))
    public = {name for name in vars(loop.optimizer) if not name.startswith("_")}
    lost = public - vars(parts[0]).keys()
    require(not lost, f"the copy has no {', '.join(sorted(lost))}")
    require_same_continuation(loop, adapter.revive(model, parts), what="the copy")


@row(
    "D6",
    "Pickled, with a scheduler attached, and by `torch.save`",
    "Model and optimizer (and the state of what is none) go through pickle and through torch.save; "
    "four steps are the same, to 1e-6.",
)
def pickles(adapter: Adapter) -> None:
    for way in (_by_pickle, _by_torch):
        loop = trained(adapter)
        torch.optim.lr_scheduler.StepLR(loop.optimizer, 1)  # it replaces optimizer.step
        model, parts = way((loop.model, loop.parts()))
        require_same_continuation(loop, adapter.revive(model, parts), what="what was unpickled")


def _by_pickle(content: Any) -> Any:
    return pickle.loads(pickle.dumps(content))


def _by_torch(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@row(
    "D10",
    "`swap_in_optimizer_params_and_state`",
    "torch 2.13's way to step other tensors for a while: within it a step moves them, afterwards "
    "the optimizer has its own parameters back.",
)
def swapped(adapter: Adapter) -> None:
    from torch.optim._stateless import swap_in_optimizer_params_and_state  # new in torch 2.13

    loop = trained(adapter)
    saved = copy.deepcopy(loop.optimizer.state_dict())
    listed = [p for group in loop.optimizer.param_groups for p in group["params"]]
    others = {str(i): nn.Parameter(p.detach().clone()) for i, p in enumerate(listed)}
    before = [p.detach().clone() for p in listed]
    with swap_in_optimizer_params_and_state(loop.optimizer, others, saved):
        for other in others.values():
            other.grad = torch.ones_like(other)
        loop.step()
    for p, other, old in zip(listed, others.values(), before, strict=True):
        require(torch.equal(p, old), "the optimizer's own parameters moved")
        require(not torch.equal(other, old), "the swapped parameters did not move")
    now = [p for group in loop.optimizer.param_groups for p in group["params"]]
    require(all(p is q for p, q in zip(now, listed, strict=True)), "parameters are not given back")
