"""One step over all tensors of an optimizer, as one exchange.

It makes the sections when the parameter groups have changed, lets the workers compare what they
train, runs Algorithm 2 on each section, and applies the step only once every section of every
worker is known to be good.
"""

from collections.abc import Hashable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from efsgd.agreement import check_schema, check_values
from efsgd.collectives import Exchange, intercept
from efsgd.compressors import Compressor
from efsgd.control import Verdict, describe_rejection
from efsgd.error_feedback import Section, commit_and_decompress_, exchange_gradients
from efsgd.errors import NonFiniteGradientError
from efsgd.sections import describe, make_sections, signature
from efsgd.state import Member, State, complete_, members, show_errors_
from efsgd.statistics import Ledger
from efsgd.update import apply_updates_

__all__ = ["Stepper"]


class Stepper:
    """Steps an optimizer, and keeps what is derived from its groups between steps.

    Attributes:
        sections: of the present parameter groups; empty before the first step.
        ledger: what was handed to collectives.

    Args:
        compressor: decides what is compressed and how far.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.sections: list[Section] = []
        self.ledger = Ledger()
        self._compressor = compressor
        self._members: list[Member] = []
        self._states: dict[int, State] = {}
        self._signature: Hashable = None
        self._agreed_on: Hashable = None
        self._compared: Hashable = None

    def forget(self) -> None:
        """Has sections made anew, and workers compare their parameter lists, at the next step."""
        self.sections, self._signature, self._agreed_on = [], None, None

    @torch.no_grad()
    def exchange(
        self,
        groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, State],
        world_size: int,
        worker: int,
    ) -> Exchange[None]:
        """One step.

        Args:
            groups: parameter groups (parameters, and the count of steps, modified in place).
            state: of the parameters (modified in place).
            world_size: the number of workers.
            worker: this worker's place among them, from 0.

        Raises:
            NonFiniteGradientError: a worker's gradient is not finite, and the policy is "raise".
            WorkerMismatchError: the workers do not train the same thing.
        """
        step: int = groups[0]["step"]
        self._prepare(groups, state, world_size, worker)
        self.ledger.begin_check()
        if world_size > 1:
            yield from intercept(self._check(), outgoing=self.ledger.record)
        parameters = [p for section in self.sections for p in section.parameters.values()]
        self.ledger.begin_step(sum(p.numel() * p.element_size() for p in parameters))
        means, verdicts = [], []
        for section in self.sections:
            exchange = exchange_gradients(section, step)
            mean, verdict = yield from intercept(exchange, outgoing=self.ledger.record)
            means.append(mean)
            verdicts.append(verdict)
        if not self._may_apply(verdicts, groups):
            self.ledger.skip_step()
            return
        updates: dict[int, Tensor] = {}
        for section, mean, verdict in zip(self.sections, means, verdicts, strict=True):
            updates |= commit_and_decompress_(section, mean, verdict.absent)
            show_errors_(section, self._states)
        apply_updates_(self._members, self._states, updates)
        for group in groups:
            group["step"] = step + 1
        self.ledger.end_step()

    def _prepare(
        self,
        groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, State],
        world_size: int,
        worker: int,
    ) -> None:
        present = signature(groups, self._compressor, world_size, worker)
        if present == self._signature:
            return
        self._members, self._states = list(members(groups)), {}
        for member in self._members:
            if member.parameter.requires_grad:
                complete_(state[member.parameter], member, self._compressor)
                self._states[member.index] = state[member.parameter]
        self.sections = make_sections(
            self._members, self._states, self._compressor, world_size, worker
        )
        self._signature = present

    def _check(self) -> Exchange[None]:
        """Compares the workers' parameter lists when they are new, and their values once."""
        if not self.sections or self._agreed_on == self._signature:
            return
        device = next(iter(self.sections[0].parameters.values())).device
        yield from check_schema(describe(self._members, self._compressor), device)
        parameters = [member.parameter for member in self._members]
        identities = tuple(map(id, parameters))
        if identities != self._compared:
            yield from check_values(parameters, [m.name for m in self._members], device)
            self._compared = identities
        self._agreed_on = self._signature

    def _may_apply(self, verdicts: list[Verdict], groups: list[dict[str, Any]]) -> bool:
        if all(verdict.is_good for verdict in verdicts):
            return True
        if groups[0]["nonfinite"] == "raise":
            names = {member.index: member.name for member in self._members}
            raise NonFiniteGradientError(describe_rejection(verdicts, names, groups[0]["step"]))
        return False
