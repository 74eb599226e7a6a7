"""What each layer's compression misses at each value, of what was accumulated in a window."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.blocks import matrix_shape
from efsgd.collectives import Broadcast, Exchange, run
from efsgd.compressors import LQSGD, Compressor, PowerSGD, TensorCompressor
from efsgd.rank.accumulation import Accumulator
from efsgd.rank.base import Layer, Value
from efsgd.rank.checks import require_choice, require_counts
from efsgd.rank.measured_errors import measured_errors
from efsgd.rank.spectra import exact_tails, power_tails
from efsgd.transports import Alone

__all__ = ["ErrorTables"]


@dataclass(frozen=True)
class ErrorTables:
    """How errors are found. Of low-rank compressors they are those of the best approximations.

    Attributes:
        setting: of which `values` are.
        values: the columns of a table.
        spectrum: "power" or "svd"; see `LGreCo`.
        iterations: see `LGreCo`.
        gradients: "mean" or "worker 0"; see `LGreCo`.
        sketch: see `LGreCo`.

    Raises:
        ValueError: an attribute is out of range.
    """

    setting: str
    values: Sequence[Value]
    spectrum: str = "power"
    iterations: int = 2
    gradients: str = "mean"
    sketch: int | None = 4096

    def __post_init__(self) -> None:
        require_choice("spectrum", self.spectrum, ("power", "svd"))
        require_choice("gradients", self.gradients, ("mean", "worker 0"))
        require_counts(iterations=self.iterations, sketch=1 if self.sketch is None else self.sketch)

    def validate(self, compressor: Compressor) -> None:
        """Checks that errors of a compressor can be told.

        Raises:
            ValueError: they cannot.
        """
        is_low_rank = isinstance(compressor, PowerSGD | LQSGD) and self.setting == "rank"
        is_single = isinstance(compressor, TensorCompressor) and not compressor.takes_all_at_once
        if not (is_low_rank or is_single):
            raise ValueError(
                f"Invalid compressor: {compressor!r} with the setting {self.setting!r}. Must be a "
                f"PowerSGD or LQSGD with 'rank', or a TensorCompressor that takes one tensor at a "
                f"time: of others it is not known how errors depend on values."
            )

    def measure(
        self,
        compressor: Compressor,
        layers: Sequence[Layer],
        accumulator: Accumulator,
        world_size: int,
        worker: int,
    ) -> Exchange[list[list[float]]]:
        """The table: a row for each layer, a column for each value. The same on every worker.

        Args:
            compressor: of the layers.
            layers: all of which have a sum.
            accumulator: has the sums.
            world_size: the number of workers.
            worker: this worker's place among them, from 0.
        """
        if self.gradients == "mean":
            return (yield from self._measure(compressor, layers, accumulator, world_size, worker))
        table = torch.zeros(len(layers), len(self.values), dtype=torch.float64, device="cpu")
        if worker == 0:
            alone = run(self._measure(compressor, layers, accumulator, 1, 0), Alone())
            table.copy_(torch.tensor(alone, dtype=torch.float64, device="cpu"))
        table = table.to(layers[0].device)
        answer = yield Broadcast(table, "errors of accumulated gradients")
        found: list[list[float]] = answer.tolist()
        return found

    def _measure(
        self,
        compressor: Compressor,
        layers: Sequence[Layer],
        accumulator: Accumulator,
        world_size: int,
        worker: int,
    ) -> Exchange[list[list[float]]]:
        if isinstance(compressor, TensorCompressor):
            table = layers, self.setting, self.values
            return (yield from measured_errors(compressor, *table, accumulator.sums, worker))
        shapes = {layer.index: matrix_shape(layer.shape) for layer in layers}
        ranks = {index: int(min(*shape, max(self.values))) for index, shape in shapes.items()}
        sums = (yield from accumulator.means()) if self.spectrum == "svd" else accumulator.sums
        matrices = {index: sums[index].view(shape) for index, shape in shapes.items()}
        if self.spectrum == "svd":
            tails = yield from exact_tails(matrices, ranks, world_size, worker)
        else:
            tails = yield from power_tails(
                matrices, ranks, iterations=self.iterations, sketch=self.sketch
            )
        return [self._row(compressor, layer, tails[layer.index]) for layer in layers]

    def _row(self, compressor: Compressor, layer: Layer, tails: Tensor) -> list[float]:
        """The errors at each value; none where a layer is sent uncompressed."""
        row, left = [], tails.tolist()
        for value in self.values:
            level = compressor.level(layer.shape, {**layer.settings, self.setting: value})
            row.append(0.0 if level is None else left[min(int(value), len(left) - 1)])
        return row
