"""How much of a tensor a compressor misses, found by compressing it: for those of single tensors.

Each worker compresses its own tensors, so the mean over the workers of what they miss is taken.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from efsgd.compressors import TensorCompressor
from efsgd.randomness import Draws
from efsgd.rank.accumulation import mean_table
from efsgd.rank.base import Layer, Value
from efsgd.wire.collectives import Exchange


def measured_errors(
    compressor: TensorCompressor,
    layers: Sequence[Layer],
    setting: str,
    values: Sequence[Value],
    tensors: Mapping[int, Tensor],
    worker: int,
) -> Exchange[list[list[float]]]:
    """The norm of what is missed of each layer at each value, in the mean over the workers.

    Args:
        compressor: of the layers.
        layers: the rows of the table.
        setting: of which `values` are.
        values: the columns.
        tensors: by index, in the layers' shapes, this worker's own; not modified.
        worker: this worker's place among all, from 0.

    Returns:
        A row for each layer, a column for each value; NaN where a tensor is not finite.

    Raises:
        Exception: what the compressor raises on this worker. The others have NaN.
    """

    def row(layer: Layer) -> list[float]:
        tensor = tensors[layer.index]
        return [_missed(compressor, layer, setting, value, tensor, worker) for value in values]

    sizes, purpose = (len(layers), len(values)), "errors of accumulated gradients"
    return mean_table(lambda: map(row, layers), *sizes, layers[0].device, purpose)


def _missed(
    compressor: TensorCompressor,
    layer: Layer,
    setting: str,
    value: Value,
    tensor: Tensor,
    worker: int,
) -> float:
    operator = layer.level(compressor, setting, value)
    if operator is None:
        return 0.0
    if not tensor.isfinite().all():
        return math.nan  # compressors are only ever given finite tensors
    assert isinstance(operator, TensorCompressor)
    draws = Draws(operator.seed_of_draws, layer.index, 0, worker)
    rest = tensor.clone()
    operator.add_decompressed_(rest, operator.compress(tensor, draws), draws, -1.0)
    return float(torch.linalg.vector_norm(rest, dtype=torch.float64))
