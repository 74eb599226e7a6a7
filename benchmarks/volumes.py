"""What every compressor sends: counted from the buffers of steps of models of two papers.

    python -m benchmarks.volumes --output docs/volumes.md

Control words are left out: one number for each parameter and each worker.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import accordion_volumes
from benchmarks.counting import bytes_of_steps
from benchmarks.workloads import made_gradients, shapes_of
from efsgd import (
    LQSGD,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    SpectralAtomo,
    TopK,
)

MIB = 2**20
#: Of one worker of 16, as in the paper.
STEPS_PER_EPOCH = {"resnet18": 24, "lstm": 70}
NAMES = {"resnet18": "ResNet18 on CIFAR-10", "lstm": "LSTM on WikiText-2"}


@dataclass(frozen=True)
class Row:
    """One way to send a model's gradients.

    Attributes:
        label: of the row.
        workload: the model.
        compressor: None is `Signum`, an optimizer of its own.
        period: after so many steps of compression all repeats.
        odd: steps of the period that are not like the second.
        published: what a paper prints for it: megabytes (2^20 bytes) per epoch, or a ratio.
    """

    label: str
    workload: str
    compressor: Any
    published: str = ""
    period: int = 1
    odd: tuple[int, ...] = ()


def _rows() -> Iterator[Row]:
    yield Row("SGD", "resnet18", Identity(), "1023 MB")
    for rank, published in ((1, "4 MB, 243x"), (2, "8 MB, 136x"), (4, "14 MB, 72x"), (7, "24 MB")):
        yield Row(f"PowerSGD, rank {rank}", "resnet18", PowerSGD(rank), published)
    for rank, published in ((7, "24 MB"), (2, "8 MB")):
        yield Row(f"Random Block, rank {rank}'s", "resnet18", RandomBlock(rank=rank), published)
        yield Row(f"Random K, rank {rank}'s", "resnet18", RandomK(rank=rank), published)
    yield Row("Sign+Norm", "resnet18", SignNorm(), "32 MB")
    for part, published in ((32, "32 MB"), (136, "8 MB"), (244, "")):
        yield Row(f"Top K, 1/{part}", "resnet18", TopK.from_compression(1 / part), published)
    for rank, published in ((2, "113 MB"), (1, "")):
        yield Row(f"Spectral Atomo, rank {rank}", "resnet18", SpectralAtomo(rank), published)
    yield Row("Signum", "resnet18", None, "32 MB")
    for rank, published in ((1, "3 MB"), (2, "4 MB")):
        half = PowerSGD(rank, alternating=True)
        label = f"PowerSGD in half steps, rank {rank}"
        yield Row(label, "resnet18", half, published, period=2, odd=(0,))
    for bits in (8, 4):
        for rank in (1, 2, 4, 7):
            label = f"LQ-SGD, rank {rank}, {bits} bits"
            yield Row(label, "resnet18", LQSGD(rank, bits=bits))
    every = [(1, each) for each in (50, 100, 200, 500, 1000)]
    for rank, period in [*every, (2, 50), (2, 200), (2, 1000), (4, 50), (4, 200), (4, 1000)]:
        # How the subspace is found makes no difference here.
        plus = PowerSGDPlus(rank, refresh_every=period, svd="randomized")
        label = f"PowerSGD+, rank {rank}, every {period} steps"
        yield Row(label, "resnet18", plus, period=period, odd=(0,))
    yield Row("SGD", "lstm", Identity(), "7730 MB")
    for rank, published in ((1, "25 MB, 310x"), (2, "38 MB, 203x"), (4, "64 MB, 120x")):
        yield Row(f"PowerSGD, rank {rank}", "lstm", PowerSGD(rank), published)
    yield Row("Signum", "lstm", None, "242 MB")


ROWS = tuple(_rows())


@functools.cache
def _gradients(workload: str) -> list[torch.Tensor]:
    return made_gradients(shapes_of(workload))


def counted(row: Row) -> float:
    """The bytes that one worker sends in a step, in the mean over a period.

    Every step that is unlike the others is taken, and one that stands for those.
    """
    steps = max(row.odd, default=-1) + 2
    sent = bytes_of_steps(row.compressor, _gradients(row.workload), steps)
    odd = sum(sent[step] for step in row.odd)
    return (odd + (row.period - len(row.odd)) * sent[-1]) / row.period


def markdown(sent: Sequence[float]) -> str:
    """The part of the page that is about the models of the PowerSGD paper.

    Args:
        sent: bytes of each of `ROWS`.
    """
    lines = [
        "# Volumes",
        "",
        "What one worker sends in a step, counted from the buffers that were handed to collectives",
        "in steps of the parameters of models of two papers, by",
        "",
        "    python -m benchmarks.volumes --output docs/volumes.md",
        "",
        "Gradients are random there: no size depends on them. Control words are left out: one",
        "number for each parameter and each worker.",
        "",
        "For the two models of the PowerSGD paper, a megabyte is 2^20 bytes; an epoch has 24 steps",
        "of each of 16 workers (ResNet18), or 70 (LSTM), as there. The last column is what that",
        "paper prints (arXiv 1905.13727, Tables 3, 4, 6 and 7). Where not all steps are alike, the",
        "mean over a period is given.",
    ]
    for workload, steps in STEPS_PER_EPOCH.items():
        numel = sum(gradient.numel() for gradient in _gradients(workload))
        lines += ["", f"## {NAMES[workload]}", "", f"{numel:,} parameters.", ""]
        lines += ["| | bytes per step | MB per epoch | ratio | in the paper |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        for row, count in zip(ROWS, sent, strict=True):
            if row.workload == workload:
                epoch, ratio = steps * count / MIB, 4 * numel / count
                figures = f"{count:,.0f} | {epoch:,.3f} | {ratio:,.1f}x | {row.published}"
                lines.append(f"| {row.label} | {figures} |")
    return "\n".join(lines) + "\n"


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.volumes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page there")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(1)
    floats = [accordion_volumes.floats_per_step(run) for run in accordion_volumes.RUNS]
    page = markdown([counted(row) for row in ROWS]) + "\n" + accordion_volumes.section(floats)
    if arguments.output is None:
        print(page, end="")
    else:
        arguments.output.write_text(page)


if __name__ == "__main__":
    main()
