"""Workers in lockstep to which anything is done that programs do, beside the naive reference."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd import PowerSGDOptimizer
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.checkpoint.consolidated import consolidation
from efsgd.engine.parameters import list_parameters
from efsgd.rank import Accordion, RankScheduler
from efsgd.testing import lockstep, step_together
from tests.promises.reference import Hyperparameters, Reference
from tests.rank.rank_changes import naive_resized
from tests.simulation import SEED, bits, difference, parameters_of, replicated, snapshot
from tests.strategies import gaussian, matrix_dimensions

SHAPES = [(6, 5), (4,), (6, 5), (5, 2, 4), (3, 9)]
SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "rank": 1}
# float64 rounding, 2e-16, multiplied by what some fifty steps of error feedback make of it.
ROUNDING = 1e-7


@dataclass
class Slot:
    """A parameter on all workers. The reference knows it by its number, wherever it stands."""

    number: int
    parameters: list[Tensor]
    is_known: bool = True  # whether optimizers have kept what they learned of it


def forget(reference: Reference, number: int) -> None:
    """The reference knows no more of a parameter than its values."""
    shape = reference.shapes[number]
    reference.momenta[number] = torch.zeros(shape, dtype=torch.float64)
    reference.has_momentum[number], reference.queries[number] = False, None
    for errors in reference.errors:
        errors[number] = torch.zeros(shape, dtype=torch.float64)


class Workers:
    """Optimizers of several workers, one reference, and what stands where in the groups."""

    def __init__(self, world_size: int, *, adaptive: bool) -> None:
        self.world_size, self.adaptive, self.seed = world_size, adaptive, 0
        self.slots: list[Slot] = []
        self.out: list[dict[str, Any]] = []  # groups of worker 0 that were taken out, as of all
        self.reference = Reference([], [], world_size, [], lambda index, step: torch.empty(0))
        first, second = [self.new_slot() for _ in range(3)], [self.new_slot() for _ in range(2)]
        self.optimizers = [
            PowerSGDOptimizer(
                [{"params": [slot.parameters[w] for slot in own]} for own in (first, second)],
                momentum_form="sgd", seed=SEED, **SETTINGS,
            )
            for w in range(world_size)
        ]  # fmt: skip
        self.begin_scheduling()

    # ---- what stands where ----------------------------------------------------------------------

    def new_slot(self) -> Slot:
        number = len(self.slots)
        shape = SHAPES[number % len(SHAPES)]
        value = gaussian(shape, 1000 + number)
        workers = [value.clone().requires_grad_() for _ in range(self.world_size)]
        self.slots.append(Slot(number, workers))
        reference = self.reference
        reference.shapes.append(shape)
        reference.hyperparameters.append(Hyperparameters(momentum_form="sgd"))
        reference.parameters.append(value.clone())
        for tensors in (reference.momenta, reference.last_updates):
            tensors.append(torch.zeros(shape, dtype=torch.float64))
        for each in (*reference.errors, *reference.deltas):
            each.append(torch.zeros(shape, dtype=torch.float64))
        reference.has_momentum.append(False)
        reference.queries.append(None)
        return self.slots[-1]

    def slot_of(self, parameter: Tensor) -> Slot:
        return next(s for s in self.slots if any(p is parameter for p in s.parameters))

    def present(self) -> list[Slot]:
        """Those in the groups, in order."""
        return [self.slot_of(p) for p in parameters_of(self.optimizers[0])]

    def absent(self) -> list[Slot]:
        present = {slot.number for slot in self.present()}
        held = {self.slot_of(p).number for group in self.out for p in group["params"]}
        return [slot for slot in self.slots if slot.number not in present | held]

    def in_all(self, act: Callable[[PowerSGDOptimizer, int], Any]) -> list[Any]:
        return [act(optimizer, worker) for worker, optimizer in enumerate(self.optimizers)]

    def put(self, slot: Slot, by: str, place: int) -> None:
        """Puts a parameter into a group of its own, or into one that is there."""
        for optimizer, parameter in zip(self.optimizers, slot.parameters, strict=True):
            groups = optimizer.param_groups
            if by == "group" or not groups:
                optimizer.add_param_group({"params": [parameter]})
            elif by == "append":
                groups[place % len(groups)]["params"].append(parameter)
            else:
                groups[place % len(groups)]["params"].insert(place, parameter)
        if by == "group":
            self.fit_reference()  # all factors have been fitted to ranks

    # ---- steps ----------------------------------------------------------------------------------

    def give_gradients(self) -> list[list[Tensor | None]]:
        """New gradients for every parameter: some are missing, some are zero.

        Of a parameter they are never zero on all workers: what is left of errors then has a low
        rank, and columns that are rounding have other directions in the reference.
        """
        self.seed += 1
        draw = random.Random(self.seed)
        made: list[list[Tensor | None]] = [[] for _ in range(self.world_size)]
        for slot in self.slots:
            shape, is_missing = self.reference.shapes[slot.number], draw.randrange(6) == 0
            whole = draw.randrange(self.world_size)
            for worker, own in enumerate(made):
                kind = 2 if worker == whole else draw.randrange(4)
                gradient = gaussian(shape, 97 * self.seed + 13 * worker + slot.number)
                own.append(None if is_missing or kind == 0 else gradient * (kind != 1))
                slot.parameters[worker].grad = own[-1]
        return made

    def step(self, mode: Callable[[], Any] = contextlib.nullcontext) -> None:
        """A step that must succeed, and be the reference's."""
        gradients = self.give_gradients()
        trained = {s.number for s in self.present() if s.parameters[0].requires_grad}
        for own in gradients:
            for slot in self.slots:
                if slot.number not in trained:
                    own[slot.number] = None
        self.fit_reference()
        self.reference.step(gradients)
        with mode():
            step_together(self.optimizers)
        self.sum_up(gradients)
        self.check()

    def fit_reference(self) -> None:
        """Gives the reference the settings of the groups, and queries that fit them."""
        for info in list_parameters(self.optimizers[0].settled_groups):
            slot, settings = self.slot_of(info.parameter), info.settings
            number, hyper = slot.number, self.reference.hyperparameters[slot.number]
            for name in SETTINGS:
                setattr(hyper, name, settings[name])
            trained = info.parameter.requires_grad
            if not slot.is_known and trained:
                forget(self.reference, number)
                slot.is_known = True
            if not self.reference.is_compressible(number) or not trained:
                continue
            n, m = matrix_dimensions(self.reference.shapes[number])
            fresh = initial_query(SEED, info.index, m, min(n, m, hyper.rank))
            kept = self.reference.queries[number]
            if kept is None:
                kept = self.optimizers[0].state[info.parameter].get("q", fresh).clone()
                self.reference.queries[number] = kept
            if kept.shape != fresh.shape:
                self.reference.queries[number] = naive_resized(kept, fresh)

    def refuse(self, error: type[Exception], words: str, act: Callable[[], object]) -> None:
        """A call that must fail on all workers with this error, and change nothing."""
        before = bits(snapshot(self.optimizers))
        try:
            act()
        except error as caught:
            assert words in str(caught), caught
        else:
            raise AssertionError(f"no {error.__name__}")
        assert bits(snapshot(self.optimizers)) == before

    def check(self) -> None:
        """Workers are equal to the bit, and have what the reference has."""
        first = replicated(self.optimizers[0])
        assert all(replicated(optimizer) == first for optimizer in self.optimizers)
        for slot in self.present():
            expected = self.reference.parameters[slot.number]
            apart = difference(slot.parameters[0], expected)
            assert apart < ROUNDING, (slot.number, apart)
            for worker, optimizer in enumerate(self.optimizers):
                state = optimizer.state[slot.parameters[worker]]
                error = self.reference.errors[worker][slot.number]
                if "error" in state and slot.is_known:
                    scale = max(1.0, float(error.abs().max()))
                    apart = float((state["error"] - error).abs().max())
                    assert apart < ROUNDING * scale, (slot.number, apart)
        counts = {o.param_groups[0]["step"] for o in self.optimizers if o.param_groups}
        assert len(counts) <= 1

    # ---- ranks that a policy decides on ---------------------------------------------------------

    def begin_scheduling(self) -> None:
        self.schedulers: list[RankScheduler] = []
        self.sums: dict[int, list[Tensor]] = {}
        matrices = [s for s in self.present() if len(self.reference.shapes[s.number]) > 1]
        if self.adaptive and matrices:
            self.schedulers = [
                RankScheduler(o, Accordion(low=1, high=2, interval=1)) for o in self.optimizers
            ]
            self.begin_window()

    def begin_window(self) -> None:
        """Sums of what each worker brings start from zero, by slot."""
        self.sums = {}

    def sum_up(self, gradients: list[list[Tensor | None]]) -> None:
        for worker, own in enumerate(gradients):
            for number, gradient in enumerate(own):
                zeros = torch.zeros(self.reference.shapes[number], dtype=torch.float64)
                sums = self.sums.setdefault(number, [zeros.clone() for _ in gradients])
                sums[worker] += zeros if gradient is None else gradient
        for worker, scheduler in enumerate(self.schedulers):
            numbers = scheduler._numbers._numbers
            for index, found in scheduler.policy.accumulators[0].sums.items():
                parameter = next(p for p, number in numbers.items() if number == index)
                expected = self.sums[self.slot_of(parameter).number][worker]
                assert difference(found.view(expected.shape), expected) < ROUNDING

    def decide(self) -> None:
        """The policy decides, and a window begins; nothing does where no step was taken."""
        if not self.schedulers:
            return
        count = len(self.schedulers)
        lockstep([s.exchange(count, worker) for worker, s in enumerate(self.schedulers)])
        if self.schedulers[0]._last_step == self.reference.step_number:
            self.begin_window()

    # ---- checkpoints ----------------------------------------------------------------------------

    def resume(self, world_size: int, saved: list[Any]) -> None:
        """New optimizers, of as many workers as there are dicts, which load them."""
        self.out = []
        present = {slot.number for slot in self.present()}
        groups = [
            [self.slot_of(p).number for p in group["params"]]
            for group in self.optimizers[0].param_groups
        ]
        for slot in self.slots:
            frozen = not slot.parameters[0].requires_grad
            value = slot.parameters[0].detach()
            slot.parameters = [value.clone().requires_grad_(not frozen) for _ in range(world_size)]
            slot.is_known = slot.is_known and slot.number in present
        if world_size != self.world_size or saved[0] is saved[-1]:
            errors = [
                sum(each) / self.world_size for each in zip(*self.reference.errors, strict=True)
            ]
            self.reference.errors = [copy.deepcopy(errors) for _ in range(world_size)]
            self.reference.deltas = [copy.deepcopy(errors) for _ in range(world_size)]
        self.world_size = self.reference.world_size = world_size
        for scheduler in self.schedulers:
            scheduler.close()
        self.optimizers = [
            PowerSGDOptimizer(
                [{"params": [self.slots[n].parameters[w] for n in own]} for own in groups],
                momentum_form="sgd", seed=SEED, **SETTINGS,
            )
            for w in range(world_size)
        ]  # fmt: skip
        for optimizer, state_dict in zip(self.optimizers, saved, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state_dict))
        self.fit_reference()  # loading has fitted factors to ranks
        self.begin_scheduling()

    def consolidated(self) -> Any:
        found = lockstep([consolidation(optimizer) for optimizer in self.optimizers]).results
        return found[0]


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    """Another default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


#: Modes of the calling thread, in which a step is the same step.
MODES: list[Callable[[], Any]] = [
    torch.inference_mode,
    torch.no_grad,
    lambda: torch.autocast("cpu", torch.bfloat16),
    default_dtype,
    lambda: torch.device("meta"),
]
