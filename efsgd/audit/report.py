"""What a batch's message gives away, for one's own model and optimizer: a table and a picture."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efsgd.audit.attacks import INVERTING_GRADIENTS, Attack
from efsgd.audit.first_layer import read_first_layer
from efsgd.audit.inversion import invert
from efsgd.audit.membership import update_scores
from efsgd.audit.objective import Bounds, Loss
from efsgd.audit.observed import Message
from efsgd.audit.pictures import save_images
from efsgd.audit.recording import observe
from efsgd.audit.scores import Separation, best_match, label_recovery, psnr, separation, ssim
from efsgd.audit.several_steps import combine
from efsgd.checks import require_integer
from efsgd.optimizers.averager import GradientAverager

WARNING = """\
These are the attacks of this package, with few starts and iterations. That none of them found
anything is no proof that nothing can be found: a better attack may. What comes no closer than the
blind guess shows nothing of the batch. Differential privacy alone bounds what any attack can find.
"""
BLIND = "blind guess"
ATTACKS: Mapping[str, Attack] = {
    "naive, L-BFGS": Attack(adaptive=False),
    "adaptive, L-BFGS": Attack(),
    "naive, cosine, Adam": replace(INVERTING_GRADIENTS, iterations=600, total_variation=1e-2),
    "adaptive, cosine, Adam": replace(
        INVERTING_GRADIENTS, adaptive=True, iterations=600, total_variation=1e-2
    ),
}


@dataclass(frozen=True)
class Row:
    """How close one attack came.

    Attributes:
        attack: its name.
        ssim: of each sample, [samples]; None of what are no images.
        psnr: of each sample, [samples], decibels.
        labels: the part of the labels that was found; None where they were not looked for.
        seconds: that it took.
        is_complete: False where the time was over before.
    """

    attack: str
    ssim: tuple[float, ...] | None
    psnr: tuple[float, ...]
    labels: float | None
    seconds: float
    is_complete: bool = True

    @property
    def score(self) -> float:
        """The mean SSIM, or PSNR of what are no images."""
        values = self.psnr if self.ssim is None else self.ssim
        return sum(values) / len(values)


@dataclass(frozen=True)
class Report:
    """What the attacks found; `str()` of it is a table.

    Attributes:
        rows: the blind guess; what is read from a linear first layer, if there is one; and then one
            for each attack.
        originals: the batch, [samples, ...].
        found: by name, what each has made of it, in the order of the originals.
        message_bytes: the size of what one worker has sent.
        membership: how well the batch is told from `others`, by products of gradients with the
            message; None if there are none.
    """

    rows: tuple[Row, ...]
    originals: Tensor
    found: Mapping[str, Tensor]
    message_bytes: int
    membership: Separation | None

    @property
    def blind(self) -> Row:
        """What is found without any message."""
        return self.rows[0]

    @property
    def best(self) -> Row:
        """The attack that came closest; only who has the originals knows which it is."""
        return max(self.rows[1:] or self.rows, key=lambda row: row.score)

    def __str__(self) -> str:
        width = max(len(row.attack) for row in self.rows)
        lines = [f"{'attack':<{width}}   SSIM   PSNR (dB)   labels   seconds"]
        for row in self.rows:
            similarity = "    –" if row.ssim is None else f"{sum(row.ssim) / len(row.ssim):5.2f}"
            notes = "  (best)" if row is self.best else ""
            notes += "" if row.is_complete else "  (out of time)"
            labels = "     –" if row.labels is None else f"{row.labels:6.0%}"
            lines.append(
                f"{row.attack:<{width}}  {similarity}   {sum(row.psnr) / len(row.psnr):9.1f}   "
                f"{labels}   {row.seconds:7.1f}{notes}"
            )
        if (found := self.membership) is not None:
            low, high = found.auc_interval
            lines += [
                "",
                f"Told from {found.others} others by the message: AUC {found.auc:.2f} "
                f"({low:.2f} to {high:.2f}), guessing 0.50.",
            ]
        return "\n".join([*lines, "", f"Sent: {self.message_bytes:,} bytes.", "", WARNING.rstrip()])

    def to_dict(self) -> dict[str, Any]:
        """All scores, of what JSON has."""
        membership = None if self.membership is None else asdict(self.membership)
        return {
            "rows": [asdict(row) for row in self.rows],
            "best": self.best.attack,
            "message_bytes": self.message_bytes,
            "membership": membership,
            "warning": " ".join(WARNING.split()),
        }

    def save_picture(self, path: str | Path, *, names: Sequence[str] | None = None) -> None:
        """Draws originals above what was found of them; needs matplotlib.

        Args:
            path: of the image; its folder must be there.
            names: of the rows; by default those of the blind guess and of the best attack.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the samples are no images of one or three channels.
        """
        chosen = names or [self.blind.attack, self.best.attack]
        rows = {"original": self.originals, **{name: self.found[name] for name in chosen}}
        save_images(path, rows)


def report(
    model_factory: Callable[[], nn.Module],
    optimizer_factory: Callable[[nn.Module], Any],
    batch: tuple[Tensor, Tensor],
    *,
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

    Args:
        model_factory: makes the model, with the weights whose gradients are sent: random ones give
            most away. Opacus's `GradSampleModule` is attacked as the module in it.
        optimizer_factory: makes of the model an optimizer of this package, with or without
            `PrivateOptimizer`, or a `GradientAverager`.
        batch: inputs [samples, ...] and labels [samples] of one worker.
        others: inputs and labels of the same kind, as an attacker may have them. Their mean is the
            blind guess, else the middle of the bounds; and the batch is told from them.
        loss: of outputs and labels, a scalar.
        attacks: by name.
        labels_known: whether the attacker knows the labels; see `invert` for how it finds them.
        steps: that are taken with this batch, at the same weights; see `combine`.
        bounds: the least and the largest value of inputs.
        seed: of the model, and of the starts of attacks.
        seconds: for all attacks together, in equal parts.
        show_progress: whether bars are shown; needs the package rich.

    Returns:
        Scores and reconstructions. `print` it, and `save_picture`.

    Raises:
        ValueError: labels that are not one for each input, or no steps.

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
    inputs, labels = batch
    if len(inputs) != len(labels) or not len(inputs):
        raise ValueError(
            f"Invalid batch: {len(inputs)} inputs and {len(labels)} labels. There must be as many, "
            "and at least one. Give one label for each input."
        )
    require_integer("steps", steps, 1)
    victim, message = _message(model_factory, optimizer_factory, batch, loss, steps, seed)
    guess = _blind_guess(inputs, None if others is None else others[0], bounds)
    rows = [_row(BLIND, batch, guess, None, bounds)]
    found, end = {BLIND: guess}, time.monotonic() + seconds
    for name, read in read_first_layer(message, guess, bounds).items():
        found[name] = read[best_match(inputs, read)]
        rows.append(_row(name, batch, found[name], None, bounds))
    for number, (name, attack) in enumerate(attacks.items()):
        left = (end - time.monotonic()) / (len(attacks) - number)
        inversion = invert(
            message, victim.model, inputs.shape, labels if labels_known else None, loss=loss,
            attack=attack, parameters=victim.parameters, bounds=bounds, seed=seed, seconds=left,
            show_progress=show_progress,
        )  # fmt: skip
        found[name] = inversion.inputs[best_match(inputs, inversion.inputs)]
        looked_for = None if labels_known else inversion.labels
        row = _row(name, batch, found[name], looked_for, bounds)
        rows.append(replace(row, seconds=inversion.seconds, is_complete=inversion.is_complete))
    told = None
    if others is not None:
        told = separation(
            *(
                update_scores(message, victim.model, *each, loss=loss, parameters=victim.parameters)
                for each in (batch, others)
            )
        )
    return Report(tuple(rows), inputs.detach().clone(), found, message.nbytes // steps, told)


@dataclass(frozen=True)
class _Victim:
    """A model as it was before the step, and its parameters in the optimizer's order."""

    model: nn.Module
    parameters: list[Tensor]


def _message(
    model_factory: Callable[[], nn.Module],
    optimizer_factory: Callable[[nn.Module], Any],
    batch: tuple[Tensor, Tensor],
    loss: Loss,
    steps: int,
    seed: int,
) -> tuple[_Victim, Message]:
    """What steps with this batch send, at one and the same weights."""
    torch.manual_seed(seed)
    model = model_factory()
    before: Any = copy.deepcopy(model)
    if hasattr(before, "to_standard_module"):  # Opacus's, whose hooks an attacker has no use for
        before = before.to_standard_module()
    optimizer = optimizer_factory(model)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    copies = {id(own): of_victim for own, of_victim in pairs}
    given = [each for group in optimizer.param_groups for each in group["params"]]
    victim = _Victim(before, [copies[id(each)] for each in given])
    with observe(optimizer) as recording:
        for _ in range(steps):
            for own, start in zip(model.parameters(), before.parameters(), strict=True):
                own.data.copy_(start)
            optimizer.zero_grad()
            loss(model(batch[0]), batch[1]).backward()
            if isinstance(optimizer, GradientAverager):
                optimizer.average_()
            else:
                optimizer.step()
    messages = recording.messages()
    feeds_back = any(group.get("error_feedback", True) for group in optimizer.param_groups)
    is_one = len(messages) == 1
    return victim, messages[0] if is_one else combine(messages, error_feedback=feeds_back)


def _blind_guess(inputs: Tensor, others: Tensor | None, bounds: Bounds) -> Tensor:
    if others is not None:
        return others.mean(0, keepdim=True).expand_as(inputs).clone()
    return torch.full_like(inputs, 0.0 if bounds is None else sum(bounds) / 2)


def _row(
    name: str, batch: tuple[Tensor, Tensor], found: Tensor, labels: Tensor | None, bounds: Bounds
) -> Row:
    inputs, true_labels = batch
    data_range = 1.0 if bounds is None else bounds[1] - bounds[0]
    similarity = None
    if inputs.ndim == 4:
        similarity = tuple(ssim(inputs, found, data_range=data_range).tolist())
    noise_ratio = tuple(psnr(inputs, found, data_range=data_range).tolist())
    recovered = None if labels is None else label_recovery(true_labels, labels)
    return Row(name, similarity, noise_ratio, recovered, 0.0)
