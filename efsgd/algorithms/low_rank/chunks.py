"""Products on their way to the function that uses them: a few tensors at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from efsgd.layout import Batch, Elementwise


class Chunks:
    """Products that lie side by side in `scratch` until they are handed to a function together."""

    def __init__(
        self,
        scratch: Tensor,
        function: Elementwise,
        operands: Sequence[Mapping[int, Tensor]],
        options: Mapping[str, Any],
    ) -> None:
        self._scratch, self._function = scratch, function
        self._operands, self._options = operands, options
        self._begin()

    def _begin(self) -> None:
        self._used = 0
        self._products: list[Tensor] = []
        self._others: list[list[Tensor]] = [[] for _ in self._operands]

    def memory(self, floats: int) -> Tensor:
        """Memory for so many numbers; what fills it is to be added."""
        if self._used + floats > self._scratch.numel():
            self.hand_over()
        found = self._scratch[self._used : self._used + floats]
        self._used += -(-floats // 16) * 16  # a cache line in float32
        return found

    def add(self, batch: Batch, values: Tensor, first: int = 0, rows: slice | None = None) -> None:
        """Products [count, rows, m] of a batch, from one of its matrices on, or of some rows."""
        is_whole = values.shape[1] == batch.rows  # then nothing is to be cut out
        chosen = batch.matrices[first : first + len(values)]
        for value, matrix in zip(values.unbind(), chosen, strict=True):
            if matrix.owner not in self._operands[0]:
                continue
            self._products.append(value.view(matrix.shape if is_whole else (-1, *matrix.shape[1:])))
            for found, operand in zip(self._others, self._operands, strict=True):
                part = operand[matrix.owner]
                if matrix.place:
                    part = part[matrix.place]
                found.append(part if is_whole else part[rows])

    def hand_over(self) -> None:
        """Calls the function with what there is."""
        if self._products:
            self._function(self._products, *self._others, **self._options)
        self._begin()
