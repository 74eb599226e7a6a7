"""Anything that programs do, in any order: workers stay equal, and are what the reference is."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from efsgd import NonFiniteGradientError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.engine.consistency import compare_all
from efsgd.errors import CollectiveError
from efsgd.testing import lockstep, step_together
from tests.field import checkpoints
from tests.field.machine import Workers
from tests.field.modes import MODES, step_scaled
from tests.field.windows import POLICIES
from tests.simulation import bits

small = st.integers(0, 3)
VALUES: dict[str, list[Any]] = {
    "lr": [0.1, 0.05, 0.01, 0.0],
    "momentum": [0.5, 0.9, 0.3, 0.0],
    "dampening": [0.0, 0.3, 0.0, 0.3],
    "weight_decay": [0.1, 0.05, 0.01, 0.0],
    "maximize": [False, True, False, True],
    "rank": [1, 2, 3, 4],
    "min_compression_rate": [1.0, 2.0, 0.0, math.inf],
}


class FieldMachine(RuleBasedStateMachine):
    """See `tests.field.machine.Workers`."""

    workers: Workers

    @initialize(world_size=st.integers(1, 4), policy=st.sampled_from([None, *POLICIES]))
    def begin(self, world_size: int, policy: str | None) -> None:
        self.workers = Workers(world_size, policy=policy)

    # ---- steps ----------------------------------------------------------------------------------

    @rule()
    def step(self) -> None:
        self.workers.step()

    @rule(mode=st.sampled_from(MODES))
    def step_in_a_mode(self, mode: Any) -> None:
        self.workers.step(mode)

    @rule(place=small)
    def a_gradient_is_not_finite(self, place: int) -> None:
        workers = self.workers
        workers.give_gradients()
        trained = workers.trained()
        if not trained:
            return
        slot = trained[place % len(trained)]
        worker = place % workers.world_size
        slot.parameters[worker].grad = torch.full_like(slot.parameters[worker], torch.nan)
        workers.refuse(
            NonFiniteGradientError, "NaN or infinite", lambda: step_together(workers.optimizers)
        )

    @rule(place=small)
    def a_collective_fails(self, place: int) -> None:
        workers = self.workers
        workers.give_gradients()
        before = workers.reference.step_number
        if workers.world_size > 1 and workers.optimizers[0].settled_groups and before:
            count = workers.optimizers[0].communication_stats()["collectives"]
            if count > place:
                workers.refuse(
                    CollectiveError,
                    "injected failure",
                    lambda: step_together(workers.optimizers, fail_at=place),
                )

    @rule(place=small, unscales=st.booleans())
    def a_loss_is_scaled(self, place: int, unscales: bool) -> None:
        """By four, which is exact; every other place overflows on one worker."""
        workers = self.workers
        overflows = place % 2 == 1

        def drive(optimizers: Sequence[PowerSGDOptimizer]) -> None:
            step_scaled(optimizers, place if overflows else None, unscales=unscales)

        if overflows and workers.trained():
            before = workers.optimizers[0].engine.notes.step
            workers.give_gradients()
            workers.settle_all()
            drive(workers.optimizers)
            workers.check()
            assert workers.optimizers[0].engine.notes.step == before
        else:
            workers.step(drive=drive)

    @precondition(lambda self: self.workers.world_size > 1)
    @rule(place=small)
    def some_workers_have_joined(self, place: int) -> None:
        workers = self.workers
        workers.step(joined=range(place % (workers.world_size - 1) + 1))
        lockstep([compare_all(o.settled_groups, o.state, o.method) for o in workers.optimizers])

    # ---- settings -------------------------------------------------------------------------------

    @rule(name=st.sampled_from(list(VALUES)), choice=small)
    def a_setting_changes(self, name: str, choice: int) -> None:
        value = VALUES[name][choice]

        def change(optimizer: Any, _: int) -> None:
            if optimizer.param_groups:
                optimizer.param_groups[choice % len(optimizer.param_groups)][name] = value

        self.workers.in_all(change)

    @rule(bucket_bytes=st.sampled_from([None, 1, 200]))
    def buckets_have_another_size(self, bucket_bytes: int | None) -> None:
        def change(optimizer: Any, _: int) -> None:
            for group in optimizer.param_groups:
                group["bucket_bytes"] = bucket_bytes

        self.workers.in_all(change)

    @precondition(lambda self: self.workers.world_size > 1)
    @rule(name=st.sampled_from(["lr", "momentum", "weight_decay", "rank", "nesterov"]), place=small)
    def a_setting_changes_on_one_worker(self, name: str, place: int) -> None:
        workers = self.workers
        optimizer = workers.optimizers[place % workers.world_size]
        if not workers.trained():
            return
        group = next(group for group in optimizer.param_groups if group["params"])
        before = group[name]
        if name == "nesterov" and (group["dampening"] or not group["momentum"]):
            return  # with which it is an error by itself
        group[name] = True if name == "nesterov" else before + 1
        workers.give_gradients()
        workers.refuse(WorkerMismatchError, name, lambda: step_together(workers.optimizers))
        group[name] = before

    @rule(place=small, rank=st.integers(1, 3))
    def one_parameter_has_a_rank(self, place: int, rank: int) -> None:
        def change(optimizer: Any, _: int) -> None:
            groups = [group for group in optimizer.settled_groups if group["params"]]
            if groups:
                group = groups[place % len(groups)]
                own = list((group["per_parameter"] or {}).get("rank", [None] * 9))
                own[place % len(group["params"])] = rank
                group["per_parameter"] = {"rank": tuple(own[: len(group["params"])])}
                optimizer.state_dict()  # what was set is known before parameters change

        self.workers.in_all(change)

    @rule(place=small)
    def a_parameter_is_frozen_or_thawed(self, place: int) -> None:
        present = self.workers.present()
        if present:
            for parameter in present[place % len(present)].parameters:
                parameter.requires_grad_(not parameter.requires_grad)

    @precondition(lambda self: self.workers.world_size > 1)
    @rule(place=small)
    def a_parameter_is_frozen_on_one_worker(self, place: int) -> None:
        workers = self.workers
        trained = workers.trained()
        if trained:
            parameter = trained[place % len(trained)].parameters[place % workers.world_size]
            workers.give_gradients()
            parameter.requires_grad_(False)
            workers.refuse(WorkerMismatchError, "frozen", lambda: step_together(workers.optimizers))
            parameter.requires_grad_(True)

    # ---- parameters and groups ------------------------------------------------------------------

    @rule(by=st.sampled_from(["group", "append", "insert"]), place=small)
    def a_parameter_is_new(self, by: str, place: int) -> None:
        workers = self.workers
        if len(workers.slots) < 9:
            workers.put(workers.new_slot(), by, place)

    @rule(place=small)
    def a_parameter_is_taken_out(self, place: int) -> None:
        def take(optimizer: Any, _: int) -> None:
            groups = [group for group in optimizer.param_groups if group["params"]]
            if groups:
                group = groups[place % len(groups)]
                del group["params"][place % len(group["params"])]

        self.workers.in_all(take)

    @rule(by=st.sampled_from(["group", "append", "insert"]), place=small)
    def a_parameter_is_put_back(self, by: str, place: int) -> None:
        workers = self.workers
        absent = workers.absent()
        if absent:
            workers.put(absent[place % len(absent)], by, place)

    @rule(place=small)
    def a_group_is_taken_out(self, place: int) -> None:
        groups = self.workers.optimizers[0].param_groups
        if groups:
            place %= len(groups)
            taken = self.workers.in_all(lambda o, _: o.param_groups.pop(place))
            self.workers.out.append({"params": taken[0]["params"], "groups": taken})

    @rule(place=small)
    def a_group_is_put_back(self, place: int) -> None:
        out = self.workers.out
        if out:
            groups = out.pop(place % len(out))["groups"]
            self.workers.in_all(lambda o, w: o.param_groups.insert(place, groups[w]))

    @rule(place=small)
    def everything_is_reordered(self, place: int) -> None:
        def turn(optimizer: Any, _: int) -> None:
            optimizer.param_groups.reverse()
            for group in optimizer.param_groups:
                group["params"][:] = group["params"][place:] + group["params"][:place]

        self.workers.in_all(turn)

    # ---- policies and checkpoints ---------------------------------------------------------------

    @rule(fail_at=st.none() | st.integers(0, 5))
    def a_policy_decides(self, fail_at: int | None) -> None:
        """Nothing changes where one of its collectives fails."""
        workers, windows = self.workers, self.workers.windows
        if windows is not None:
            before = None if fail_at is None else [workers.bits(), bits(windows.saved())]
            try:
                windows.decide(workers.reference.step_number, fail_at)
            except CollectiveError:
                assert [workers.bits(), bits(windows.saved())] == before

    @rule(place=small, with_windows=st.booleans())
    def every_worker_resumes(self, place: int, with_windows: bool) -> None:
        """From its own, or from another one's."""
        if self.workers.present():
            checkpoints.resume(self.workers, place * (place > 1), with_windows=with_windows)

    @rule(world_size=st.integers(1, 4), with_windows=st.booleans())
    def another_number_of_workers_resumes(self, world_size: int, with_windows: bool) -> None:
        if self.workers.present():
            checkpoints.resume_with(self.workers, world_size, with_windows=with_windows)


# Each of 20 rules comes next to each other one about six times; "make test-long" does far more.
TestField = FieldMachine.TestCase
TestField.settings = settings(
    settings.get_profile("ci"),
    max_examples=int(os.environ.get("FIELD_RUNS", "200")),
    stateful_step_count=int(os.environ.get("FIELD_RULES", "20")),
    phases=[Phase.generate, *([Phase.shrink] if "FIELD_RUNS" in os.environ else [])],
    suppress_health_check=list(HealthCheck),
)
