"""How workers come to terms before a step: what changed, on whom, and is it the same everywhere?"""

import contextlib
from collections.abc import Iterable

import torch

from efsgd.agreement import compare, compare_gradients
from efsgd.collectives import Exchange
from efsgd.compressors import Compressor
from efsgd.control import ControlWords, Verdict
from efsgd.errors import CollectiveError, WorkerMismatchError
from efsgd.plan import Plan
from efsgd.schedule import Schedule
from efsgd.sections import describe

__all__ = ["Terms", "describe_change", "raise_unable"]


class Terms:
    """What the workers have agreed on, kept between steps.

    Attributes:
        schedules: of each of the last plan's sections, with the control words that go with it;
            None until the plan has been through a step.

    Args:
        compressor: decides what is compressed and how far.
        settings: names of the group entries that workers must agree on.
    """

    def __init__(self, compressor: Compressor, settings: Iterable[str]) -> None:
        self.schedules: list[tuple[ControlWords, Schedule]] | None = None
        self._compressor, self._settings = compressor, tuple(settings)
        self._agreed_on: object = None
        self._compared: object = None

    def forget(self) -> None:
        """Has workers compare all they have, at the next step."""
        self._agreed_on = self._compared = None

    def announce_change(self, step: int) -> Exchange[None]:
        """Tells the others, in a step that they may think an ordinary one.

        They see it in their control words and all raise, unless everyone announces a change.

        Args:
            step: the number of the step, from 0.

        Raises:
            WorkerMismatchError: some workers have not changed.
        CollectiveError: some could not take part.
        """
        verdicts, everyone = [], True
        for control, schedule in self.schedules or ():
            verdict = yield from control.announce(schedule)
            everyone = everyone and len(verdict.changed) == control.world_size
            verdicts.append(verdict)
        raise_unable(verdicts)
        if not everyone:
            raise WorkerMismatchError(describe_change(verdicts[0].changed, step))

    def bow_out(self, obstacle: Exception, device: torch.device, *, is_due: bool) -> Exchange[None]:
        """Tells the others, who are about to take a step, that this worker cannot.

        Args:
            obstacle: why not; it is to be raised when this has returned.
            device: where buffers may live.
            is_due: the others begin with comparing all they have.
        """
        if self.schedules is not None and not is_due:
            for control, schedule in self.schedules:
                yield from control.announce(schedule, is_unable=True)
            return
        reason = " ".join(f"{type(obstacle).__name__}: {obstacle}".split())
        with contextlib.suppress(WorkerMismatchError):
            yield from compare([f"cannot take part: {reason}"], device)

    def check(self, plan: Plan, *, is_due: bool = False) -> Exchange[frozenset[int]]:
        """Compares the workers' plans where they are new, and their values once.

        Args:
            plan: of this worker.
            is_due: compare all of it in any case.

        Returns:
            Positions of the parameters that turned out to have sparse gradients somewhere.

        Raises:
            WorkerMismatchError: names the first difference.
        """
        identity = plan.identity
        parameters = plan.context, tuple(id(member.parameter) for member in plan.members)
        is_first = parameters != self._compared
        if self._agreed_on == identity and not is_first and not is_due:
            return frozenset()
        device = plan.members[0].parameter.device
        lines = describe(plan.members, self._compressor, self._settings, plan.sections)
        yield from compare(lines, device, plan.replicated() if is_first or is_due else None)
        sparse: frozenset[int] = frozenset()
        if is_first:
            gradients = [member.parameter.grad for member in plan.members]
            sparse = yield from compare_gradients(gradients, device)
        self._agreed_on, self._compared = identity, parameters
        return sparse


def raise_unable(verdicts: Iterable[Verdict]) -> None:
    """Raises a CollectiveError if some workers could not take part."""
    if unable := sorted({worker for verdict in verdicts for worker in verdict.unable}):
        numbers = ", ".join(map(str, unable))
        raise CollectiveError(f"could not take part, and say themselves why: worker {numbers}.")


def describe_change(workers: Iterable[int], step: int) -> str:
    """Says that these workers, and not all, have changed what they train.

    Args:
        workers: who has.
        step: the number of the step, from 0.
    """
    who = ", ".join(map(str, workers))
    return (
        f"Step {step} was abandoned: worker {who} has changed what it trains since the last step, "
        f"and the others have not. Nothing has changed on any worker. Ranks and other settings of "
        f"the compressor, frozen parameters, parameter groups and loaded state_dicts must change "
        f"on all workers before the same step."
    )
