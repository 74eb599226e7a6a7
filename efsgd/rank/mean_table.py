"""A table that each worker computes from what it has, in the mean over the workers."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from efsgd.collectives import AllReduceMean, Exchange

__all__ = ["mean_table"]


def mean_table(
    make: Callable[[], Iterable[Sequence[float]]],
    rows: int,
    columns: int,
    device: torch.device,
    purpose: str,
) -> Exchange[list[list[float]]]:
    """The mean of the workers' tables, the same on all of them.

    Args:
        make: computes this worker's.
        rows: of the table.
        columns: of the table.
        device: where buffers may live.
        purpose: what the table has, for messages.

    Raises:
        Exception: what `make` raises on this worker. The others, who are waiting for its table,
            have NaN in place of numbers.
    """
    table, obstacle = [[math.nan] * columns] * rows, None
    try:
        table = [list(row) for row in make()]
    except Exception as error:  # the other workers are waiting, so it is raised afterwards
        obstacle = error
    own = torch.tensor(table, dtype=torch.float64, device=device)
    mean = yield AllReduceMean(own, purpose)
    if obstacle is not None:
        raise obstacle
    found: list[list[float]] = mean.tolist()
    return found
