"""One step over all tensors of an optimizer, as one exchange.

The workers agree on what they train, run Algorithm 2 on each bucket of it, and apply the step only
once every bucket of every worker is known to be good.
"""

import dataclasses
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.error_feedback import Outcome, exchange_gradients
from efsgd.engine.checked import CheckedGroups
from efsgd.engine.consistency import drop_foreign_errors_
from efsgd.engine.handshake import Handshake
from efsgd.engine.observation import Listener, Preparation, Watcher, show
from efsgd.engine.parameters import (
    GroupNotes,
    Groups,
    device_of,
    list_parameters,
    require_dense,
)
from efsgd.engine.plan import Plan
from efsgd.engine.savings import Savings
from efsgd.engine.state import State, validate_states
from efsgd.engine.update import LossScaling, Method, Rules, apply_updates_, squared_norm
from efsgd.errors import CollectiveError, NonFiniteGradientError, warn_user
from efsgd.profiling import Phases
from efsgd.wire.collectives import Exchange
from efsgd.wire.control_words import describe_change, describe_rejection, raise_unable
from efsgd.wire.traffic import TrafficCounter


class Step:
    """Steps an optimizer, and keeps what is derived from its groups between steps.

    Attributes:
        traffic: what was handed to collectives.
        phases: of a step, and how long they take.
        notes: what groups say about the optimizer as a whole.
        plan: the buckets of the present parameter groups.
        watchers: are shown each step that is applied, of each bucket.
        listeners: are shown what each step sends, of each bucket, and what comes back.
        preparations: make the gradients of each step.

    Args:
        method: how the optimizer treats its groups.
        defaults: settings where there is no group.
    """

    def __init__(self, method: Method, defaults: Mapping[str, Any]) -> None:
        self._method = method
        self.traffic, self.phases, self.notes = TrafficCounter(), Phases(), GroupNotes(defaults)
        self.plan = Plan(method, self.notes, self.phases, self.traffic)
        self.handshake = Handshake(method, self.notes, self.plan, self.traffic)
        self.watchers: list[Watcher] = []
        self.listeners: list[Listener] = []
        self._savings = Savings(method.compressor)
        self.preparations: list[Preparation] = []
        self._has_loaded = False
        self._checked = CheckedGroups(method)

    def on_new_group(self) -> None:
        """What follows is with other workers: nothing is agreed on with them."""
        self.plan.reset()
        self.plan.sparse.clear()
        self.handshake.reset()

    def reload(self, groups: Groups) -> None:
        """Groups and state have been loaded: plans are made, and values compared, anew."""
        self.notes.load(groups)
        self.plan.invalidate()
        self.handshake.invalidate()
        self._has_loaded = True

    def settle_errors(
        self, state: MutableMapping[Tensor, State], context: tuple[int, int]
    ) -> str | None:
        """Once after loading: errors of another worker are left out.

        Returns:
            What to warn of, once no other worker is waiting.
        """
        if not self._has_loaded:
            return None
        self._has_loaded = False
        saved = self.notes.world_size, self.notes.worker
        return drop_foreign_errors_(saved, state, self._method.compressor, context)

    def exchange(
        self,
        groups: Groups,
        state: MutableMapping[Tensor, State],
        context: tuple[int, int],
        scaling: LossScaling | None = None,
        weight: float = 1.0,
    ) -> Exchange[bool]:
        """One step.

        Returns:
            Whether it was applied; if not, it was skipped by all workers.

        Raises:
            NonFiniteGradientError: a worker's gradient is not finite, and the policy is "raise".
            WorkerMismatchError: the workers do not train the same thing.
            CollectiveError: another worker could not take part.
        """
        loaded = self.settle_errors(state, context) if self._has_loaded else None
        notes = [] if loaded is None else [loaded]
        try:
            rules = yield from self._agree(groups, state, context)
            step = self.notes.step
            self.traffic.begin_step(self.plan.nbytes)
            self.phases.begin_step()
            try:
                outcomes = yield from self.plan.exchange_all(
                    [self._exchange_bucket(b, step, weight, scaling) for b in self.plan.buckets]
                )
            except CollectiveError:
                raise
            except Exception:  # the others cannot know, and apply the step
                self.handshake.fall_behind(step)
                raise
            is_usual = True
            for outcome in outcomes:
                is_usual = is_usual and outcome.is_usual
            if not (is_usual or (yield from self._judge(groups, outcomes))):
                self.traffic.skipped_steps += 1
                return False
            failure = None
            if self.watchers:
                scale = weight if scaling is None else scaling.factor * weight
                failure = show(self.watchers, self.plan, outcomes, scale)
            self._apply(outcomes, rules, self.notes.shared(groups)["max_grad_norm"])
            self.notes.count_step(groups, context)
            self.handshake.expected = step + 1
            self.traffic.steps += 1
            if not self._savings.is_known and context[0] > 1 and context[1] == 0:
                note = self._savings.judge(self.plan, self.traffic, step, self.notes.shared(groups))
                notes += [] if note is None else [note]
            if failure is not None:
                raise failure
            return True
        finally:
            self.plan.undo_changes_()
            for note in notes:  # as an error, a warning must not keep the others waiting
                warn_user(note)

    def _exchange_bucket(
        self, bucket: Bucket, step: int, weight: float, scaling: LossScaling | None
    ) -> Exchange[Outcome]:
        """Algorithm 2, lines 7 to 10, for one bucket, once its gradients are there."""
        failure: Exception | None = None
        try:
            self.plan.await_gradients(bucket)
        except Exception as error:  # the other workers are waiting, so it is raised afterwards
            failure = error
        exchange = exchange_gradients(
            bucket,
            self.plan.gradients(bucket),
            step,
            weight if scaling is None else scaling.factor * weight,
            has_overflowed=scaling is not None and scaling.has_overflowed,
            is_scaled=scaling is not None,
            abstains=None if failure is None else "unable",
            digest=self._checked.digest,
        )
        for listener in self.listeners:
            exchange = listener(self.plan, bucket, step, exchange)
        outcome = yield from exchange
        return outcome if failure is None else dataclasses.replace(outcome, error=failure)

    def _agree(
        self, groups: Groups, state: MutableMapping[Tensor, State], context: tuple[int, int]
    ) -> Exchange[Rules]:
        """Makes this worker's plan and, where any worker has news, compares it with the others'.

        Returns:
            How the groups are to be updated.
        """
        plan, handshake = self.plan, self.handshake
        if context != plan.context:
            handshake.reset()
        if context[0] == 1:
            rules = self._check(groups, context)
            plan.await_gradients()
            plan.find_sparse(groups)
            plan.update(groups, state, context, plan.sign(groups, state))
            plan.prepare(rules)
            return rules
        step = self.notes.step if handshake.expected is None else handshake.expected
        compares, is_new = handshake.is_due(step), True
        device = device_of(groups)
        try:
            rules = self._check(groups, context)
            signature = plan.sign(groups, state)
            is_new = handshake.is_new(signature)
            if is_new or compares:
                plan.await_gradients()
                validate_states(list_parameters(groups), state, self._method.compressor)
        except Exception as error:
            yield from handshake.report_failure(error, device, step, compares=compares)
            raise
        if is_new and not compares:
            yield from handshake.announce_change(groups, step)
        has_compared = is_new or compares
        if has_compared:
            is_new = yield from handshake.compare(groups, state, context, new=is_new)
        try:
            if has_compared:  # and may have found what is sparse
                signature = plan.sign(groups, state)
            plan.update(groups, state, context, signature)
            plan.prepare(rules)
        except Exception as error:
            yield from handshake.report_failure(error, device, step, compares=is_new)
            raise
        if not is_new and handshake.has_other_numerics():
            yield from handshake.announce_change(groups, step)
            is_new = True
        if is_new:
            yield from handshake.conclude(
                groups, device, [p.agree(*context) for p in self.preparations]
            )
        return rules

    def _check(self, groups: Groups, context: tuple[int, int]) -> Rules:
        """Checks what groups say, makes gradients and checks them, before anything is sent.

        Returns:
            How the groups are to be updated.
        """
        self.notes.settle(groups)
        rules = self._checked.rules(groups)
        for preparation in self.preparations:
            preparation.prepare(*context)
        for group in () if self._method.takes_sparse else groups:
            for parameter in group["params"]:
                require_dense(parameter.grad)
        return rules

    def _judge(self, groups: Groups, outcomes: Sequence[Outcome]) -> Exchange[bool]:
        """Whether a step is applied, of which not all that was sent is as usual.

        Raises:
            NonFiniteGradientError: it must not be skipped.
            WorkerMismatchError: some workers have changed what they train.
            CollectiveError: some workers could not take part.
        """
        verdicts = [outcome.verdict for outcome in outcomes]
        self.plan.note_sparse(verdicts)
        if all(verdict.is_good for verdict in verdicts):
            return True
        step = self.notes.step
        self.handshake.withdraw(step)
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        raise_unable(verdicts)
        if changed := sorted({worker for verdict in verdicts for worker in verdict.changed}):
            yield from self.handshake.raise_mismatch(groups, describe_change(changed, step))
        if any(verdict.differing for verdict in verdicts):
            text = f"Step {step} was abandoned, and nothing has changed on any worker."
            yield from self.handshake.raise_mismatch(groups, text)
        is_scaled = any(verdict.is_scaled for verdict in verdicts)
        if self.notes.shared(groups)["nonfinite"] == "raise" and not is_scaled:
            names = {info.index: info.name for info in self.plan.infos}
            raise NonFiniteGradientError(describe_rejection(verdicts, names, step))
        return False

    def _apply(
        self, outcomes: Sequence[Outcome], rules: Rules, max_grad_norm: float | None
    ) -> None:
        plan, changes = self.plan, {}
        plan.keep_changes()
        found = []
        for bucket, outcome in zip(plan.buckets, outcomes, strict=True):
            assert outcome.mean is not None  # there was no error
            found.append((bucket, outcome.mean, outcome.verdict.absent))
            bucket.commit_(outcome.verdict.absent)
            plan.views.show_errors_(bucket)
        if max_grad_norm is not None:
            self.traffic.grad_norm = norm = math.sqrt(sum(squared_norm(*each) for each in found))
            changes["clip"] = min(1.0, max_grad_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
        for bucket, mean, absent in found:
            kinds = plan.kinds(bucket, absent, rules)
            with self.phases("Alg. 2, lines 11 to 13: update"):
                apply_updates_(bucket, mean, kinds, plan.states, rules, **changes)
