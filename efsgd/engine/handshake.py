"""What workers agree on before a step: what is new, on whom, and is it the same everywhere?

A worker cannot know by itself whether the others have news as well. So one that has, or has met an
error, takes part in the step that the others may be about to take, with zeros in its old buckets,
and says so in its control word; unless it knows that all of them begin with a comparison.
"""

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Never, TypeVar

import torch
from torch import Tensor

from efsgd.algorithms.error_feedback import exchange_gradients
from efsgd.engine.consistency import describe, replicated
from efsgd.engine.parameters import GroupNotes, Groups, device_of, list_parameters
from efsgd.engine.plan import Plan, Signature
from efsgd.engine.state import State
from efsgd.engine.update import Method
from efsgd.errors import WorkerMismatchError
from efsgd.wire.collectives import Exchange, intercept
from efsgd.wire.compare import GradientSummary, checksums, compare, compare_gradients
from efsgd.wire.control_words import Abstention, Verdict, describe_change, raise_unable
from efsgd.wire.traffic import TrafficCounter

T = TypeVar("T")


@dataclass(frozen=True)
class Agreement:
    """What all workers are known to have in common.

    Attributes:
        signature: of the plans; its `settings` are this worker's own identities.
        numerics: of the plans' buckets.
        start: the step at which compression starts.
        every: the number of steps between two checks; 0 where there are none.
        step: the number of the first step it is for.
    """

    signature: Signature
    numerics: tuple[str, ...]
    start: int
    every: int
    step: int


class Handshake:
    """What the workers have agreed on, kept between steps.

    The old buckets of `plan` carry what this worker has to say. `expected` is the number of the
    step that the others are about to take, as far as is known.
    """

    def __init__(
        self, method: Method, notes: GroupNotes, plan: Plan, traffic: TrafficCounter
    ) -> None:
        self._method, self._notes, self._plan, self._traffic = method, notes, plan, traffic
        self.reset()

    def reset(self) -> None:
        """The workers are others: nothing is agreed on with them."""
        self.expected: int | None = None
        self._agreed: Agreement | None = None
        self._is_valid, self._is_planned = True, False
        self._compared: Hashable = None

    def plan_change(self) -> None:
        """All workers change their settings before the next step, and know it of each other."""
        self._is_planned = True

    def invalidate(self) -> None:
        """Groups and state may have become others, on this worker at least."""
        self._is_valid = False

    def fall_behind(self, step: int) -> None:
        """The others take this step, and this worker does not: the next one is an error on all."""
        self.expected = step + 1
        self.invalidate()

    def is_new(self, present: Signature) -> bool:
        """Whether this worker has something that is not agreed on."""
        agreed = self._agreed
        return agreed is None or not self._is_valid or present != agreed.signature

    def is_due(self, step: int) -> bool:
        """Whether all workers are known to begin the step with a comparison."""
        agreed = self._agreed
        # Where nothing is trained nothing is sent, in which a worker could tell its news.
        if agreed is None or self._is_planned or not agreed.numerics:
            return True
        is_due = agreed.every > 0 and step > 0 and step % agreed.every == 0
        return is_due or self._plan.phase(step, agreed.start) != agreed.signature.phase

    def compare(
        self, groups: Groups, state: Mapping[Tensor, State], context: tuple[int, int], *, new: bool
    ) -> Exchange[bool]:
        """Compares settings and values. Returns whether any worker has something `new`."""
        infos = list(list_parameters(groups, self._plan.sparse))
        parameters: Hashable = context, tuple(id(info.parameter) for info in infos)
        is_first, device = parameters != self._compared, device_of(groups)
        try:
            lines = describe(infos, self._method)
            values = checksums(replicated(infos, state, self._method.compressor))
            trained = [i.gradient if i.is_trained and is_first else None for i in infos]
            summary = GradientSummary.of(trained)
        except Exception as error:
            yield from self.report_failure(error, device, 0, compares=True)
            raise
        any_new, any_first = yield from self._counted(
            compare(lines, device, values, [new, is_first])
        )
        if any_first:
            sparse = yield from self._counted(compare_gradients(summary, device))
            self._plan.sparse |= {m.parameter for n, m in enumerate(infos) if n in sparse}
        self._compared, self._is_planned = parameters, False
        if any_new:  # until `conclude`, which all workers reach or none
            self._agreed = None
        return any_new

    def conclude(
        self, groups: Groups, device: torch.device, agreements: Sequence[Exchange[None]]
    ) -> Exchange[None]:
        """All workers have made new plans: they agree on these if their numerics are equal."""
        for agreement in agreements:
            yield from self._counted(agreement)
        plan, group, step = self._plan, self._notes.shared(groups), self._notes.step
        yield from self._counted(compare(list(plan.describe_numerics()), device))
        assert plan.signature is not None
        numbers = group["start_compressing_at"], group["check_every"]
        self._agreed = Agreement(plan.signature, plan.numerics, *numbers, step)
        self._is_valid, self.expected = True, step

    def withdraw(self, step: int) -> None:
        """All workers know that this step is not applied: nor is what was agreed on for it.

        Plans that were made for it are undone, and one that cannot be made again would be missed.
        """
        if self._agreed is not None and self._agreed.step == step:
            self._agreed = None

    def has_other_numerics(self) -> bool:
        """Whether this worker computes otherwise than was agreed on."""
        return self._agreed is not None and self._plan.numerics != self._agreed.numerics

    def announce_change(self, groups: Groups, step: int) -> Exchange[None]:
        """Tells the others, in a step that they may think an ordinary one.

        They see it in their control words and all raise, unless everyone announces a change.
        """
        verdicts, everyone = (yield from self._abstain("changed", step)), True
        for bucket, verdict in zip(self._plan.buckets, verdicts, strict=True):
            everyone = everyone and len(verdict.changed) == bucket.control.world_size
        raise_unable(verdicts)
        if not everyone:
            text = describe_change(verdicts[0].changed, step)
            yield from self.raise_mismatch(groups, text)

    def raise_mismatch(self, groups: Groups, text: str) -> Exchange[Never]:
        """Raises on all workers, since they all know that they are not the same; says where."""
        infos = list(list_parameters(groups, self._plan.sparse))
        try:
            lines = describe(infos, self._method)
            yield from self._counted(compare(lines, device_of(groups)))
        except WorkerMismatchError as difference:
            text = f"{text} {difference}"
        raise WorkerMismatchError(text)

    def report_failure(
        self, error: Exception, device: torch.device, step: int, *, compares: bool
    ) -> Exchange[None]:
        """Tells the others, who are about to take `step`, that this worker cannot.

        `compares` says whether they begin with a comparison.
        """
        if not compares:
            yield from self._abstain("unable", step)
            return
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        with contextlib.suppress(WorkerMismatchError):
            yield from self._counted(compare([f"cannot take part: {reason}"], device))

    def _abstain(self, why: Abstention, step: int) -> Exchange[list[Verdict]]:
        """Takes part in a step of the others, with zeros in the buckets that they know of."""
        plan = self._plan
        outcomes = yield from plan.exchange_all(
            [exchange_gradients(b, plan.gradients(b), step, abstains=why) for b in plan.buckets]
        )
        verdicts = [outcome.verdict for outcome in outcomes]
        plan.note_sparse(verdicts)
        return verdicts

    def _counted(self, exchange: Exchange[T]) -> Exchange[T]:
        return intercept(exchange, self._traffic.record_check)
