"""What do messages give away? Gradient inversion against each way to send a gradient.

    python examples/audit.py

An optimizer of the package takes a step with a few images, and what it hands to the collectives is
attacked: by a naive attacker, who takes the decompressed gradient for the gradient, and by one who
compares what was really sent. The table has the similarity (SSIM) of what either makes of it, the
best of several attacks, beside a blind guess: the mean of other images. The last column says how
well the images are told from others by the message (AUC). A picture shows originals and what was
found; results (JSON) and the picture are saved.

`--full` has all methods, larger batches, convolutions, digits, several steps with error feedback,
noise, and membership, three times each, with standard deviations. `--parts` names some of them.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from efsgd.audit import Report
from efsgd.audit.findings import BLIND, WARNING
from efsgd.audit.pictures import save_images
from examples.audit_cases import COMPRESSORS, Case, audit
from examples.audit_membership import membership_table, train_and_score
from examples.reporting import markdown, save_json

FEW = ("SGD", "Rank 1", "Top-K 10 %", "Top-K 1 %", "Sign")
THROUGH_CONVOLUTIONS = ("SGD", "Rank 1", "Rank 4", "LQ-SGD, rank 1", "Top-K 1 %", "Sign")
NOISES = (0.0, 0.001, 0.01, 0.1)
Results = Mapping[Case, Sequence[Report]]


def parts(arguments: argparse.Namespace) -> dict[str, list[Case]]:
    """What the command line asks for, by title."""
    first = {"Faces, MLP, 1 image": [Case("faces", "MLP", 1, method) for method in FEW]}
    if not (arguments.full or arguments.parts):
        found = {"Faces, MLP, 1 image, first table": first["Faces, MLP, 1 image"]}
    else:
        found = {
            "Faces, MLP, 1 image": [Case("faces", "MLP", 1, method) for method in COMPRESSORS],
            "Faces, convolutions, 1 image": [
                Case("faces", "convolutions", 1, method, iterations=160)
                for method in THROUGH_CONVOLUTIONS
            ],
            **{
                f"Faces, MLP, {size} images": [
                    Case("faces", "MLP", size, method) for method in COMPRESSORS
                ]
                for size in (4, 8)
            },
            "Faces, MLP, 8 images, several steps": [
                Case("faces", "MLP", 8, method, steps=steps)
                for method in ("Rank 1", "Top-K 1 %")
                for steps in (1, 4, 16)
            ],
            "Faces, MLP, 4 workers of 2 images": [
                Case("faces", "MLP", 2, method, workers=4)
                for method in ("SGD", "Rank 1", "Rank 2", "Rank 4", "Rank 8")
            ],
            "Faces, MLP, 1 image, noise": [
                Case("faces", "MLP", 1, method, noise_multiplier=noise)
                for method in ("SGD", "Rank 1")
                for noise in NOISES
            ],
            "Digits, MLP, 1 image": [Case("digits", "MLP", 1, method) for method in FEW],
            "Digits, MLP, 4 images": [Case("digits", "MLP", 4, method) for method in FEW],
        }
    changes = {
        name: value
        for name in ("iterations", "restarts")
        if (value := getattr(arguments, name)) is not None
    }
    return {title: [replace(case, **changes) for case in cases] for title, cases in found.items()}


def scores(reports: Sequence[Report], kind: str) -> list[float]:
    """Of each report the best score of an attack of this kind; "read" are those without a search.

    An attacker who knows the compressor can do all that a naive one can.
    """
    best = []
    for found in reports:
        kinds = [row for row in found.rows if row.attack == kind or row.attack.startswith(kind)]
        best.append(max((row.score for row in kinds), default=float("nan")))
    return best


def named(results: Results) -> dict[str, Sequence[Report]]:
    """By what was sent; of several workers averages are a row of their own."""
    found: dict[str, Sequence[Report]] = {}
    for case, reports in results.items():
        words = [case.method]
        words += [f"σ = {case.noise_multiplier:g}"] if case.noise_multiplier is not None else []
        words += [f"{case.steps} steps"] if case.steps > 1 else []
        name = ", ".join(words)
        found[name] = reports
        averages = [each.averages for each in reports if each.averages is not None]
        if averages:
            found[f"{name}, averages"] = averages
    return found


def spread(values: Sequence[float]) -> str:
    """The mean, with a standard deviation where there is one."""
    mean = f"{statistics.mean(values):.2f}"
    return mean + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def ssim_table(title: str, results: Results) -> Table:
    """A row for each case."""
    blind = scores([found for each in results.values() for found in each], BLIND)
    heading = f"{title}: SSIM, of a blind guess {statistics.mean(blind):.2f}"
    table = Table(title=heading, title_justify="left")
    table.add_column("Sent")
    for column in ("Bytes", "Naive", "Adaptive", "Read", "Best", "PSNR (dB)", "Told apart (AUC)"):
        table.add_column(column, justify="right")
    for name, reports in named(results).items():
        by_kind = {
            kind: scores(reports, kind) for kind in ("naive", "adaptive", "singular", "by biases")
        }
        read = [
            max((v for v in pair if v == v), default=float("nan"))
            for pair in zip(by_kind["singular"], by_kind["by biases"], strict=True)
        ]
        told = [found.membership.auc for found in reports if found.membership is not None]
        best = [found.best for found in reports]
        table.add_row(
            name,
            f"{reports[0].message_bytes:,}",
            *(
                "" if values[0] != values[0] else spread(values)
                for values in (by_kind["naive"], by_kind["adaptive"], read)
            ),
            spread([row.score for row in best]),
            f"{statistics.mean(value for row in best for value in row.psnr):.1f}",
            spread(told),
        )
    return table


def picture(path: Path, results: Results) -> None:
    """Originals, the blind guess, and below them the best of the naive and of all attacks."""
    rows: dict[str, Tensor] = {}
    for name, reports in named(results).items():
        originals = torch.cat([each.originals for each in reports])[:8]
        rows.setdefault("original", originals)
        rows.setdefault(BLIND, torch.cat([each.found[BLIND] for each in reports])[:8])
        if not torch.equal(originals, rows["original"]):  # averages are of all workers' images
            rows[f"original, {name}"] = originals
        kinds = {"naive": f"{name}, naive", "": name if name == "SGD" else f"{name}, best"}
        for kind, label in kinds.items():
            best = [
                max(
                    (row for row in each.rows[1:] if row.attack.startswith(kind)),
                    key=lambda row: row.score,
                    default=None,
                )
                for each in reports
            ]
            found = [
                each.found[row.attack]
                for each, row in zip(reports, best, strict=True)
                if row is not None
            ]
            if found:
                rows[label] = torch.cat(found)[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_images(path, rows)


def run(cases: Sequence[Case], repeats: int, title: str, processes: int) -> Results:
    """Audits each case with several sets of images."""
    all_cases = [replace(case, number=number) for case in cases for number in range(repeats)]
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        each: Iterable[Report] = map(audit, all_cases)
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            each = pool.imap(audit, all_cases)
        found = list(
            track(each, title, len(all_cases), console=console, transient=True,
                  disable=not console.is_terminal)
        )  # fmt: skip
    return {
        case: found[number * repeats : (number + 1) * repeats] for number, case in enumerate(cases)
    }


def file_name(title: str) -> str:
    return title.lower().replace(", ", "-").replace(" ", "-")


def to_json(results: Results, seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "cases": [
            {**asdict(case), "reports": [each.to_dict() for each in reports]}
            for case, reports in results.items()
        ],
    }


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or these words of one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all tables, three times each")
    parser.add_argument("--parts", nargs="+", metavar="TITLE", help="some of the tables of --full")
    parser.add_argument("--repeats", type=int, help="sets of images (default: 3)", default=3)
    parser.add_argument("--iterations", type=int, help="of each start of an attack")
    parser.add_argument("--restarts", type=int, help="starts of each attack")
    parser.add_argument("--processes", type=int, default=2, help="attack at once (default: 2)")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="directory for results"
    )
    return parser.parse_args(words)


def main(arguments: argparse.Namespace) -> None:
    """Attacks, and shows and saves what came of it, table by table."""
    console = Console(width=None if Console().is_terminal else 110)

    def show(table: Table) -> None:
        if arguments.markdown:
            print(markdown(table), flush=True)
        else:
            console.print(table, end="\n\n")

    for title, cases in parts(arguments).items():
        if arguments.parts and title not in arguments.parts:
            continue
        started = time.monotonic()
        results = run(cases, arguments.repeats, title, arguments.processes)
        show(ssim_table(title, results))
        path = arguments.output / f"audit-{file_name(title)}"
        picture(path.with_suffix(".png"), results)
        save_json(path.with_suffix(".json"), to_json(results, time.monotonic() - started))
        console.print(f"{time.monotonic() - started:.0f} s; saved {path}.json and {path}.png\n")
    if arguments.full or "Membership" in (arguments.parts or ()):
        outcomes = [
            outcome for seed in range(arguments.repeats) for outcome in train_and_score(seed)
        ]
        show(membership_table(outcomes))
        save_json(arguments.output / "audit-membership.json", {"runs": outcomes})
    console.print(WARNING)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    main(parse_arguments())
