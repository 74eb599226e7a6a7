"""What each layer's compression misses at each value, of what was accumulated in a window.

Of low-rank compressors it is what the best approximations of the workers' mean miss. Compressors of
single tensors are tried: each worker compresses its own tensors, and the mean over the workers of
what they miss is taken.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.compressors import LQSGD, Compressor, PowerSGD, TensorCompressor
from efsgd.randomness import Draws
from efsgd.rank.accumulation import Accumulator, shared_table
from efsgd.rank.approximation.spectra import exact_tails, power_tails
from efsgd.rank.checks import require_choice, require_counts
from efsgd.rank.costs.volumes import with_value
from efsgd.rank.layers import Layer, Value
from efsgd.wire.collectives import AllReduceMean, Broadcast, Exchange, run
from efsgd.wire.transports import Alone


@dataclass(frozen=True)
class ErrorTables:
    """How errors are found, at each of some values of a setting; for the options see `LGreCo`."""

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
        """Raises a ValueError where it is not known how a compressor's errors depend on values."""
        is_known = isinstance(compressor, PowerSGD | LQSGD) and self.setting == "rank"
        if isinstance(compressor, TensorCompressor):
            options = self.setting, self.values[0]
            own: list[Any] = [with_value(compressor, n.settings, *options) for n in layers]
            is_known = not any(each.takes_all_at_once for each in own)
        if not is_known:
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
        """A row for each layer, all of which have a sum, and a column for each value.

        Of a stack it is the sum of what is missed of each matrix, as that of separate layers.
        It is the same on every worker, and not finite where sums have overflowed.
        """
        if self.gradients == "worker 0":
            alone = dataclasses.replace(self, gradients="mean")

            def of_worker_0() -> list[list[float]]:
                if worker != 0:
                    return [[math.nan] * len(self.values)] * len(layers)
                return run(alone.measure(compressor, layers, accumulator, 1, 0), Alone())

            return (yield from self._shared(of_worker_0, layers, Broadcast))
        if isinstance(compressor, TensorCompressor):
            return (yield from self.tried(compressor, layers, accumulator.sums, worker))
        columns = [self._ranks(compressor, layer) for layer in layers]
        sums: Mapping[int, Tensor] = accumulator.sums
        if self.spectrum == "svd":
            sums = yield from accumulator.means()
        matrices, ranks = {}, {}
        for layer, own in zip(layers, columns, strict=True):
            for each in layer.matrices():
                matrices[each.number] = sums[each.owner][each.place].view(layer.matrix)
                ranks[each.number] = max(own)
        if self.spectrum == "svd":
            tails = yield from exact_tails(matrices, ranks, world_size, worker)
        else:
            tails = yield from power_tails(
                matrices, ranks, iterations=self.iterations, sketch=self.sketch
            )
        # At rank 0 nothing is approximated.
        return [
            [
                sum(float(tails[each.number][rank]) for each in layer.matrices()) if rank else 0.0
                for rank in own
            ]
            for layer, own in zip(layers, columns, strict=True)
        ]

    def _ranks(self, compressor: Compressor, layer: Layer) -> list[int]:
        """Of the approximation at each value; 0 where the layer is sent uncompressed."""
        most = min(layer.matrix)
        levels = [layer.level(compressor, self.setting, value) for value in self.values]
        pairs = zip(levels, self.values, strict=True)
        return [0 if level is None else min(int(value), most) for level, value in pairs]

    def tried(
        self,
        compressor: TensorCompressor,
        layers: Sequence[Layer],
        tensors: Mapping[int, Tensor],
        worker: int,
    ) -> Exchange[list[list[float]]]:
        """The mean norms of what is missed of this worker's tensors, by index.

        NaN where a tensor is not finite. See `shared_table` for what the compressor raises.
        """

        def missed(layer: Layer, value: Value) -> float:
            operator, tensor = layer.level(compressor, self.setting, value), tensors[layer.index]
            if operator is None:
                return 0.0
            if not tensor.isfinite().all():
                return math.nan  # compressors are only ever given finite tensors
            total = 0.0
            for each in layer.matrices():
                draws = Draws(operator.seed_of_draws, each.number, 0, worker)
                rest = tensor[each.place].clone()
                payload = operator.compress(tensor[each.place], draws)
                operator.add_decompressed_(rest, payload, draws, -1.0)
                total += float(torch.linalg.vector_norm(rest, dtype=torch.float64))
            return total

        def rows() -> list[list[float]]:
            return [[missed(layer, value) for value in self.values] for layer in layers]

        return (yield from self._shared(rows, layers, AllReduceMean))

    def _shared(
        self,
        make: Callable[[], list[list[float]]],
        layers: Sequence[Layer],
        collective: type[AllReduceMean | Broadcast],
    ) -> Exchange[list[list[float]]]:
        sizes, purpose = (len(layers), len(self.values)), "errors of accumulated gradients"
        return shared_table(make, *sizes, layers[0].device, purpose, collective)
