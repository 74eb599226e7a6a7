"""What each layer's compression misses at each value, of what was accumulated in a window."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from efsgd.compressors import LQSGD, Compressor, PowerSGD, TensorCompressor
from efsgd.layout import matrix_shape
from efsgd.rank.accumulation import Accumulator
from efsgd.rank.approximation.measured import measured_errors
from efsgd.rank.approximation.spectra import exact_tails, power_tails
from efsgd.rank.base import Layer, Value
from efsgd.rank.checks import require_choice, require_counts
from efsgd.rank.costs.volumes import with_value
from efsgd.wire.collectives import Broadcast, Exchange, run
from efsgd.wire.transports import Alone


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

    def validate(self, compressor: Compressor, layers: Sequence[Layer]) -> None:
        """Checks that errors of a compressor can be told.

        Args:
            compressor: of the optimizer.
            layers: with the settings of their groups.

        Raises:
            ValueError: they cannot.
        """
        is_low_rank = isinstance(compressor, PowerSGD | LQSGD) and self.setting == "rank"
        if not is_low_rank and not all(self._is_single(compressor, layer) for layer in layers):
            raise ValueError(
                f"Invalid compressor: {compressor!r} with the setting {self.setting!r}. Must be a "
                f"PowerSGD or LQSGD with 'rank', or a TensorCompressor that takes one tensor at a "
                f"time: of others it is not known how errors depend on values."
            )

    def _is_single(self, compressor: Compressor, layer: Layer) -> bool:
        if not isinstance(compressor, TensorCompressor):
            return False
        own = with_value(compressor, layer.settings, self.setting, self.values[0])
        return isinstance(own, TensorCompressor) and not own.takes_all_at_once

    def measure(
        self,
        compressor: Compressor,
        layers: Sequence[Layer],
        accumulator: Accumulator,
        world_size: int,
        worker: int,
    ) -> Exchange[list[list[float]]]:
        """The table: a row for each layer, a column for each value. The same on every worker.

        Where sums have overflowed it is not finite.

        Args:
            compressor: of the layers.
            layers: all of which have a sum.
            accumulator: has the sums.
            world_size: the number of workers.
            worker: this worker's place among them, from 0.
        """
        if self.gradients == "mean":
            return (yield from self._measure(compressor, layers, accumulator, world_size, worker))
        rows, obstacle = [[math.nan] * len(self.values) for _ in layers], None
        if worker == 0:
            try:
                rows = run(self._measure(compressor, layers, accumulator, 1, 0), Alone())
            except Exception as error:  # the others are waiting, so it is raised afterwards
                obstacle = error
        table = torch.tensor(rows, dtype=torch.float64, device=layers[0].device)
        answer = yield Broadcast(table, "errors of accumulated gradients")
        if obstacle is not None:
            raise obstacle
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
        columns = {layer.index: self._ranks(compressor, layer) for layer in layers}
        ranks = {index: max(own) for index, own in columns.items()}
        if self.spectrum == "svd":
            means = yield from accumulator.means()
            matrices = {index: means[index].view(shape) for index, shape in shapes.items()}
            tails = yield from exact_tails(matrices, ranks, world_size, worker)
        else:
            matrices = {i: accumulator.sums[i].view(shape) for i, shape in shapes.items()}
            tails = yield from power_tails(
                matrices, ranks, iterations=self.iterations, sketch=self.sketch
            )
        return [_row(columns[layer.index], tails[layer.index].tolist()) for layer in layers]

    def _ranks(self, compressor: Compressor, layer: Layer) -> list[int]:
        """Of the approximation at each value; 0 where the layer is sent uncompressed."""
        most = min(matrix_shape(layer.shape))
        found = []
        for value in self.values:
            level = layer.level(compressor, self.setting, value)
            found.append(0 if level is None else min(int(value), most))
        return found


def _row(ranks: Sequence[int], tails: Sequence[float]) -> list[float]:
    """The errors at these ranks; none at 0, where nothing is approximated."""
    return [tails[rank] if rank else 0.0 for rank in ranks]
