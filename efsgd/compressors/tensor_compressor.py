"""The easy way to a compressor of one's own: one tensor at a time."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import (
    Aggregator,
    Claims,
    Compressor,
    Placement,
    Settings,
    fields_of,
)
from efsgd.algorithms.operators import Payload, units
from efsgd.algorithms.reading import Reading, in_clear
from efsgd.algorithms.tensorwise import Tensorwise
from efsgd.checks import plain
from efsgd.layout import Layout
from efsgd.randomness import Draws, RowDraws
from efsgd.wire.payload import Field, Format


class TensorCompressor(Compressor):
    """A compressor that works on one tensor at a time, inside error-feedback SGD.

    Subclasses are frozen dataclasses. Their fields are the settings; every one may be set per
    parameter group, `seed` apart. They write three methods: `fields`, `compress`, `decompress`.
    A field `batch_dims: int = 0`, if there is one, says how many of a parameter's first dimensions
    count tensors: each is then compressed by itself.
    What is not sent is kept as error, and all that has to do with workers, errors and refused
    steps is seen to elsewhere: `compress` is only ever given finite tensors.

    Attributes:
        averages: whether payloads may be averaged: `decompress` of a mean is the mean of what each
            would give. They then consist of values alone, and ride in the first all-reduce.
            Otherwise they are gathered, and decompressed one by one.

    Example:
        >>> import dataclasses, torch
        >>> from efsgd import ErrorFeedbackSGD, Field, TensorCompressor
        >>> @dataclasses.dataclass(frozen=True)
        ... class Largest(TensorCompressor):  # sends the largest element, and where it is
        ...     def fields(self, shape):
        ...         return Field(1), Field(1, torch.int64)
        ...     def compress(self, delta, draws):
        ...         where = delta.abs().argmax().view(1)
        ...         return delta.view(-1)[where], where
        ...     def decompress(self, payload, shape, draws):
        ...         value, where = payload
        ...         return value.new_zeros(shape.numel()).index_copy(0, where, value).view(shape)
        >>> x = torch.zeros(3, requires_grad=True)
        >>> x.grad = torch.tensor([1.0, -3.0, 2.0])
        >>> ErrorFeedbackSGD([x], lr=1.0, momentum_form="sgd", compressor=Largest()).step()
        >>> x.tolist()
        [0.0, 3.0, 0.0]
    """

    averages: ClassVar[bool] = False

    # ---- what a subclass writes ----------------------------------------------------------------

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        """Announces the payload of a tensor of this shape, which is the same in every step."""
        raise NotImplementedError(f"{type(self).__name__} must define fields(self, shape).")

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        """The payload of one tensor.

        Args:
            delta: contiguous, finite, float32 or float64. Not to be modified.
            draws: random numbers, shared with the other workers or private.

        Returns:
            The fields that were announced, each [count]; tensors of their own, no views of `delta`.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define compress(self, delta, draws).")

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        """What a payload decodes to, of this shape. A payload of zeros decodes to zeros.

        Args:
            payload: of this worker or another, or the mean of all. Not to be modified.
            shape: of the tensor.
            draws: shared random numbers; private ones are not to be had here.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define decompress(self, payload, shape, draws).")

    # ---- what it may write ---------------------------------------------------------------------

    def compresses(self, shape: torch.Size) -> bool:
        """Whether tensors of this shape, never empty, are compressed; by default all are."""
        return True

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        """Adds alpha times the decompressed payload to `out` (modified in place).

        By way of `decompress`; for those that can do it faster.
        """
        found = self.decompress(payload, out.shape, draws)
        self._require_shape(found, out.shape, "decompress")
        out.add_(found, alpha=alpha)

    def takes_rows(self, shape: torch.Size) -> bool:
        """Whether several tensors of this shape are compressed together, in few operations.

        It then has `compress_rows` and `decompress_rows`. What they do to a row must be, to the
        bit, what `compress` and `decompress` do to a tensor.
        """
        return False

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        """The payloads of several tensors.

        Args:
            deltas: [rows, ...], else as for `compress`.
            draws: random numbers: those of one tensor are `draws[row]`.

        Returns:
            Each field [rows, count].
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define compress_rows(self, deltas, draws).")

    def decompress_rows(self, payload: Payload, shape: torch.Size, draws: RowDraws) -> Tensor:
        """What payloads decode to, `[rows, *shape]`.

        Args:
            payload: each field [rows, count], else as for `decompress`.
            shape: of a row.
            draws: shared random numbers: those of one tensor are `draws[row]`.
        """
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} must define decompress_rows(self, payload, shape, draws)."
        )

    def add_decompressed_rows_(
        self, out: Tensor, payload: Payload, draws: RowDraws, alpha: float
    ) -> None:
        """Adds alpha times the decompressed payloads to `out`, [rows, ...] (modified in place).

        To the bit what `add_decompressed_` does for each; by way of `decompress_rows`.
        """
        found = self.decompress_rows(payload, out.shape[1:], draws)
        self._require_shape(found, out.shape, "decompress_rows")
        out.add_(found, alpha=alpha)

    def read(self, payload: Payload, decompressed: Tensor, draws: Draws) -> Reading:
        """What somebody who sees a payload reads from it; for `efsgd.audit` alone.

        By default that every element is about what it was decompressed to, as if it had been
        quantized. Functions that make a `Reading` are in `efsgd.algorithms.reading`.

        Args:
            payload: of one worker, or the mean of all.
            decompressed: what it decodes to.
            draws: shared random numbers.
        """
        return in_clear(decompressed, "codes")

    def claims(self) -> Claims:
        return Claims(self.averages)

    @property
    def takes_all_at_once(self) -> bool:
        """Whether it is given all tensors of a group's settings as one flat tensor."""
        return False

    # ---- what the optimizer asks for -----------------------------------------------------------

    @property
    def seed_of_draws(self) -> int:
        """The field `seed`, if there is one."""
        return int(getattr(self, "seed", 0))

    def validate(self, settings: Settings) -> None:
        self._with(settings)

    def level(self, shape: Sequence[int], settings: Settings) -> Hashable | None:
        """The compressor with the settings of a group; None where it does not compress."""
        own, one = self._with(settings), torch.Size(shape)[self.batch_dims_of(settings) :]
        return own if math.prod(shape) > 0 and own.compresses(one) else None

    def compressed_bytes(self, layout: Layout, placement: Placement, step: int) -> int:
        return Format([unit.fields() for unit in units(layout)], placement.dtype).nbytes

    def aggregator(self, layout: Layout, settings: Settings, placement: Placement) -> Aggregator:
        return Tensorwise(layout, placement, averages=self.averages)

    def _require_shape(self, found: Tensor, shape: torch.Size, method: str) -> None:
        if found.shape != shape:
            raise ValueError(
                f"Invalid result of {type(self).__name__}.{method}: its shape is "
                f"{list(found.shape)} and must be {list(shape)}, the `shape` it was given."
            )

    def _with(self, settings: Settings) -> Self:
        chosen = {each.name: plain(settings[each.name]) for each in fields_of(self)}
        own = dataclasses.replace(self, **chosen)  # type: ignore[type-var]
        try:
            hash(own)
        except TypeError as error:
            raise TypeError(
                f"Invalid compressor: {own!r} cannot be hashed ({error}). Its fields must be "
                f"numbers, strings or tuples of them, and @dataclasses.dataclass(frozen=True) "
                f"stand above the class."
            ) from error
        return own
