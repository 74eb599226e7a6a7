"""Anything that programs do, in any order: workers stay equal, and are what the reference is."""

import os
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from efsgd import NonFiniteGradientError, WorkerMismatchError
from efsgd.errors import CollectiveError
from efsgd.testing import step_together
from tests.field.machine import MODES, Workers

small = st.integers(0, 3)


class FieldMachine(RuleBasedStateMachine):
    """See `tests.field.machine.Workers`."""

    workers: Workers

    @initialize(world_size=st.integers(1, 4), adaptive=st.booleans())
    def begin(self, world_size: int, adaptive: bool) -> None:
        self.workers = Workers(world_size, adaptive=adaptive)

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
        trained = [slot for slot in workers.present() if slot.parameters[0].requires_grad]
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

    @rule(place=small)
    def an_overflow_is_skipped(self, place: int) -> None:
        workers = self.workers
        workers.give_gradients()
        for number, optimizer in enumerate(workers.optimizers):
            optimizer.grad_scale = torch.tensor(4.0)
            optimizer.found_inf = torch.tensor(float(number == place % workers.world_size))
        trained = any(slot.parameters[0].requires_grad for slot in workers.present())
        before = workers.reference.step_number
        try:
            if trained:
                step_together(workers.optimizers)
                workers.check()
                assert workers.optimizers[0].engine.notes.step == before
        finally:
            for optimizer in workers.optimizers:
                del optimizer.grad_scale, optimizer.found_inf

    # ---- settings -------------------------------------------------------------------------------

    @rule(name=st.sampled_from(["lr", "momentum", "weight_decay", "rank"]), choice=small)
    def a_setting_changes(self, name: str, choice: int) -> None:
        values = {"rank": [1, 2, 3, 4], "momentum": [0.5, 0.9, 0.3, 0.7]}
        value = values.get(name, [0.1, 0.05, 0.01, 0.0])[choice]

        def change(optimizer: Any, _: int) -> None:
            if optimizer.param_groups:
                optimizer.param_groups[choice % len(optimizer.param_groups)][name] = value

        self.workers.in_all(change)

    @precondition(lambda self: self.workers.world_size > 1)
    @rule(name=st.sampled_from(["lr", "momentum", "weight_decay", "rank", "nesterov"]), place=small)
    def a_setting_changes_on_one_worker(self, name: str, place: int) -> None:
        workers = self.workers
        optimizer = workers.optimizers[place % workers.world_size]
        if not any(s.parameters[0].requires_grad for s in workers.present()):
            return
        group = next(group for group in optimizer.param_groups if group["params"])
        before = group[name]
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
        trained = [slot for slot in workers.present() if slot.parameters[0].requires_grad]
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

    @rule()
    def a_policy_decides(self) -> None:
        self.workers.decide()

    @rule()
    def every_worker_resumes(self) -> None:
        workers = self.workers
        if workers.present():
            workers.resume(workers.world_size, [o.state_dict() for o in workers.optimizers])

    @rule(world_size=st.integers(1, 4))
    def another_number_of_workers_resumes(self, world_size: int) -> None:
        workers = self.workers
        if workers.present():
            workers.resume(world_size, [workers.consolidated()] * world_size)


TestField = FieldMachine.TestCase
TestField.settings = settings(
    settings.get_profile("ci"),
    max_examples=int(os.environ.get("FIELD_RUNS", "200")),
    stateful_step_count=int(os.environ.get("FIELD_RULES", "20")),
    phases=[Phase.generate, *([Phase.shrink] if "FIELD_RUNS" in os.environ else [])],
    suppress_health_check=list(HealthCheck),
)
