"""What messages and averages give away, for one's own model and optimizer."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efsgd.audit.analytic import read_first_layer
from efsgd.audit.attacks import INVERTING_GRADIENTS, Attack
from efsgd.audit.findings import BLIND, Report, Row
from efsgd.audit.inversion import invert
from efsgd.audit.membership import update_scores
from efsgd.audit.objective import Bounds, Loss
from efsgd.audit.observed import Message
from efsgd.audit.scores import Separation, best_match, separation
from efsgd.audit.victims import Batch, Victim, take_steps
from efsgd.checks import require_integer

ATTACKS: Mapping[str, Attack] = {
    "naive, L-BFGS": Attack(adaptive=False),
    "adaptive, L-BFGS": Attack(),
    "naive, cosine, Adam": replace(INVERTING_GRADIENTS, iterations=600, total_variation=1e-2),
    "adaptive, cosine, Adam": replace(
        INVERTING_GRADIENTS, adaptive=True, iterations=600, total_variation=1e-2
    ),
}


def report(
    model_factory: Callable[[], nn.Module],
    optimizer_factory: Callable[[nn.Module], Any],
    batch: tuple[Tensor, Tensor],
    *,
    peers: Sequence[tuple[Tensor, Tensor]] = (),
    others: tuple[Tensor, Tensor] | None = None,
    loss: Loss = cross_entropy,
    attacks: Mapping[str, Attack] = ATTACKS,
    labels_known: bool = True,
    steps: int = 1,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    seconds: float = 120.0,
    show_progress: bool = False,
) -> Report:
    """Takes a step with a batch, attacks what was sent, and says how close each attack came.

    The message is the one that the optimizer hands to its collectives, error feedback, compressor
    and noise included. The attacker knows the model's weights, the compressor and its settings.
    With `peers` there are two reports in one: what a worker's messages give away of its batch, and
    what the averages alone, as behind secure aggregation, give away of the batches of all.

    Args:
        model_factory: makes the model, with the weights whose gradients are sent: random ones give
            most away. It is copied. Opacus's `GradSampleModule` is attacked as the module in it.
        optimizer_factory: makes of the model an optimizer of this package, with or without
            `PrivateOptimizer`, or a `GradientAverager`; one for each worker. With peers a
            `PrivateOptimizer` is given no `generator`: no two workers may have the same noise.
        batch: inputs [samples, ...] and labels [samples] of one worker.
        peers: the batches of the other workers of the step, as many as these have and of the same
            size. All workers are in this thread: no process group is asked.
        others: inputs and labels of the same kind, as an attacker may have them. Their mean is the
            blind guess, else the middle of the bounds; and the batch is told from them.
        loss: of outputs and labels, a scalar, a mean over samples.
        attacks: by name.
        labels_known: whether the attacker knows the labels; see `invert` for how it finds them.
        steps: that are taken with this batch, at the same weights; see `combine`.
        bounds: the least and the largest value of inputs.
        seed: of the model, and of the starts of attacks.
        seconds: for all attacks together, in equal parts, on messages and averages.
        show_progress: whether bars are shown; needs the package rich.

    Returns:
        Scores and reconstructions. `print` it, and `save_picture`.

    Raises:
        ValueError: labels that are not one for each input, batches of different sizes, or no steps.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.audit import Attack, report
        >>> found = report(
        ...     lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4)),
        ...     lambda model: PowerSGDOptimizer(
        ...         model.parameters(), lr=0.1, momentum_form="sgd", rank=1
        ...     ),
        ...     (torch.rand(1, 1, 4, 4), torch.tensor([1])),
        ...     attacks={"adaptive": Attack()},
        ... )
        >>> found.best.score > 0.99, found.blind.score < 0.7
        (True, True)
    """
    batches = [batch, *peers]
    _require_batches(batches)
    require_integer("steps", steps, 1)
    victim = take_steps(model_factory, optimizer_factory, batches, loss, steps, seed)
    attacker = _Attacker(victim, loss, attacks, others, labels_known, bounds, seed, show_progress)
    if len(batches) == 1 or victim.averages is None:
        found = attacker.report(victim.message, batch, seconds)
        return replace(found, workers=len(batches))
    together = torch.cat([each[0] for each in batches]), torch.cat([each[1] for each in batches])
    found = attacker.report(victim.message, batch, seconds / 2)
    averages = attacker.report(victim.averages, together, seconds / 2)
    return replace(found, workers=len(batches), averages=averages)


@dataclass(frozen=True)
class _Attacker:
    """What is the same for messages and averages."""

    victim: Victim
    loss: Loss
    attacks: Mapping[str, Attack]
    others: Batch | None
    labels_known: bool
    bounds: Bounds
    seed: int
    show_progress: bool

    def report(self, message: Message, batch: Batch, seconds: float) -> Report:
        """What a message gives away of the batch that it is of."""
        inputs, end = batch[0], time.monotonic() + seconds
        guess = self._blind_guess(inputs)
        rows, found = [Row.of(BLIND, batch, guess, self.bounds)], {BLIND: guess}
        for name, read in read_first_layer(message, guess, self.bounds).items():
            found[name] = read[best_match(inputs, read)]
            rows.append(Row.of(name, batch, found[name], self.bounds))
        for number, (name, attack) in enumerate(self.attacks.items()):
            left = (end - time.monotonic()) / (len(self.attacks) - number)
            row, found[name] = self._inverted(name, attack, message, batch, left)
            rows.append(row)
        nbytes = message.nbytes // self.victim.steps
        told = self._told(message, batch)
        return Report(tuple(rows), inputs.detach().clone(), found, nbytes, told)

    def _inverted(
        self, name: str, attack: Attack, message: Message, batch: Batch, seconds: float
    ) -> tuple[Row, Tensor]:
        inputs, labels = batch
        inversion = invert(
            message, self.victim.model, inputs.shape, labels if self.labels_known else None,
            loss=self.loss, attack=attack, parameters=self.victim.parameters, bounds=self.bounds,
            seed=self.seed, seconds=seconds, show_progress=self.show_progress,
        )  # fmt: skip
        found = inversion.inputs[best_match(inputs, inversion.inputs)]
        looked_for = None if self.labels_known else inversion.labels
        row = Row.of(name, batch, found, self.bounds, looked_for)
        row = replace(row, seconds=inversion.seconds, is_complete=inversion.is_complete)
        return row, found

    def _told(self, message: Message, batch: Batch) -> Separation | None:
        if self.others is None:
            return None
        scores = [
            update_scores(
                message, self.victim.model, *each, loss=self.loss, parameters=self.victim.parameters
            )
            for each in (batch, self.others)
        ]
        return separation(*scores)

    def _blind_guess(self, inputs: Tensor) -> Tensor:
        if self.others is not None:
            return self.others[0].mean(0, keepdim=True).expand_as(inputs).clone()
        return torch.full_like(inputs, 0.0 if self.bounds is None else sum(self.bounds) / 2)


def _require_batches(batches: Sequence[Batch]) -> None:
    for inputs, labels in batches:
        if len(inputs) != len(labels) or not len(inputs):
            raise ValueError(
                f"Invalid batch: {len(inputs)} inputs and {len(labels)} labels. There must be as "
                "many, and at least one. Give one label for each input."
            )
    if len(sizes := {len(labels) for _, labels in batches}) > 1:
        raise ValueError(
            f"Invalid peers: batches of sizes {sorted(sizes)}. They must be of one size: else the "
            "mean of the workers' gradients is not that of their samples."
        )
