"""One step over all tensors of an optimizer, as one exchange.

The workers come to terms about what they train, run Algorithm 2 on each bucket of it, and apply
the step only once every bucket of every worker is known to be good.
"""

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from efsgd.algorithms.error_feedback import Outcome, exchange_gradients
from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.consistency import compare_all, describe
from efsgd.engine.handshake import Handshake
from efsgd.engine.observation import Watcher, observe
from efsgd.engine.parameters import list_parameters
from efsgd.engine.plan import Groups, Plan
from efsgd.engine.state import State, drop_foreign_errors_, show_errors_
from efsgd.engine.update import Rules, apply_updates_, squared_norm
from efsgd.errors import NonFiniteGradientError, warn_user
from efsgd.profiling import Phases
from efsgd.wire.collectives import Exchange, intercept
from efsgd.wire.compare import broadcast_values, compare
from efsgd.wire.control_words import Verdict, describe_rejection, raise_unable
from efsgd.wire.replay import Schedule
from efsgd.wire.traffic import TrafficCounter


@dataclass(frozen=True)
class LossScaling:
    """What torch.amp.GradScaler tells an optimizer about the gradients of a step.

    Attributes:
        factor: the gradients are multiplied by this to be those of the loss.
        has_overflowed: one of this worker's is not finite. A step for which this is so anywhere
            is skipped by all workers, whatever `nonfinite` says: it is the scaler's daily business.
    """

    factor: float
    has_overflowed: bool = False

    @classmethod
    def of(cls, optimizer: object) -> Self | None:
        """What the scaler has left on `optimizer` for the step that it asks for, if it does."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return None
        scale = getattr(optimizer, "grad_scale", None)  # None: unscaled already
        return cls(1.0 if scale is None else 1.0 / float(scale), bool(found_inf))


class Step:
    """Steps an optimizer, and keeps what is derived from its groups between steps.

    Attributes:
        traffic: what was handed to collectives.
        phases: of a step, and how long they take.
        plan: the buckets of the present parameter groups.
        watchers: are shown each step that is applied, of each bucket.

    Args:
        compressor: decides what is compressed and how far.
        settings: names of the group entries that workers must agree on.
        validate: checks parameter groups, which users and schedulers change between steps.
        rules: how parameter groups are updated; see `efsgd.engine.update`.
    """

    def __init__(
        self,
        compressor: Compressor,
        settings: Iterable[str],
        validate: Callable[[Groups], None],
        rules: Callable[[Groups], Rules],
    ) -> None:
        self.traffic, self.phases = TrafficCounter(), Phases()
        self._compressor, self._settings = compressor, tuple(settings)
        self.plan = Plan(compressor, self.phases)
        self._handshake = Handshake(compressor, self._settings, validate, rules)
        self.watchers: list[Watcher] = []
        self._has_loaded = False

    def on_new_group(self) -> None:
        """What follows is with other workers: nothing is agreed on with them."""
        self.plan.reset()
        self.plan.sparse.clear()
        self._handshake.reset()

    def plan_change(self) -> None:
        """All workers change the same settings before the next step, and know it."""
        self._handshake.plan_change()

    def reload(self) -> None:
        """Groups and state have been loaded: plans are made, and values compared, anew."""
        self.plan.reset()
        self._handshake.invalidate()
        self._has_loaded = True

    def settle_errors(
        self, groups: Groups, state: MutableMapping[Tensor, State], world_size: int, worker: int
    ) -> str | None:
        """Once after loading: errors of another worker are left out.

        Args:
            groups: parameter groups.
            state: of the parameters (modified in place).
            world_size: the number of workers.
            worker: this worker's place among them, from 0.

        Returns:
            What to warn of, once no other worker is waiting.
        """
        if not self._has_loaded:
            return None
        self._has_loaded = False
        return drop_foreign_errors_(groups, state, world_size, worker)

    @torch.no_grad()
    def exchange(
        self,
        groups: Groups,
        state: MutableMapping[Tensor, State],
        world_size: int,
        worker: int,
        scaling: LossScaling | None = None,
        weight: float = 1.0,
    ) -> Exchange[bool]:
        """One step.

        Args:
            groups: parameter groups (parameters, and the count of steps, modified in place).
            state: of the parameters (modified in place).
            world_size: the number of workers.
            worker: this worker's place among them, from 0.
            scaling: of the gradients, in mixed precision.
            weight: this worker's gradients are multiplied by it.

        Returns:
            Whether it was applied; if not, it was skipped by all workers.

        Raises:
            NonFiniteGradientError: a worker's gradient is not finite, and the policy is "raise".
            WorkerMismatchError: the workers do not train the same thing.
            CollectiveError: another worker could not take part.
        """
        note = self.settle_errors(groups, state, world_size, worker)
        try:
            exchange = self._exchange(groups, state, (world_size, worker), scaling, weight)
            return (yield from intercept(exchange, outgoing=self.traffic.record))
        finally:
            self.plan.undo_changes_()
            if note is not None:  # as an error, a warning must not keep the others waiting
                warn_user(note)

    def _exchange(
        self,
        groups: Groups,
        state: MutableMapping[Tensor, State],
        context: tuple[int, int],
        scaling: LossScaling | None,
        weight: float,
    ) -> Exchange[bool]:
        self.traffic.begin_check()
        rules = yield from self._handshake.agree(self.plan, groups, state, context)
        step = groups[0]["step"]
        parameters = [m.parameter for m in self.plan.infos if m.parameter.requires_grad]
        self.traffic.begin_step(sum(p.numel() * p.element_size() for p in parameters))
        self.phases.begin_step()
        outcomes = yield from self._exchange_gradients(step, scaling, weight)
        self.plan.note_sparse(outcome.verdict for outcome in outcomes)
        verdicts = _verdicts(outcomes)
        if changed := sorted({worker for verdict in verdicts for worker in verdict.changed}):
            self.traffic.begin_check()
            yield from self._handshake.raise_mismatch(self.plan, groups, changed, step)
        if not all(verdict.is_good for verdict in verdicts):
            is_scaled = any(verdict.is_scaled for verdict in verdicts)
            if groups[0]["nonfinite"] == "raise" and not is_scaled:
                names = {info.index: info.name for info in self.plan.infos}
                raise NonFiniteGradientError(describe_rejection(verdicts, names, step))
            self.traffic.skip_step()
            return False
        trouble = self._show(outcomes, (scaling.factor if scaling else 1.0) * weight)
        self._apply(outcomes, rules, groups[0]["max_grad_norm"])
        for group in groups:
            group.update(step=step + 1, world_size=context[0], worker=context[1])
        self._handshake.expected = step + 1
        self.traffic.end_step()
        if trouble is not None:
            raise trouble
        return True

    @torch.no_grad()
    def broadcast(self, groups: Groups, source: int) -> Exchange[None]:
        """Gives all workers the parameters of one, once it is known that they have the same list.

        Args:
            groups: parameter groups (parameters modified in place).
            source: the worker whose parameters are taken.

        Raises:
            WorkerMismatchError: the workers do not have the same parameters.
        """
        listed = list(list_parameters(groups))
        lines = describe(listed, self._compressor, self._settings)
        yield from compare(lines, listed[0].parameter.device)
        yield from broadcast_values([info.parameter for info in listed], source)

    @torch.no_grad()
    def compare_all(self, groups: Groups, state: MutableMapping[Tensor, State]) -> Exchange[None]:
        """Compares all that workers must have in common. See `efsgd.engine.consistency`."""
        yield from compare_all(groups, state, self._compressor, self._settings)

    def _exchange_gradients(
        self, step: int, scaling: LossScaling | None, weight: float
    ) -> Exchange[list[Outcome]]:
        """Algorithm 2, lines 7 to 10, for each bucket."""
        own = LossScaling(1.0) if scaling is None else scaling
        outcomes: list[Outcome] = []
        schedules = []
        for bucket in self.plan.buckets:
            schedule = Schedule(bucket.device)
            exchange = exchange_gradients(
                bucket,
                step,
                own.factor * weight,
                has_overflowed=own.has_overflowed,
                is_scaled=scaling is not None,
            )
            if not self._handshake.is_scheduled(self.plan, step):
                exchange = intercept(exchange, lambda _: None, asking=schedule.note)
            number = len(outcomes)
            outcomes.append(
                (
                    yield from self._handshake.send_zeros_on_failure(
                        number, exchange, self.plan, step
                    )
                )
            )
            schedule.end()
            schedules.append((bucket.control, schedule))
        if not self._handshake.is_scheduled(self.plan, step):
            self._handshake.schedule(self.plan, step, schedules)
        return outcomes

    def _show(self, outcomes: Sequence[Outcome], scale: float) -> Exception | None:
        """Shows the step to those who watch.

        Returns:
            What one of them has raised. The other workers apply the step, so this one does, too.
        """
        try:
            for bucket, outcome in zip(self.plan.buckets, outcomes, strict=True):
                for watcher in self.watchers:
                    watcher(observe(bucket, outcome.verdict.absent, scale))
        except Exception as trouble:
            return trouble
        return None

    def _apply(
        self, outcomes: Sequence[Outcome], rules: Rules, max_grad_norm: float | None
    ) -> None:
        plan, changes = self.plan, {}
        plan.keep_changes()
        found = []
        for bucket, outcome in zip(plan.buckets, outcomes, strict=True):
            assert outcome.mean is not None  # there was no obstacle
            found.append((bucket, outcome.mean, outcome.verdict.absent))
            bucket.commit_(outcome.verdict.absent)
            show_errors_(bucket, plan.states)
        if max_grad_norm is not None:
            self.traffic.grad_norm = norm = math.sqrt(sum(squared_norm(*each) for each in found))
            changes["clip"] = min(1.0, max_grad_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
        for bucket, mean, absent in found:
            present = bucket.parameters.keys() - absent
            own = [info for info in plan.infos if info.index in present]
            with self.phases("Alg. 2, lines 11 to 13: update"):
                apply_updates_(bucket, mean, own, plan.states, rules, **changes)


def _verdicts(outcomes: Iterable[Outcome]) -> list[Verdict]:
    """What all workers know. Raises what keeps any of them from taking part."""
    verdicts: list[Verdict] = []
    for outcome in outcomes:
        if outcome.obstacle is not None:
            raise outcome.obstacle
        verdicts.append(outcome.verdict)
    raise_unable(verdicts)
    return verdicts
