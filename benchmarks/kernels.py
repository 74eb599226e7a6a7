"""The choices within a step: one operation at a time, every way it could be done.

    python -m benchmarks.kernels

efsgd takes, for each shape and rank, the way that its rule names; this shows what the rule costs
where another way would be faster. The other ways to orthogonalize are not safe for columns that are
zero or depend on each other.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import describe_machine, show, write_results
from benchmarks.timing import Quartiles, Runner, clock_for, measure
from efsgd.algorithms.error_feedback import descend_
from efsgd.algorithms.low_rank.fusion import Fusion
from efsgd.algorithms.low_rank.products import FLOATS_AT_ONCE, subtract_
from efsgd.algorithms.powersgd import orthogonalize

#: [n, m] of layers of CIFAR ResNet18, the WikiText-2 LSTM and GPT-2 small.
SHAPES = ((64, 576), (512, 4608), (28869, 650), (768, 3072))
RANKS = (1, 2, 4, 8, 32)
WARM_UP = 3


def gram_schmidt(matrix: Tensor) -> Tensor:
    """Modified Gram-Schmidt column by column, as in the paper's research code: [n, r]."""
    matrix = matrix.clone()
    for column in range(matrix.shape[1]):
        own, rest = matrix[:, column : column + 1], matrix[:, column + 1 :]
        own.div_(own.norm() + 1e-8)
        rest.sub_(own @ (own.mT @ rest))
    return matrix


def cholesky(matrix: Tensor) -> Tensor:
    """Cholesky QR, twice for accuracy: [n, r]."""
    for _ in range(2):
        factor = torch.linalg.cholesky(matrix.mT @ matrix)
        matrix = torch.linalg.solve_triangular(factor, matrix.mT, upper=False).mT
    return matrix


def kernels(n: int, m: int, r: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Ways to do each operation on one matrix, by the operation's name and the way's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    M, Q, P = normal(n, m), normal(r, m), normal(n, r)
    by_rows, by_columns = torch.empty(n, r), torch.empty(r, n).mT
    momentum, parameter = torch.zeros(n, m), torch.zeros(n, m)
    P_hat, fusion = torch.linalg.qr(P)[0], Fusion()
    rows = max(1, FLOATS_AT_ONCE // m)
    scratch = torch.empty(min(rows, n), m)
    numbers = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "maximize": False}

    def in_pieces(function: Callable[..., None], operands: list[Tensor], **options: Any) -> None:
        for top in range(0, n, rows):
            some = slice(top, min(top + rows, n))
            values = torch.mm(P_hat[some], Q, out=scratch[: some.stop - some.start])
            function([values], *([operand[some]] for operand in operands), **options)

    def directly() -> None:
        few = max(1, FLOATS_AT_ONCE // 8 // m)
        for top in range(0, n, few):
            M[top : top + few].addmm_(P_hat[top : top + few], Q, alpha=-1)

    found: dict[str, dict[str, Callable[[], object]]] = {
        "P = M Q": {
            "by rows": lambda: torch.mm(M, Q.mT, out=by_rows),
            "by columns": lambda: torch.mm(M, Q.mT, out=by_columns),
        },
        "orthogonalize": {
            "Householder": lambda: orthogonalize(P),
            "Gram-Schmidt": lambda: gram_schmidt(P),
            "Cholesky, twice": lambda: cholesky(P),
        },
        "new errors": {"directly": directly, "in pieces": lambda: in_pieces(subtract_, [M])},
        "update": {"in pieces": lambda: in_pieces(descend_, [parameter, momentum], **numbers)},
    }
    if Fusion.gains(n, m, r, "cpu"):
        found["new errors"]["fused"] = lambda: fusion.apply_(subtract_, P_hat, Q, [M], {})
        found["update"]["fused"] = lambda: fusion.apply_(
            descend_, P_hat, Q, [parameter, momentum], numbers
        )
    return found


def taken(operation: str, n: int, m: int, r: int) -> tuple[str, ...]:
    """The way that efsgd takes; for the last two operations without and with `compile=True`.

    Example:
        >>> taken("P = M Q", 64, 576, 4), taken("update", 64, 576, 4)
        (('by columns',), ('in pieces',))
    """
    if operation == "P = M Q":
        return ("by columns" if r >= 4 and m * 4 % 32 == 0 else "by rows",)
    if operation == "orthogonalize":
        return ("Householder",)
    if operation == "new errors" and m * 4 % 32 == 0:
        return ("directly",)
    return ("in pieces", "fused") if Fusion.gains(n, m, r, "cpu") else ("in pieces",)


@torch.no_grad()
def measured(rounds: int) -> list[dict[str, Any]]:
    """Samples of every way, for each operation, shape and rank."""
    found = []
    for n, m in SHAPES:
        for r in RANKS:
            for operation, ways in kernels(n, m, r).items():
                runners = {name: Runner(way) for name, way in ways.items()}
                clock = clock_for(torch.device("cpu"))
                samples = measure(runners, rounds, warm_up=WARM_UP, clock=clock)
                found.append(
                    {"operation": operation, "shape": [n, m], "rank": r, "samples": samples}
                )
    return found


def main(command_line: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=25, help="measured calls of each way")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(arguments.threads)
    found = measured(arguments.rounds)
    rows = []
    for row in found:
        medians = {way: Quartiles.of(s).median * 1e3 for way, s in row["samples"].items()}
        text = ", ".join(f"{way} {ms:.3f}" for way, ms in medians.items())
        rows.append((f"{row['operation']}, {row['shape']}, rank {row['rank']}", text))
    show("one matrix, one thread, ms", ("", "medians"), rows)
    settings = {"rounds": arguments.rounds}
    machine = describe_machine(arguments.threads)
    write_results(arguments.output, "kernels", machine, settings, {"operations": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
