"""Workers in lockstep to which anything is done that programs do, beside the naive reference."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd import PowerSGDOptimizer
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.engine.parameters import list_parameters
from efsgd.testing import step_together
from tests.field.slots import Slot, give_gradients
from tests.field.windows import Windows
from tests.promises.reference import Reference
from tests.rank.rank_changes import naive_resized
from tests.simulation import SEED, bits, difference, parameters_of, replicated
from tests.strategies import matrix_dimensions

SETTINGS: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.5,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "maximize": False,
    "rank": 1,
    "min_compression_rate": 1.0,
}
# float64 rounding, 2e-16, multiplied by what some fifty steps of error feedback make of it.
ROUNDING = 1e-7


class Workers:
    """Optimizers of several workers, one reference, and what stands where in the groups."""

    def __init__(self, world_size: int, *, policy: str | None) -> None:
        self.world_size, self.policy, self.seed = world_size, policy, 0
        self.slots: list[Slot] = []
        self.out: list[dict[str, Any]] = []  # groups of worker 0 that were taken out, as of all
        self.reference = Reference([], [], world_size, [], lambda index, step: torch.empty(0))
        first, second = [self.new_slot() for _ in range(3)], [self.new_slot() for _ in range(2)]
        self.make_optimizers([[slot.number for slot in own] for own in (first, second)])
        self.begin_scheduling()

    def make_optimizers(self, groups: Sequence[Sequence[int]]) -> None:
        """Of all workers, with groups of these slots."""
        self.optimizers = [
            PowerSGDOptimizer(
                [{"params": [self.slots[n].parameters[w] for n in own]} for own in groups],
                momentum_form="sgd", seed=SEED, **SETTINGS,
            )
            for w in range(self.world_size)
        ]  # fmt: skip
        # Whose errors each worker has: the number of workers, and which one.
        self.origins = [(0, 0)] * self.world_size

    # ---- what stands where ----------------------------------------------------------------------

    def new_slot(self) -> Slot:
        self.slots.append(Slot.make(len(self.slots), self.world_size))
        self.slots[-1].add_to(self.reference)
        return self.slots[-1]

    def slot_of(self, parameter: Tensor) -> Slot:
        return next(s for s in self.slots if any(p is parameter for p in s.parameters))

    def present(self) -> list[Slot]:
        """Those in the groups, in order."""
        return [self.slot_of(p) for p in parameters_of(self.optimizers[0])]

    def trained(self) -> list[Slot]:
        """Those of them which steps work on."""
        return [slot for slot in self.present() if slot.parameters[0].requires_grad]

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

    def give_gradients(self, joined: Collection[int] = ()) -> list[list[Tensor | None]]:
        """New gradients for every parameter, but none of workers that have joined."""
        self.seed += 1
        present = {slot.number for slot in self.present()}
        for slot in self.slots:
            slot.is_sparse = slot.is_sparse and slot.number in present  # else it is forgotten
        return give_gradients(self.slots, self.seed, joined)

    def step(
        self,
        mode: Callable[[], Any] = contextlib.nullcontext,
        drive: Callable[[Sequence[PowerSGDOptimizer]], object] = step_together,
        joined: Collection[int] = (),
    ) -> None:
        """A step that must succeed, and be the reference's; `drive` takes it.

        Workers that have joined take part without gradients, and the mean is over the others.
        """
        weight = self.world_size / (self.world_size - len(joined))
        gradients = self.give_gradients(joined)
        trained = {slot.number for slot in self.trained()}
        for own in gradients:
            for slot in self.slots:
                if slot.number not in trained:
                    own[slot.number] = None
        self.settle()
        kept = zip(self.slots, self.reference.queries, strict=True)
        queries = [query if slot.is_known else None for slot, query in kept]
        self.fit_reference({slot.number for slot in self.slots if slot.is_sparse})
        errors = copy.deepcopy(self.reference.errors)
        for optimizer in self.optimizers:
            optimizer.weight = weight
        with mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The errors that were loaded")
            drive(self.optimizers)
        self.follow_compression(gradients, queries)
        taken = [[None if g is None else g.to_dense() * weight for g in own] for own in gradients]
        self.reference.step(taken)
        if self.reference.step_number != self.optimizers[0].engine.notes.step:
            raise AssertionError("no step was taken")
        self.origins = [(self.world_size, worker) for worker in range(self.world_size)]
        if self.windows is not None:
            self.add_to_windows(gradients, taken, errors)
        self.check()

    def settle(self) -> None:
        """What every step begins with: errors of another worker are left out."""
        for worker, origin in enumerate(self.origins):
            if origin[0] > 1 and origin != (self.world_size, worker):
                errors = self.reference.errors[worker]
                errors[:] = [torch.zeros_like(error) for error in errors]

    def settle_all(self) -> None:
        """The same in the optimizers, ahead of the step: they do not warn in it."""
        self.settle()
        self.in_all(lambda optimizer, worker: optimizer.settle_errors(self.world_size, worker))

    def fit_reference(self, uncompressed: Collection[int] = ()) -> None:
        """Gives the reference the settings of the groups, and queries that fit them."""
        for info in list_parameters(self.optimizers[0].settled_groups):
            slot, settings = self.slot_of(info.parameter), info.settings
            number, hyper = slot.number, self.reference.hyperparameters[slot.number]
            for name in SETTINGS:
                setattr(hyper, name, settings[name])
            if number in uncompressed:
                hyper.min_compression_rate = torch.inf
            trained = info.parameter.requires_grad
            if not slot.is_known and trained:
                slot.forget(self.reference)
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

    def compressed(self) -> set[int]:
        """The numbers of those that the last step has compressed."""
        plan = self.optimizers[0].engine.plan
        infos = {info.index: info for info in plan.infos}
        found = [infos[index] for bucket in plan.buckets for index in bucket.compressed]
        return {self.slot_of(info.parameter).number for info in found}

    def follow_compression(
        self, gradients: list[list[Tensor | None]], queries: list[Tensor | None]
    ) -> None:
        """What is known to be sparse is not compressed, and what is new may or may not be."""
        compressed = self.compressed()
        for slot in self.trained():
            number = slot.number
            is_compressed, is_expected = (
                number in compressed,
                self.reference.is_compressible(number),
            )
            assert is_compressed == is_expected or slot.may_be_sparse, slot
            assert is_expected or not is_compressed, slot
            if is_expected and not is_compressed:
                self.reference.hyperparameters[number].min_compression_rate = torch.inf
                self.reference.queries[number] = queries[number]
            given = [own[number] for own in gradients if own[number] is not None]
            slot.is_sparse |= any(gradient.is_sparse for gradient in given)

    def add_to_windows(
        self,
        gradients: list[list[Tensor | None]],
        taken: list[list[Tensor | None]],
        errors: list[list[Tensor]],
    ) -> None:
        """What policies sum up of a step, which they have seen as it was before it was applied."""
        assert self.windows is not None
        compressed = self.compressed()
        for number, shape in enumerate(self.reference.shapes):
            if all(own[number] is None for own in gradients):
                continue
            zeros = torch.zeros(shape, dtype=torch.float64)
            for worker, own in enumerate(gradients):
                gradient, value = own[number], taken[worker][number]
                is_seen = value is not None and not gradient.is_sparse
                error = errors[worker][number] if number in compressed else zeros
                self.windows.add(worker, number, value if is_seen else zeros, error)
        self.windows.check(lambda parameter: self.slot_of(parameter).number)

    def refuse(self, error: type[Exception], words: str, act: Callable[[], object]) -> None:
        """A call that must fail on all workers with this error, and change nothing."""
        self.settle_all()
        before = self.bits()
        try:
            act()
        except error as caught:
            assert words in str(caught), caught
        else:
            raise AssertionError(f"no {error.__name__}")
        assert self.bits() == before

    def bits(self) -> Any:
        """Of all that a step may change."""
        return bits([(parameters_of(o), o.state_dict()) for o in self.optimizers])

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
        self.windows: Windows | None = None
        if self.policy is not None:
            try:
                self.windows = Windows(self.policy, self.optimizers)
            except ValueError as error:
                assert "nothing to decide on" in str(error), error
