"""Modes of a thread that are on when this package is called change nothing, then or later.

Programs validate under inference mode, compute under autocast, and set defaults of dtype and
device; schedulers step, and checkpoints are loaded, in the midst of it.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efsgd import (
    ErrorFeedbackSGD,
    GradientAverager,
    Identity,
    PowerSGDOptimizer,
    Signum,
    TopK,
    average_buffers,
    broadcast_buffers,
)
from efsgd.algorithms.interfaces import Compressor
from efsgd.checkpoint import OptimizerState, average_errors_, consolidated_state_dict
from efsgd.rank import Accordion, CommunicationBudget, LGreCo, RankScheduler
from efsgd.rank.base import RankPolicy
from efsgd.testing.gradients import made_up
from tests.compressors.test_contract_suite import EVERY_COMPRESSOR
from tests.simulation import bits, copied, parameters_of, step_with

SHAPES = [(24, 14), (14,), (6, 5, 3)]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
}


class Program:
    """A training program of one worker, whose gradients are made up from the number of the step."""

    def __init__(self, policy: RankPolicy | None = None) -> None:
        self.model = nn.ParameterList(self.tensors(0))
        self.buffers = nn.BatchNorm1d(5)
        self.optimizer: Any = self.made()
        self.scheduler: Any = None if policy is None else RankScheduler(self.optimizer, policy)
        self.steps = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @staticmethod
    def tensors(step: int) -> list[Tensor]:
        made = [made_up("gaussian", shape, step, i) for i, shape in enumerate(SHAPES)]
        return [each.float() for each in made]

    def made(self, kind: Any = PowerSGDOptimizer, **options: Any) -> Any:
        if kind is PowerSGDOptimizer:
            options = {"rank": 2, "momentum": 0.9, "momentum_form": "sgd", **options}
        return kind(self.parameters, lr=0.1, **options)

    def backward(self) -> None:
        self.steps += 1
        for parameter, gradient in zip(self.parameters, self.tensors(self.steps), strict=True):
            parameter.grad = gradient

    def train(self) -> None:
        self.backward()
        self.optimizer.step()

    @property
    def outcome(self) -> Any:
        states = [dict(self.optimizer.state[p]) for p in self.parameters]
        gradients = [p.grad for p in self.parameters]
        return bits([self.parameters, states, gradients, dict(self.buffers.named_buffers())])


def steps(program: Program) -> None:
    program.optimizer.step()


def evaluates_a_closure(program: Program) -> None:
    program.optimizer.step(lambda: program.backward())


def constructs(kind: Any, **options: Any) -> Callable[[Program], None]:
    def construct(program: Program) -> None:
        program.optimizer = program.made(kind, **options)

    return construct


def steps_a_new(kind: Any, **options: Any) -> Callable[[Program], None]:
    def step(program: Program) -> None:
        program.optimizer = program.made(kind, **options)
        program.optimizer.step()

    return step


def takes_over(program: Program) -> None:
    sgd = torch.optim.SGD(program.parameters, lr=0.1, momentum=0.9)
    sgd.step()  # in inference mode its momenta are such tensors
    program.optimizer = PowerSGDOptimizer.from_sgd(sgd, rank=2)


def adds_a_group(program: Program) -> None:
    first, *others = program.parameters
    program.optimizer = PowerSGDOptimizer([first], lr=0.1, momentum=0.9, rank=2)
    program.optimizer.add_param_group({"params": others})


def loads(program: Program) -> None:
    program.optimizer.load_state_dict(copy.deepcopy(program.optimizer.state_dict()))


def copies(program: Program) -> None:
    program.optimizer = copy.deepcopy(program.optimizer)
    program.model = nn.ParameterList(parameters_of(program.optimizer))


def replaces_momenta(program: Program) -> None:
    for parameter in program.parameters:
        state = program.optimizer.state[parameter]
        state["momentum_buffer"] = state["momentum_buffer"] * 0.5


def averages_gradients(program: Program) -> None:
    for parameter, gradient in zip(program.parameters, program.tensors(9), strict=True):
        parameter.grad = gradient  # made in this mode
    GradientAverager(program.parameters).average_()


def steps_differentiably(program: Program) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        clones = [parameter.clone() for parameter in program.parameters]
    for clone, parameter in zip(clones, program.parameters, strict=True):
        clone.grad = parameter.grad
    options: dict[str, Any] = {"compressor": Identity(), "differentiable": True}
    ErrorFeedbackSGD(clones, lr=0.1, momentum=0.9, **options).step()
    with torch.no_grad():
        for clone, parameter in zip(clones, program.parameters, strict=True):
            assert clone.grad_fn is not None  # autograd has gone through the step
            parameter.copy_(clone)


def averages_errors(program: Program) -> None:
    average_errors_(program.optimizer)


def loads_a_checkpoint(program: Program) -> None:
    program.optimizer.load_state_dict(consolidated_state_dict(program.optimizer))


def loads_distributed_state(program: Program) -> None:
    state = OptimizerState(program.model, program.optimizer)
    state.load_state_dict(state.state_dict())


def averages_buffers(program: Program) -> None:
    average_buffers(program.buffers)
    broadcast_buffers(program.buffers)


def looks_at_workers(program: Program) -> None:
    program.optimizer.compare_workers()
    program.optimizer.broadcast_parameters()


ENTRIES: list[Callable[[Program], None]] = [
    steps,
    evaluates_a_closure,
    takes_over,
    adds_a_group,
    loads,
    copies,
    replaces_momenta,
    averages_gradients,
    loads_a_checkpoint,
    loads_distributed_state,
    averages_buffers,
    looks_at_workers,
    averages_errors,
    steps_differentiably,
    constructs(PowerSGDOptimizer),
    constructs(ErrorFeedbackSGD, compressor=TopK(density=0.2)),
    constructs(Signum),
    steps_a_new(PowerSGDOptimizer, rank=2, alternating=True, max_grad_norm=1.0),
    steps_a_new(PowerSGDOptimizer, momentum_form="paper"),
    steps_a_new(Signum),
]


def a_run(entry: Callable[[Program], None], mode: Callable[[], Any], policy: str = "") -> Any:
    program = Program(POLICIES[policy]() if policy else None)
    program.train()
    for _ in range(2):
        program.backward()
        with mode():
            entry(program)
        program.train()
    return program.outcome


@functools.cache
def a_plain_run(entry: Callable[[Program], None], policy: str = "") -> Any:
    return a_run(entry, contextlib.nullcontext, policy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__qualname__)
def test_a_mode_changes_nothing(entry: Callable[[Program], None], mode: str) -> None:
    assert a_run(entry, MODES[mode]) == a_plain_run(entry)


def decides(program: Program) -> None:
    program.scheduler.step()


def loads_a_scheduler(program: Program) -> None:
    program.scheduler.load_state_dict(program.scheduler.state_dict())


def loads_a_consolidated_scheduler(program: Program) -> None:
    program.scheduler.load_state_dict(program.scheduler.consolidated_state_dict())


def makes_a_scheduler(program: Program) -> None:
    program.scheduler.close()
    program.scheduler = RankScheduler(program.optimizer, program.scheduler.policy)


POLICIES: dict[str, Callable[[], RankPolicy]] = {
    "Accordion": lambda: Accordion(low=1, high=3, interval=1),
    "LGreCo": lambda: LGreCo(2),
    "CommunicationBudget": lambda: CommunicationBudget(bytes_per_step=600, interval=1),
}
DECISIONS = [decides, loads_a_scheduler, loads_a_consolidated_scheduler, makes_a_scheduler]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("entry", DECISIONS)
def test_a_mode_changes_no_decision(
    entry: Callable[[Program], None], policy: str, mode: str
) -> None:
    assert a_run(entry, MODES[mode], policy) == a_plain_run(entry, policy)


def some_steps(compressor: Compressor, mode: Callable[[], Any]) -> Any:
    """Two workers, constructed and stepped in this mode, and stepped outside of it."""
    teams = [copied(Program.tensors(0)) for _ in range(2)]
    gradients = [[Program.tensors(10 * step + worker) for worker in (0, 1)] for step in range(5)]
    with mode():
        workers = [ErrorFeedbackSGD(own, lr=0.1, compressor=compressor) for own in teams]
        for own in gradients[:4]:
            step_with(workers, own)
    step_with(workers, gradients[4])
    return bits([(parameters_of(worker), list(worker.state.values())) for worker in workers])


@pytest.mark.parametrize("mode", ["inference_mode", "autocast"])  # defaults have their own test
@pytest.mark.parametrize("compressor", EVERY_COMPRESSOR, ids=repr)
def test_a_mode_changes_nothing_that_is_sent(compressor: Compressor, mode: str) -> None:
    assert some_steps(compressor, MODES[mode]) == some_steps(compressor, contextlib.nullcontext)
