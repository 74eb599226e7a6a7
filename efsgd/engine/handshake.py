"""How workers come to terms before a step: what is new, on whom, and is it the same everywhere?

A worker cannot know by itself whether the others have news as well. So one that has, or has met an
error, takes part in the step that the others may be about to take, with zeros, and says so in its
control word; unless it knows that all of them begin with a comparison.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Never

import torch
from torch import Tensor

from efsgd.algorithms.error_feedback import Outcome
from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.consistency import describe, replicated
from efsgd.engine.parameters import list_parameters
from efsgd.engine.plan import Groups, Plan, Signature
from efsgd.engine.state import State, validate_states
from efsgd.engine.update import Rules
from efsgd.errors import CollectiveError, WorkerMismatchError
from efsgd.wire.collectives import Collective, Exchange, intercept
from efsgd.wire.compare import GradientSummary, checksums, compare, compare_gradients
from efsgd.wire.control_words import ControlWords, describe_change, raise_unable
from efsgd.wire.replay import Schedule


@dataclass(frozen=True)
class Agreement:
    """What all workers are known to have in common.

    Attributes:
        signature: of the plans; its `settings` are this worker's own identities.
        numerics: of the plans' buckets.
        start: the step at which compression starts.
        every: the number of steps between two checks; 0 where there are none.
        step_kind: of a step; see `efsgd.compressors.Compressor`.
    """

    signature: Signature
    numerics: tuple[str, ...]
    start: int
    every: int
    step_kind: Callable[[int], Hashable]


class Handshake:
    """What the workers have agreed on, kept between steps.

    Attributes:
        expected: the number of the step that the others are about to take, as far as is known.

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
        self._compressor, self._settings = compressor, tuple(settings)
        self._validate, self._rules = validate, rules
        self._agreed: Agreement | None = None
        self._compared: Hashable = None
        self.expected: int | None = None
        self._is_planned = False
        # Of each kind of step that was seen: the collectives of a step, by bucket.
        self._schedules: dict[Hashable, list[tuple[ControlWords, Schedule]]] = {}
        self._scheduled: Signature | None = None

    def reset(self) -> None:
        """The workers are others: nothing is agreed on with them."""
        self._agreed = self._compared = self._scheduled = self.expected = None
        self._schedules, self._is_planned = {}, False

    def plan_change(self) -> None:
        """All workers change their settings before the next step, and know it of each other."""
        self._is_planned = True

    def invalidate(self) -> None:
        """Groups and state may have become others, on this worker at least."""
        if self._agreed is not None:
            signature = dataclasses.replace(self._agreed.signature, settings=None)
            self._agreed = dataclasses.replace(self._agreed, signature=signature)

    def is_scheduled(self, plan: Plan, step: int) -> bool:
        """Whether the collectives of this step of this plan are known."""
        if plan.context[0] == 1:  # nobody will ever ask
            return True
        is_same = self._scheduled is not None and self._scheduled == plan.signature
        return is_same and self._scheduled_for(step) is not None

    def schedule(
        self, plan: Plan, step: int, schedules: list[tuple[ControlWords, Schedule]]
    ) -> None:
        """Remembers the collectives of a step.

        Args:
            plan: of the step.
            step: its number.
            schedules: of its buckets, with the control words that go with each.
        """
        if self._agreed is not None:
            self._schedules[self._agreed.step_kind(step)] = schedules
            self._scheduled = plan.signature

    def _scheduled_for(self, step: int) -> list[tuple[ControlWords, Schedule]] | None:
        """What all workers ask for in this step, unless some have changed."""
        return None if self._agreed is None else self._schedules.get(self._agreed.step_kind(step))

    def agree(
        self,
        plan: Plan,
        groups: Groups,
        state: MutableMapping[Tensor, State],
        context: tuple[int, int],
    ) -> Exchange[Rules]:
        """Makes a step's plan and, where there is news, compares it with the others'.

        Args:
            plan: of this worker (modified in place).
            groups: parameter groups.
            state: of the parameters (modified in place).
            context: the number of workers, and this worker.

        Returns:
            How the groups are to be updated.

        Raises:
            WorkerMismatchError: the workers do not train the same thing, or not all have changed.
            CollectiveError: some worker could not take part.
        """
        if context != plan.context:
            self.reset()
        if context[0] == 1:
            self._validate(groups)
            rules = self._rules(groups)
            plan.sparse |= {p for group in groups for p in group["params"] if _is_sparse(p.grad)}
            plan.update(groups, state, context, rules)
            return rules
        # Whether all workers begin with a comparison, and whether this one has news for it.
        step = groups[0].get("step", 0) if self.expected is None else self.expected
        is_new = True
        compares = self._is_time(step, plan)
        device = next(p.device for group in groups for p in group["params"])
        try:
            self._validate(groups)
            rules = self._rules(groups)
            is_new = self._is_new(plan.sign(groups, state))
            if is_new or compares:
                validate_states(list_parameters(groups), state)
            if is_new and not compares:
                yield from self._announce_change(plan, groups, step)
                compares = True
        except (CollectiveError, WorkerMismatchError):
            raise  # all workers know
        except Exception as obstacle:
            yield from self._report_failure(plan, obstacle, device, step, compares=compares)
            raise
        if compares:
            is_new = yield from self._compare(plan, groups, state, context, is_new)
            self._is_planned = False
        try:
            plan.update(groups, state, context, rules)
        except Exception as obstacle:
            yield from self._report_failure(plan, obstacle, device, step, compares=is_new)
            raise
        if self._agreed is not None and plan.numerics != self._agreed.numerics and not is_new:
            yield from self._announce_change(plan, groups, step)
            is_new = True
        if is_new:
            yield from compare(list(plan.describe_numerics()), device)
            numbers = groups[0]["start_compressing_at"], groups[0]["check_every"]
            step_kind = functools.partial(self._compressor.step_kind, settings=dict(groups[0]))
            self._agreed = Agreement(plan.sign(groups, state), plan.numerics, *numbers, step_kind)
            self._schedules = {}  # they were those of another plan
            self.expected = groups[0]["step"]
        return rules

    def _is_new(self, present: Signature) -> bool:
        return self._agreed is None or present != self._agreed.signature

    def _is_time(self, step: int, plan: Plan) -> bool:
        """Whether all workers are known to begin with a comparison."""
        agreed = self._agreed
        if agreed is None or self._is_planned or self._scheduled_for(step) is None:
            return True
        is_due = agreed.every > 0 and step > 0 and step % agreed.every == 0
        return is_due or plan.phase(step, agreed.start) != agreed.signature.phase

    def send_zeros_on_failure(
        self, number: int, exchange: Exchange[Outcome], plan: Plan, step: int
    ) -> Exchange[Outcome]:
        """Passes on an exchange; if it raises before it has sent anything, zeros are sent instead.

        After that, the next step is an error on all workers.

        Args:
            number: of the bucket whose exchange it is.
            exchange: lines 7 to 10 of Algorithm 2.
            plan: of the step.
            step: its number.

        Returns:
            The result of `exchange`; or one with its error, which all workers know of.
        """
        sent: list[Collective] = []
        try:
            return (yield from intercept(exchange, sent.append))
        except CollectiveError:
            raise
        except Exception as obstacle:
            schedules = self._scheduled_for(step)
            if sent:  # the others cannot know, and apply the step
                self.expected = step + 1
                self.invalidate()
            if sent or schedules is None or not self.is_scheduled(plan, step):
                raise
            control, schedule = schedules[number]
            verdict = yield from control.announce(schedule, is_unable=True)
            return Outcome(None, verdict, obstacle)

    def raise_mismatch(
        self, plan: Plan, groups: Groups, workers: Sequence[int], step: int
    ) -> Exchange[Never]:
        """Raises on all workers, as they all know that some have changed and some have not.

        Args:
            plan: of this worker.
            groups: parameter groups.
            workers: those that have changed.
            step: the number of the step, from 0.

        Raises:
            WorkerMismatchError: says who has changed, and the first difference.
        """
        text, listed = describe_change(workers, step), list(list_parameters(groups, plan.sparse))
        lines = describe(listed, self._compressor, self._settings)
        try:
            yield from compare(lines, listed[0].parameter.device)
        except WorkerMismatchError as difference:
            text = f"{text} {difference}"
        raise WorkerMismatchError(text)

    def _announce_change(self, plan: Plan, groups: Groups, step: int) -> Exchange[None]:
        """Tells the others, in a step that they may think an ordinary one.

        They see it in their control words and all raise, unless everyone announces a change.
        """
        verdicts, everyone = [], True
        for control, schedule in self._scheduled_for(step) or ():
            verdict = yield from control.announce(schedule)
            everyone = everyone and len(verdict.changed) == control.world_size
            verdicts.append(verdict)
        plan.note_sparse(verdicts)
        raise_unable(verdicts)
        if not everyone:
            yield from self.raise_mismatch(plan, groups, verdicts[0].changed, step)

    def _report_failure(
        self, plan: Plan, obstacle: Exception, device: torch.device, step: int, *, compares: bool
    ) -> Exchange[None]:
        """Tells the others, who are about to take a step, that this worker cannot."""
        if not compares:
            for control, schedule in self._scheduled_for(step) or ():
                plan.note_sparse([(yield from control.announce(schedule, is_unable=True))])
            return
        reason = " ".join(f"{type(obstacle).__name__}: {obstacle}".split())
        with contextlib.suppress(WorkerMismatchError):
            yield from compare([f"cannot take part: {reason}"], device)

    def _compare(
        self,
        plan: Plan,
        groups: Groups,
        state: Mapping[Tensor, State],
        context: tuple[int, int],
        is_new: bool,
    ) -> Exchange[bool]:
        """Compares settings and values. Has anyone news?"""
        listed = list(list_parameters(groups, plan.sparse))
        parameters: Hashable = context, tuple(id(info.parameter) for info in listed)
        is_first, device = parameters != self._compared, listed[0].parameter.device
        try:
            lines = describe(listed, self._compressor, self._settings)
            values = checksums(replicated(listed, state))
            gradients = [info.parameter.grad if is_first else None for info in listed]
            summary = GradientSummary.of(gradients)
        except Exception as obstacle:
            yield from self._report_failure(plan, obstacle, device, 0, compares=True)
            raise
        any_new, any_first = yield from compare(lines, device, values, [is_new, is_first])
        if any_first:
            sparse = yield from compare_gradients(summary, device)
            plan.sparse |= {m.parameter for n, m in enumerate(listed) if n in sparse}
        self._compared = parameters
        return any_new


def _is_sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout != torch.strided
