"""Optimizers in checkpoints of torch.distributed.checkpoint, without processes."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from efsgd import GradientAverager, PowerSGD, PowerSGDOptimizer
from efsgd.checkpoint import ElasticLoadPlanner, OptimizerState, average_errors_
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from tests.simulation import bits

# DCP says this whenever there is no process group, which here is the case.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OPTIONS = {"lr": 0.05, "momentum": 0.9, "rank": 2}


def make_model(sizes: tuple[int, ...] = (8, 10, 6), dtype: torch.dtype = torch.float32) -> Any:
    return nn.Sequential(*map(nn.Linear, sizes, sizes[1:])).to(dtype)


def make(model: nn.Module, **options: Any) -> PowerSGDOptimizer:
    return PowerSGDOptimizer(model.parameters(), **{**OPTIONS, **options})


def train(model: nn.Module, optimizer: ErrorFeedbackOptimizer, steps: range = range(3)) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            made = torch.randn(parameter.shape, generator=generator)
            parameter.grad = made.to(parameter.dtype)
        optimizer.step()


def save(folder: Path, model: nn.Module, optimizer: ErrorFeedbackOptimizer) -> None:
    dcp.save({"model": model, "own": OptimizerState(model, optimizer)}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: ErrorFeedbackOptimizer) -> None:
    state = {"model": model, "own": OptimizerState(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, planner=ElasticLoadPlanner())


def copy_through(folder: Path, source: tuple[Any, Any], target: tuple[Any, Any]) -> None:
    """Saves one model and optimizer, and has others load them: all must then be equal."""
    save(folder, *source)
    load(folder, *target)
    assert bits(target[1].state_dict()) == bits(source[1].state_dict())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, and what it should hold."""
    model, optimizer = made()
    save(tmp_path, model, optimizer)
    return tmp_path, copy.deepcopy(optimizer.state_dict())


def made(sizes: tuple[int, ...] = (8, 10, 6), **options: Any) -> tuple[Any, PowerSGDOptimizer]:
    """A model and its optimizer, trained."""
    model = make_model(sizes)
    optimizer = make(model, **options)
    train(model, optimizer)
    return model, optimizer


def with_other_groups() -> tuple[Any, PowerSGDOptimizer]:
    model = make_model()
    groups = [{"params": layer.parameters()} for layer in model]
    return model, PowerSGDOptimizer(groups, **OPTIONS)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            lambda: made((8, 10, 7)),
            ["own.state.1.weight.", "[6, 10] there and [7, 10]", "Make model and optimizer as"],
        ),
        (lambda: made((8, 10, 6, 6)), ["lacks own.state.2.", "and 3 more"]),
        (lambda: made((8, 10)), ["it has own.", ".1.weight", "unlike the optimizer"]),
        (lambda: made(momentum=0), ["momentum_buffer, unlike the optimizer", "momentum"]),
        (
            with_other_groups,
            ["1.weight in group 0, where", "1.weight in group 1. Make the optimizer"],
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(
    saved: tuple[Path, Any], other: Callable[[], Any], words: list[str]
) -> None:
    model, optimizer = other()
    before = bits(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises((CheckpointException, ValueError)) as caught:
        load(saved[0], model, optimizer)
    error = caught.value
    if isinstance(error, CheckpointException):
        [(error, _)] = error.failures.values()
    assert type(error) is ValueError
    assert all(word in str(error) for word in words), error
    assert bits(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    "options",
    [{"rank": 3}, {"rank": 1}, {"min_compression_rate": torch.inf}, {"error_feedback": False}],
)
def test_ranks_and_what_is_compressed_come_from_the_checkpoint(
    saved: tuple[Path, Any], options: dict[str, Any]
) -> None:
    folder, expected = saved
    model, optimizer = made(**options)
    load(folder, model, optimizer)
    assert bits(optimizer.state_dict()["state"]) == bits(expected["state"])
    loaded = {name: optimizer.param_groups[0][name] for name in options}
    assert loaded == {name: expected["param_groups"][0][name] for name in options}


def test_a_file_that_cannot_be_read_changes_nothing(saved: tuple[Path, Any]) -> None:
    [file] = saved[0].glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-400] + bytes(400))  # of the last item: the others can be read
    model, optimizer = made()
    before = bits(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(CheckpointException):
        load(saved[0], model, optimizer)
    assert bits(optimizer.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model, resumed = make_model(dtype=dtype), make_model(dtype=dtype)
    options = {"lr": torch.tensor(0.05), "nonfinite": "skip", "start_compressing_at": 1}
    optimizer, other = make(model, **options), make(resumed, lr=torch.tensor(1.0))
    train(model, optimizer)
    copy_through(tmp_path, (model, optimizer), (resumed, other))
    for each, its in ((model, optimizer), (resumed, other)):
        train(each, its, range(3, 6))
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    assert bits(list(resumed.parameters())) == bits(list(model.parameters()))


class Mixture(nn.Module):
    """What has a sparse gradient, a complex parameter, and a matrix beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6, sparse=True)
        self.turn = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64))
        self.out = nn.Linear(5, 4)

    def forward(self, step: int) -> torch.Tensor:
        rotated = self.words(torch.arange(step, step + 3)).to(torch.complex64) @ self.turn
        return self.out(rotated.abs()).square().mean()


def test_sparse_gradients_and_complex_parameters(tmp_path: Path) -> None:
    models = [Mixture(), Mixture()]
    optimizers = [PowerSGDOptimizer(model.parameters(), **OPTIONS) for model in models]

    def go(model: nn.Module, optimizer: PowerSGDOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(step).backward()
            optimizer.step()

    go(models[0], optimizers[0], range(3))
    copy_through(tmp_path, *zip(models, optimizers, strict=True))
    for model, optimizer in zip(models, optimizers, strict=True):
        go(model, optimizer, range(3, 6))
    assert bits(optimizers[1].state_dict()) == bits(optimizers[0].state_dict())
    assert bits(list(models[1].parameters())) == bits(list(models[0].parameters()))


def test_a_gradient_averager_is_saved_like_an_optimizer(tmp_path: Path) -> None:
    models = [make_model(), make_model()]
    averagers = [GradientAverager(model.parameters(), PowerSGD(rank=2)) for model in models]
    train(models[0], averagers[0])
    copy_through(tmp_path, *zip(models, averagers, strict=True))
    assert any(state["error"].any() for state in averagers[1].state.values() if "error" in state)


def test_errors_that_were_averaged_stay_nobody_s(tmp_path: Path) -> None:
    model, optimizer = made()
    other = make(model)
    average_errors_(optimizer)
    copy_through(tmp_path, (model, optimizer), (model, other))
    assert other.param_groups[0]["world_size"] == 0


def test_names_are_those_of_the_model_without_wrappers(saved: tuple[Path, Any]) -> None:
    model = make_model()
    optimizer = make(model)
    state = {"own": OptimizerState(torch.compile(model, backend="eager"), optimizer)}
    dcp.load(state, checkpoint_id=saved[0], planner=ElasticLoadPlanner())
    assert bits(optimizer.state_dict()) == bits(saved[1])


def test_settings_that_the_checkpoint_lacks_are_kept(tmp_path: Path) -> None:
    model = make_model()
    older, newer = make(model), make(model, nonfinite="skip")

    def drop(_: Any, state_dict: dict[str, Any]) -> None:  # as a version without it would save
        for group in state_dict["param_groups"]:
            del group["nonfinite"]

    older.register_state_dict_post_hook(drop)
    save(tmp_path, model, older)
    load(tmp_path, model, newer)
    assert newer.param_groups[0]["nonfinite"] == "skip"


@pytest.mark.parametrize("depth", [0, 2])
def test_it_may_lie_anywhere_in_what_is_saved(tmp_path: Path, depth: int) -> None:
    # DCP asks only the objects at the top for their state; a program may do so below.
    model, optimizer = made()
    other = make(model)
    own = OptimizerState(model, other).state_dict()
    nested = [OptimizerState(model, optimizer).state_dict(), own]
    for _ in range(depth):
        nested = [{"inner": each} for each in nested]
    dcp.save(nested[0], checkpoint_id=tmp_path)
    dcp.load(nested[1], checkpoint_id=tmp_path, planner=ElasticLoadPlanner())
    OptimizerState(model, other).load_state_dict(own)  # which DCP has filled
    assert bits(other.state_dict()) == bits(optimizer.state_dict())


def test_two_optimizers_of_one_model_lie_side_by_side(tmp_path: Path) -> None:
    def both() -> tuple[Any, dict[str, Any], list[PowerSGDOptimizer]]:
        model = make_model()
        optimizers = [PowerSGDOptimizer(layer.parameters(), **OPTIONS) for layer in model]
        states = {f"part {i}": OptimizerState(model, o) for i, o in enumerate(optimizers)}
        return model, states, optimizers

    model, states, optimizers = both()
    for optimizer in optimizers:
        train(model, optimizer)
    dcp.save(states, checkpoint_id=tmp_path)
    _, others, loaded = both()
    dcp.load(others, checkpoint_id=tmp_path, planner=ElasticLoadPlanner())
    for optimizer, other in zip(optimizers, loaded, strict=True):
        assert bits(other.state_dict()) == bits(optimizer.state_dict())


def test_dcp_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, efsgd, efsgd.checkpoint\n"
        "assert 'torch.distributed.checkpoint' not in sys.modules\n"
        "assert efsgd.checkpoint.OptimizerState.state_dict\n"
        "assert 'torch.distributed.checkpoint' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_cannot_be_saved_or_loaded_says_so() -> None:
    model, foreign = make_model(), make_model()
    with pytest.raises(TypeError, match=r"SGD\. Must be an optimizer of efsgd"):
        OptimizerState(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"does not have parameter 0 .*\[10, 8\]"):
        OptimizerState(model, make(foreign))
    optimizer = make(model)
    state = OptimizerState(model, optimizer)
    with pytest.raises(ValueError, match=r"not made by OptimizerState.*optimizer\.load_state_dict"):
        state.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"worker 0 of 1 cannot load .* checkpoint of 4.*Elastic"):
        # With allow_partial_load DCP leaves out the errors that it does not find.
        state.load_state_dict({**state.state_dict(), "efsgd_world_size": 4})
