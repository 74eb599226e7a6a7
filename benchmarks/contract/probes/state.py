"""C: state and parameter groups."""

import copy
import io
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contract.adapters import Adapter
from benchmarks.contract.made import given, noise, require_equal_workers, same
from benchmarks.contract.probes.rules import sgd_twin
from benchmarks.contract.questions import require, row

__all__: list[str] = []


@row(
    "C1",
    "`state` holds tensors by name, for parameters only",
    "After two steps with momentum: keys are parameters, values are dicts of tensors, none empty.",
)
def state_of_tensors(adapter: Adapter) -> None:
    model = given()
    loop = adapter.loop(model, momentum=0.9)
    for step in range(2):
        loop.train(noise(model, step))
    state = loop.optimizer.state
    require(set(state) == set(model.parameters()), "its keys are not the parameters")
    for kept in state.values():
        require(isinstance(kept, dict) and kept, "a parameter has no state")
        for name, value in kept.items():
            require(isinstance(value, Tensor), f"{name} is a {type(value).__name__}")


@row(
    "C2",
    "State dicts go from SGD and to SGD",
    "A run changes over from SGD and back, uncompressed; the parameters are SGD's, bit by bit.",
)
def interchange(adapter: Adapter) -> None:
    adapter.needs_sgd()
    model = given()
    sgd = sgd_twin(model, momentum=0.9)
    first = sgd_twin(model, momentum=0.9)
    for step in range(2):
        sgd.train(noise(model, step))
        first.train(noise(model, step))
    first.zero_grad()
    own = adapter.loop(first.model, rank=None, momentum=0.5)
    own.optimizer.load_state_dict(first.optimizer.state_dict())
    for step in range(2, 4):
        sgd.train(noise(model, step))
        own.train(noise(model, step))
    require(same(own.model, sgd.model), "from SGD: other parameters than SGD's")
    last = sgd_twin(own.model)
    last.optimizer.load_state_dict(own.optimizer.state_dict())
    for step in range(4, 6):
        sgd.train(noise(model, step))
        last.train(noise(model, step))
    require(same(last.model, sgd.model), "to SGD: other parameters than SGD's")


@row(
    "C3",
    "Foreign entries in `state` do no harm",
    "A number under a string; a step, a state_dict, and loading it.",
)
def foreign_state(adapter: Adapter) -> None:
    model = given()
    loop = adapter.loop(model, momentum=0.9)
    loop.train(noise(model, 0))
    loop.optimizer.state["a number"] = 1
    loop.train(noise(model, 1))
    loop.optimizer.load_state_dict(loop.optimizer.state_dict())
    loop.train(noise(model, 2))
    require(loop.optimizer.state["a number"] == 1, "it is lost")


@row(
    "C4",
    "`add_param_group` in mid-run",
    "A matrix is added after three steps of two workers; it moves, and workers stay equal.",
    workers=2,
)
def added_group(adapter: Adapter) -> None:
    model = given((12, 10), (9, 14))
    first, second = model.parameters()
    loop = adapter.loop(model, [first])
    for step in range(3):
        loop.train(noise(model, step, dist.get_rank()))
    before = second.detach().clone()
    loop.optimizer.add_param_group({"params": [second], "lr": 0.05})
    for step in range(3, 7):
        loop.train(noise(model, step, dist.get_rank()))
    require(not torch.equal(second, before), "the added parameter did not move")
    require_equal_workers(model, "after a group was added")


@row(
    "C5",
    "Reordering a group; freezing and unfreezing",
    "The list of parameters is reversed: parameters are those of a run in which it is not, to "
    "1e-5. One is frozen, and is left alone; unfrozen, and moves.",
)
def reordered(adapter: Adapter) -> None:
    models = [given((12, 10), (9, 14), (7, 8)) for _ in range(2)]
    loops = []
    for model in models:
        torch.manual_seed(0)
        loop = adapter.loop(model, momentum=0.9, unused=True)
        loops.append(loop)
        for step in range(3):
            loop.train(noise(model, step))
        if model is models[1]:
            loop.optimizer.param_groups[0]["params"].reverse()
        for step in range(3, 5):
            loop.train(noise(model, step))
    require(same(*models, 1e-5), "the order matters")
    model, loop = models[0], loops[0]
    frozen = model.weights[1].requires_grad_(False)
    frozen.grad, before = None, frozen.detach().clone()
    for step in range(5, 7):
        loop.train(noise(model, step))
    require(torch.equal(frozen, before), "a frozen parameter moved")
    frozen.requires_grad_(True)
    for step in range(7, 9):
        loop.train(noise(model, step))
    require(not torch.equal(frozen, before), "an unfrozen parameter did not move")


@row(
    "C6",
    "Settings are plain values",
    "Those of the groups are numbers, bools, None, strings, or sequences of them; they can be "
    "pickled, copied, and loaded by torch with weights_only=True.",
)
def plain_settings(adapter: Adapter) -> None:
    loop = adapter.loop(given(), momentum=0.9)
    groups = loop.optimizer.state_dict()["param_groups"]
    for group in groups:
        for name, value in group.items():
            require(_is_plain(value), f"{name} is a {type(value).__name__}")
    file = io.BytesIO()
    torch.save(groups, file)
    file.seek(0)
    require(torch.load(file, weights_only=True) == groups, "torch.load returns something else")
    require(pickle.loads(pickle.dumps(groups)) == copy.deepcopy(groups) == groups, "copies differ")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | bool | str)


@row(
    "C7",
    "Names of parameters are kept",
    "They are in the groups and in the state_dict, and are there after loading.",
)
def parameter_names(adapter: Adapter) -> None:
    model = given((12, 10), (9, 14))
    loop = adapter.loop(model, model.named_parameters())
    loop.train(noise(model, 0))
    names = [name for name, _ in model.named_parameters()]
    saved = loop.optimizer.state_dict()
    require(saved["param_groups"][0]["param_names"] == names, "not in the state_dict")
    other = adapter.loop(given((12, 10), (9, 14)), model.named_parameters())
    other.optimizer.load_state_dict(saved)
    require(other.optimizer.param_groups[0]["param_names"] == names, "lost by loading")
