"""Where every tensor lies: many parameters, few buffers.

A `Layout` is a pure plan: which parameters are sent as matrices, which of those have equal
shapes and so form a batch, and which are sent as they are ("vectors", after the paper), at
which offset of one flat buffer. `Blocks` are tensors laid out by such a plan.
"""

import itertools
import math
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

# A cache line in float32.
_ALIGNED_FLOATS = 16


#: Works on matrices as they are decompressed: `function(values, *operands, **options)` takes a list
#: of decompressed chunks, which it may modify, and for each operand the list of matching chunks. An
#: option `together` says whether many tensors are to share a kernel.
Elementwise: TypeAlias = Callable[..., None]


def matrix_shape(shape: Sequence[int], batch_dims: int = 0) -> tuple[int, int]:
    """The matrix [n, m] as which a parameter is seen: its first dimension by all the others.

    Of a stack, whose first `batch_dims` dimensions count matrices, it is that of each.

    Source: PowerSGD (arXiv 1905.13727), Algorithm 1, line 1.

    Example:
        >>> from efsgd.layout import matrix_shape
        >>> matrix_shape((64, 3, 3, 3)), matrix_shape((64,)), matrix_shape(())
        ((64, 27), (64, 1), (1, 1))
        >>> matrix_shape((8, 64, 128), batch_dims=1)
        (64, 128)
    """
    own = shape[batch_dims:]
    return math.prod(own[:1]), math.prod(own[1:])


def real_view(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with a last dimension of size 2; a sparse one made dense."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape, but no values, as under torch's FakeTensorMode.

    Estimators of memory run steps like that. Where such values decide, a step is taken as usual.
    """
    return type(tensor).__name__ == "FakeTensor"


class Matrix(NamedTuple):
    """One matrix of a parameter.

    Attributes:
        owner: the index of its parameter.
        number: its own, over the matrices of all parameters; random numbers for it depend on this.
        place: where it is in the parameter; () where the parameter is one matrix.
        shape: of this part of the parameter.
    """

    owner: int
    number: int
    place: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor of the parameter's shape, a view."""
        return tensor[self.place] if self.place else tensor


@dataclass(frozen=True)
class Entry:
    """One parameter in a plan.

    Attributes:
        index: its position in the optimizer, over all groups.
        shape: its shape.
        level: how far it is compressed, in the compressor's own terms (PowerSGD: the rank);
            None sends it uncompressed.
        batch_dims: how many of its first dimensions count matrices.
        first: the number of its first matrix, over all parameters; None: its index, which it is
            where no parameter before it has several.
    """

    index: int
    shape: tuple[int, ...]
    level: Hashable | None
    batch_dims: int = 0
    first: int | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def matrices(self) -> list[Matrix]:
        """Its matrices, in the order in which they lie in memory."""
        first = self.index if self.first is None else self.first
        places = itertools.product(*map(range, self.shape[: self.batch_dims]))
        own = self.shape[self.batch_dims :]
        return [Matrix(self.index, first + k, place, own) for k, place in enumerate(places)]


@dataclass(frozen=True)
class Batch:
    """Matrices of equal shape and level, in the order of their parameters.

    Attributes:
        rows: n.
        columns: m.
        level: what they have in common (PowerSGD: the rank).
        entries: the parameters, which have b matrices together.
    """

    rows: int
    columns: int
    level: Hashable
    entries: tuple[Entry, ...]

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The b matrices."""
        return tuple(matrix for entry in self.entries for matrix in entry.matrices())

    @property
    def floats(self) -> int:
        """The number of elements of all its matrices."""
        return len(self.matrices) * self.rows * self.columns

    def split(self, tensor: Tensor) -> Iterator[tuple[Entry, Tensor]]:
        """Each parameter and its part of a contiguous tensor [b, ...], a view.

        Its dimensions are those that count the parameter's matrices, if any do, and `...`.
        """
        sizes = [math.prod(entry.shape[: entry.batch_dims]) for entry in self.entries]
        for entry, part in zip(self.entries, tensor.split(sizes), strict=True):
            yield entry, part.view(*entry.shape[: entry.batch_dims], *tensor.shape[1:])

    def chunks(
        self, wanted: Container[int], floats: int, done: Container[int] = ()
    ) -> Iterator[tuple[slice, slice]]:
        """Cuts the batch into chunks to work on at once: whole matrices, or some rows of one.

        Args:
            wanted: the indices of the parameters whose matrices are wanted.
            floats: the size of a chunk, unless a row has more.
            done: positions of matrices that are left out.

        Yields:
            (matrices, rows): where the chunk lies in the batch.
        """
        height = min(self.rows, max(1, floats // self.columns))
        width = max(1, floats // (self.rows * self.columns))
        numbered = itertools.groupby(
            range(len(self.matrices)),
            key=lambda position: self.matrices[position].owner in wanted and position not in done,
        )
        for is_wanted, run in numbered:
            positions = list(run) if is_wanted else []
            for first in range(0, len(positions), width):
                some = positions[first : first + width]
                for top in range(0, self.rows, height):
                    rows = slice(top, min(top + height, self.rows))
                    yield slice(some[0], some[-1] + 1), rows


@dataclass(frozen=True)
class Layout:
    """Which parameter lies where.

    Law: a plan made from the entries of a plan is equal to it.

    Attributes:
        entries: all parameters, in their order.
        control_words: floats kept free at the head of the vectors, for the caller's own use.
    """

    entries: tuple[Entry, ...]
    control_words: int = 0

    @classmethod
    def plan(cls, entries: Iterable[Entry], control_words: int = 0) -> Self:
        """Makes the plan, of parameters in any order.

        Raises:
            ValueError: a parameter occurs twice, or an empty one has a level.

        Example:
            >>> from efsgd.layout import Entry, Layout
            >>> entries = [Entry(0, (8, 4), 2), Entry(1, (8,), None), Entry(2, (8, 4), 2)]
            >>> layout = Layout.plan(entries)
            >>> [(batch.rows, batch.columns, len(batch.entries)) for batch in layout.batches]
            [(8, 4, 2)]
            >>> layout.vectors[0].index, layout.vector_floats, layout.matrix_floats
            (1, 8, 64)
        """
        ordered = tuple(sorted(entries, key=lambda entry: entry.index))
        for previous, entry in itertools.pairwise(ordered):
            if previous.index == entry.index:
                raise ValueError(f"Invalid entries: parameter {entry.index} occurs twice.")
        for entry in ordered:
            if entry.level is not None and entry.numel == 0:
                raise ValueError(
                    f"Invalid {entry}: there is nothing to compress in an empty tensor. Use "
                    f"level=None to send it uncompressed."
                )
        return cls(ordered, control_words)

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """The matrices, batched by equal shape and level, in order of first appearance.

        Except that batches of odd sizes come last: they lie in one buffer, and would spoil the
        alignment of those after them.
        """
        same: dict[tuple[int, int, Hashable], list[Entry]] = {}
        for entry in self.entries:
            if entry.level is not None:
                key = (*matrix_shape(entry.shape, entry.batch_dims), entry.level)
                same.setdefault(key, []).append(entry)
        batches = [Batch(*key, tuple(entries)) for key, entries in same.items()]
        return tuple(sorted(batches, key=lambda batch: batch.floats % _ALIGNED_FLOATS != 0))

    @cached_property
    def vectors(self) -> tuple[Entry, ...]:
        """The parameters that are sent uncompressed."""
        return tuple(entry for entry in self.entries if entry.level is None)

    @cached_property
    def matrix_floats(self) -> int:
        """The number of elements in all matrices."""
        return sum(entry.numel for entry in self.entries if entry.level is not None)

    @cached_property
    def vector_floats(self) -> int:
        """The length of the flat buffer of vectors, control words included."""
        return self.control_words + sum(entry.numel for entry in self.vectors)


class Blocks:
    """Tensors of all parameters in a layout.

    Attributes:
        layout: the plan.
        flat: [layout.matrix_floats], all matrices, batch after batch.
        batches: one tensor [b, n, m] for each batch of the plan, a part of `flat`.
        views: for each parameter's index, its part of `batches` (or of the vectors), in the
            parameter's own shape.

    Args:
        layout: the plan.
        dtype: of the matrices.
        device: of the matrices.
        vectors: flat buffer [layout.vector_floats] for the vectors and, before them, the control
            words; None where there are only matrices.
        flat: memory for `flat`, of this dtype and device; None: new memory, filled with zeros.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        vectors: Tensor | None = None,
        flat: Tensor | None = None,
    ) -> None:
        self.layout = layout
        if flat is None:
            flat = torch.zeros(layout.matrix_floats, dtype=dtype, device=device)
        self.flat = flat
        self.batches = [
            part.view(len(batch.matrices), batch.rows, batch.columns)
            for batch, part in zip(
                layout.batches, self.flat.split([b.floats for b in layout.batches]), strict=True
            )
        ]
        self.views: dict[int, Tensor] = {}
        for batch, matrices in zip(layout.batches, self.batches, strict=True):
            for entry, part in batch.split(matrices):
                self.views[entry.index] = part.view(entry.shape)
        if vectors is not None:
            sizes = [entry.numel for entry in layout.vectors]
            parts = vectors[layout.control_words :].split(sizes)
            for entry, part in zip(layout.vectors, parts, strict=True):
                self.views[entry.index] = part.view(entry.shape)
