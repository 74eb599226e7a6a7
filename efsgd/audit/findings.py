"""What attacks found: a table, pictures, and what they cannot show."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from efsgd.audit.objective import Bounds
from efsgd.audit.pictures import save_images
from efsgd.audit.scores import Separation, label_recovery, psnr, ssim

WARNING = """\
These are the attacks of this package, with few starts and iterations. That none of them found
anything is no proof that nothing can be found: a better attack may. What comes no closer than the
blind guess shows nothing of the batch. Differential privacy alone bounds what any attack can find.
"""
GATHERED = "Averages: none. Workers are sent each other's payloads, and no means."
BLIND = "blind guess"


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

    @classmethod
    def of(
        cls,
        attack: str,
        batch: tuple[Tensor, Tensor],
        found: Tensor,
        bounds: Bounds,
        labels: Tensor | None = None,
    ) -> Self:
        """Scores what was found of a batch, in its order."""
        inputs, true_labels = batch
        data_range = 1.0 if bounds is None else bounds[1] - bounds[0]
        similarity = None
        if inputs.ndim == 4:
            similarity = tuple(ssim(inputs, found, data_range=data_range).tolist())
        noise_ratio = tuple(psnr(inputs, found, data_range=data_range).tolist())
        recovered = None if labels is None else label_recovery(true_labels, labels)
        return cls(attack, similarity, noise_ratio, recovered, 0.0)


@dataclass(frozen=True)
class Report:
    """What the attacks found; `str()` of it is a table.

    Attributes:
        rows: the blind guess; what is read from a linear first layer, if there is one; and then one
            for each attack.
        originals: the batch, [samples, ...]; of averages the batches of all workers, one after the
            other.
        found: by name, what each has made of it, in the order of the originals.
        message_bytes: the size of what one worker has sent, or of the averages, in a step.
        membership: how well the batch is told from `others`, by products of gradients with the
            message; None if there are none.
        workers: how many have taken the step together.
        averages: what the averages alone give away of the batches of all workers, the threat model
            of an observer who sees no messages. None where one worker is alone, whose messages are
            the averages, and where payloads are gathered, so that nothing is averaged.
    """

    rows: tuple[Row, ...]
    originals: Tensor
    found: Mapping[str, Tensor]
    message_bytes: int
    membership: Separation | None
    workers: int = 1
    averages: "Report | None" = None

    @property
    def blind(self) -> Row:
        """What is found without any message."""
        return self.rows[0]

    @property
    def best(self) -> Row:
        """The attack that came closest; only who has the originals knows which it is."""
        return max(self.rows[1:] or self.rows, key=lambda row: row.score)

    def __str__(self) -> str:
        lines = [*self._table(), "", f"Sent: {self.message_bytes:,} bytes.", ""]
        if self.workers > 1:
            lines = [f"A worker's messages, on its {_count(self.originals)}:", "", *lines]
            if self.averages is None:
                lines += [GATHERED, ""]
            else:
                lines += [
                    f"Averages alone, of {self.workers} workers, on their "
                    f"{_count(self.averages.originals)}:",
                    "",
                    *self.averages._table(),
                    "",
                ]
        return "\n".join([*lines, WARNING.rstrip()])

    def _table(self) -> Iterator[str]:
        width = max(len(row.attack) for row in self.rows)
        yield f"{'attack':<{width}}   SSIM   PSNR (dB)   labels   seconds"
        for row in self.rows:
            similarity = "    –" if row.ssim is None else f"{sum(row.ssim) / len(row.ssim):5.2f}"
            notes = "  (best)" if row is self.best else ""
            notes += "" if row.is_complete else "  (out of time)"
            labels = "     –" if row.labels is None else f"{row.labels:6.0%}"
            yield (
                f"{row.attack:<{width}}  {similarity}   {sum(row.psnr) / len(row.psnr):9.1f}   "
                f"{labels}   {row.seconds:7.1f}{notes}"
            )
        if (found := self.membership) is not None:
            low, high = found.auc_interval
            yield ""
            yield (
                f"Told from {found.others} others by the message: AUC {found.auc:.2f} "
                f"({low:.2f} to {high:.2f}), guessing 0.50."
            )

    def to_dict(self) -> dict[str, Any]:
        """All scores, of what JSON has."""
        membership = None if self.membership is None else asdict(self.membership)
        return {
            "rows": [asdict(row) for row in self.rows],
            "best": self.best.attack,
            "message_bytes": self.message_bytes,
            "membership": membership,
            "workers": self.workers,
            "averages": None if self.averages is None else self.averages.to_dict(),
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


def _count(samples: Tensor) -> str:
    return "sample" if len(samples) == 1 else f"{len(samples)} samples"
