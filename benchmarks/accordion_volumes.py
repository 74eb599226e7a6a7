"""What PowerSGD sends in the runs of the Accordion paper (arXiv 2010.16248) at fixed ranks.

Counted from the buffers of steps; `benchmarks.volumes` puts them on its page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.accordion_networks import shapes_of_network
from benchmarks.counting import bytes_of_steps
from benchmarks.workloads import made_gradients
from efsgd import PowerSGD

#: Of one worker of 4, of 50,000 images in batches of 128.
STEPS_PER_EPOCH = 98


@dataclass(frozen=True)
class Run:
    """One training run at a fixed rank.

    Attributes:
        network: a key of `NETWORKS`.
        classes: of CIFAR-10 or CIFAR-100.
        rank: of PowerSGD.
        published: what the paper prints for it, in million floats.
        epochs: its length.
    """

    network: str
    classes: int
    rank: int
    published: float
    epochs: int = 300

    @property
    def label(self) -> str:
        """Its network and its data."""
        return f"{self.network} on CIFAR-{self.classes}"


# The authors' code takes 300 epochs. The 249 are inferred: they alone give both figures.
RUNS = (
    Run("ResNet-18", 10, 1, 1350.4),
    Run("ResNet-18", 10, 2, 2418.4),
    Run("VGG-19bn", 10, 1, 2074.9),
    Run("VGG-19bn", 10, 4, 6752.0),
    Run("SENet", 10, 1, 1392.6, epochs=249),
    Run("SENet", 10, 4, 4361.3, epochs=249),
    Run("ResNet-18", 100, 1, 1355.7),
    Run("ResNet-18", 100, 2, 2426.3),
    Run("DenseNet", 100, 1, 2155.6),
    Run("DenseNet", 100, 2, 3387.4),
    Run("SENet", 100, 1, 1683.1),
    Run("SENet", 100, 2, 2878.1),
)


def floats_per_step(run: Run, min_compression_rate: float = 0.0) -> int:
    """The float32 numbers that one worker sends in a step, without control words.

    Args:
        run: which network, at which rank.
        min_compression_rate: of `PowerSGD`. 0.0 compresses every matrix, as the paper's code does.
    """
    gradients = made_gradients(shapes_of_network(run.network, run.classes))
    (sent,) = bytes_of_steps(PowerSGD(run.rank, min_compression_rate), gradients)
    return sent // 4


def million_floats(run: Run, floats: int) -> float:
    """What one worker sends in a whole run.

    Args:
        run: how many epochs.
        floats: sent in a step.
    """
    return floats * STEPS_PER_EPOCH * run.epochs / 1e6


def section(floats: Sequence[int]) -> str:
    """The section of the page.

    Args:
        floats: sent in a step of each of `RUNS`.
    """
    lines = [
        "## Accordion's networks",
        "",
        "PowerSGD at the fixed ranks of the Accordion paper (arXiv 2010.16248, Tables 1 and 2).",
        f"There are 4 workers with batches of 128 images, {STEPS_PER_EPOCH} steps in an epoch, and",
        "300 epochs in a run. The paper's figures are partly rounded and partly cut off. Both",
        "figures of SENet on CIFAR-10 are those of 249 epochs, which is inferred from them.",
        "",
        "Every matrix is compressed here, as in the paper's code (`min_compression_rate=0.0`). By",
        "default, SENet at rank 4 sends 64 floats fewer in a step, since four of its matrices are",
        "so small that their factors take more. All other rows are the same.",
        "",
        "| network | rank | floats per step | epochs | million floats in a run | in the paper |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run, count in zip(RUNS, floats, strict=True):
        total = f"{million_floats(run, count):,.3f} | {run.published:,.1f}"
        lines.append(f"| {run.label} | {run.rank} | {count:,} | {run.epochs} | {total} |")
    return "\n".join(lines) + "\n"
