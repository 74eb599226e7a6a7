"""Makes the page of the documentation and its plots from the results.

    python -m benchmarks.report

The page holds what docs/benchmarks/*.json say and nothing else: it is not to be edited.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import page, plots
from benchmarks.growth import link_of
from benchmarks.workloads import WORKLOADS

DOCS = Path(__file__).parents[1] / "docs"
Result = Mapping[str, Any]

INTRODUCTION = """\
<!-- Made by `make bench-docs` from the files in docs/benchmarks. Changes here will be lost. -->

# Benchmarks

What a step costs, in time and memory, beside `torch.optim.SGD` and beside other implementations of
PowerSGD. `make bench` measures all of it again: as root, on Linux, which takes long. Each table
names the command that makes it by itself.

## How it is measured

* **Gradients cost nothing.** The module's backward pass hands autograd tensors that were filled
  beforehand, others on each worker. Hooks of autograd see them come as from any model.
* **Exchange + update** is the time of a whole step less that of forward and backward alone, in the
  same round. A step of several workers lasts until the last of them has done it.
* **Rounds.** Every round steps each candidate once, in an order that is shuffled anew. Ratios are
  taken within a round, so that what slows down the machine for a while does not change them.
* **Figures** are medians, with the quartiles in parentheses. The first rounds are not counted.
* **Memory** comes from the C library as it gives it by default. What makes large tensors anew in
  each step then also pays for the system's clearing them. Where the command begins with
  `MALLOC_MMAP_THRESHOLD_`, the library kept what it once had; where it begins with
  `THP_MEM_ALLOC_ENABLE`, torch asked for pages of 2 MB.
* **The optimizers** have momentum 0.9; SGD, also below each peer, is
  `torch.optim.SGD(..., nesterov=True, foreach=True)` where nothing else is said. efsgd with the
  paper's momentum has `nesterov=False`.

## The peers

* **SGD under DDP** is `DistributedDataParallel` as it comes, with several buckets that are sent
  while others are still to come.
* **PyTorch's hook** is `powerSGD_hook`, with a state of `min_compression_rate=1`, which compresses
  the same tensors as efsgd, and `start_powerSGD_iter=2`, the least that it takes; *batched* is with
  `batch_tensors_with_same_shape=True`. DDP is given a single bucket: with several, as is its
  default, the hook stands still at the first step that it compresses, under gloo in torch 2.13.
* **epfml/powersgd** is the authors' package from its repository, with `num_iters_per_step=2`,
  `min_compression_rate=1`, and no steps without compression. Its package on PyPI is empty, so it is
  measured where `make bench EPFML=DIR` names a clone.
"""

NETWORK = """\
## On a slow network

Each worker is a process with one thread in a network namespace of its own. A bridge joins them, and
`tc` limits each link in both directions. The transport is gloo.
"""

#: What the plot over the rates of the network shows, of the candidates and their ranks.
OVER_RATES = ("ddp-sgd", "hook", "epfml", "efsgd")
OVER_RATES_RANK = 4

LOCAL = """\
## On one worker

Nothing is sent here: this is what compression costs where the network is infinitely fast. *A copy*
moves as many bytes as the parameters have; every pass over parameters, momenta, errors or gradients
takes about as long. The peers that need a process group have one of a single worker.
"""

MEMORY = """\
## Memory

The most that is allocated at once beyond parameters and gradients, by construction and five steps
on one worker, and what of it stays between steps; in multiples of the parameters' bytes. On the CPU
these are the tensors that torch's profiler reports; the peak of the resident memory of another
process is there to confirm it.
"""

WORKERS = """\
## Growth with the number of workers

The two all-reduces of a step, without any computation. gloo's all-reduce is a ring: in
$2 (W - 1)$ rounds each worker sends $1/W$ of the buffer to its neighbor, in two segments, of which
one is on its way while the other is waited for. With a latency $α$ of each segment and bandwidth
$B$, $S$ bytes take

$$ T(S) = 2 (W - 1) \\max\\left( \\frac{S}{W B},\\; α + \\frac{S}{2 W B} \\right) . $$

So latency grows with the number of workers, and the time of the bytes hardly does: it stays below
$2 S / B$. $α$ and $B$ are found from a small and a large all-reduce in the same rounds. All workers
share the machine's cores, and wait for them: with many workers that is most of $α$.
"""

RANKS = """\
## Growth with the rank

What is sent grows in proportion to the rank, orthogonalization with its square. Orthogonalization
is measured by itself, on as many matrices of the same shapes.
"""


KERNELS = """\
## Choices within a step

Single operations on one matrix, every way that they could be done, medians on one thread. The way
that efsgd takes is in bold. *Householder* is the only way to orthogonalize that is safe for columns
which are zero or depend on each other: Gram-Schmidt, as other implementations have it, turns them
into NaN or loses them for ever, and the Cholesky decomposition fails. *Fused* is what
torch.compile makes of them, as `compile=True` has it on accelerators; measured here on a CPU, where
it has since used [native passes](speed.md).
"""


def load(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, workloads and rates in their usual order."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    known = list(WORKLOADS)
    return sorted(found, key=lambda r: known.index(r["settings"].get("workload", known[0])))


def render(results: Sequence[Result], images: Path) -> str:
    """The page; its plots are written to `images`, which lies beside it.

    Args:
        results: of `load`. A section for which there is none is left out.
        images: a folder.
    """
    parts = [
        INTRODUCTION,
        *_steps("network", NETWORK + _over_rates(results, images), results, images),
    ]
    parts += _steps("local", LOCAL, results, images)
    memory = [r for r in results if r["benchmark"] == "memory"]
    if memory:
        panels = {_workload(r): page.memory_rows(r) for r in memory}
        plots.plot_memory(images / "benchmark-memory.png", panels)
        parts += [MEMORY, _image(images, "benchmark-memory", "Peaks of memory")]
        parts += map(page.memory_table, memory)
    parts += _growth(results, images)
    kernels = [r for r in results if r["benchmark"] == "kernels"]
    return "\n".join([*parts, *([KERNELS] if kernels else []), *map(page.kernels_tables, kernels)])


def _steps(name: str, text: str, results: Sequence[Result], images: Path) -> list[str]:
    """A section on times of steps: a plot for each workload, a table for each result."""
    chosen = [r for r in results if r["benchmark"] == name]
    baseline = {"network": "ddp-sgd", "local": "sgd-foreach"}[name]
    to_table: Callable[[Result], str] = {
        "network": page.network_table,
        "local": page.local_table,
    }[name]
    parts = [text] if chosen else []
    for workload in WORKLOADS:
        same = [r for r in chosen if r["settings"]["workload"] == workload]
        if same:
            panels = {page.panel_title(r): page.rows_of(r, "floor", baseline) for r in same}
            image = f"benchmark-{name}-{workload}"
            plots.plot_times(images / f"{image}.png", panels)
            parts += [_image(images, image, f"Time per step, {WORKLOADS[workload]}")]
            parts += map(to_table, same)
    reasons = {reason for r in chosen for reason in r["settings"]["left_out"]}
    if reasons:
        parts.append("Left out: " + " ".join(sorted(reasons)) + "\n")
    return parts


def _over_rates(results: Sequence[Result], images: Path) -> str:
    """The plot of one model on each network, where two workers were measured."""
    panels = {}
    for result in results:
        settings = result["settings"]
        is_shown = result["benchmark"] == "network" and settings["workload"] == "resnet18"
        if is_shown and settings["workers"] == 2:
            rows = [
                (candidate, row)
                for candidate, row in page.rows_of(result, "floor", "ddp-sgd")
                if candidate.kind in OVER_RATES
                and candidate.rank in (None, OVER_RATES_RANK)
                and candidate.form != "paper"
                and not candidate.compiled
            ]
            panels[page.links_of(result)] = sorted(
                rows, key=lambda each: OVER_RATES.index(each[0].kind)
            )
    if not panels:
        return ""
    name = "benchmark-rates"
    plots.plot_rates(images / f"{name}.png", panels)
    text = f"{WORKLOADS['resnet18']} at rank {OVER_RATES_RANK}, over the rate of the links"
    return f"\n{_image(images, name, text)}"


def _growth(results: Sequence[Result], images: Path) -> list[str]:
    chosen = [r for r in results if r["benchmark"] == "growth"]
    workers = [r for r in chosen if r["settings"]["what"] == "workers"]
    ranks = [r for r in chosen if r["settings"]["what"] == "ranks"]
    parts = []
    for result in workers:
        plots.plot_workers(images / "benchmark-workers.png", result["launches"])
        parts += [WORKERS, _image(images, "benchmark-workers", "All-reduces over workers")]
        parts.append(page.workers_table(result))
    if ranks:
        wire = link_of(workers[0]["launches"][0]) if workers else None
        panels = {_workload(r): r["ranks"] for r in ranks}
        plots.plot_ranks(images / "benchmark-ranks.png", panels, wire)
        parts += [RANKS, _image(images, "benchmark-ranks", "What a step is made of")]
        if wire is not None:
            rate = workers[0]["settings"]["rate"]
            parts.append(
                f"The all-reduces in the plot are those of {wire.workers} workers at {rate}, by "
                f"the model above.\n"
            )
        parts += map(page.ranks_table, ranks)
    return parts


def _workload(result: Result) -> str:
    return WORKLOADS[result["settings"]["workload"]]


def _image(images: Path, name: str, text: str) -> str:
    return f"![{text}]({images.name}/{name}.png)\n"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=DOCS / "benchmarks", metavar="DIR")
    parser.add_argument("--page", type=Path, default=DOCS / "benchmarks.md", metavar="FILE")
    parser.add_argument("--images", type=Path, default=DOCS / "images", metavar="DIR")
    arguments = parser.parse_args()
    arguments.page.write_text(render(load(arguments.results), arguments.images))


if __name__ == "__main__":
    main()
