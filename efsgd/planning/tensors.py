"""What is trained, as far as a plan needs it: shapes, and when a backward pass has gradients."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Shape: TypeAlias = tuple[int, ...]

#: What DistributedDataParallel does by default: its first bucket is full with this, others later.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trained:
    """The parameters of a model that are trained.

    Attributes:
        shapes: of each.
        itemsizes: bytes of an element of each one's gradient.
        dtype: of errors and factors.
        device: where they are.
        arrivals: when each one's gradient is there: parts of the time of the backward pass. None:
            in the reverse order of the parameters, each taking time by its number of elements.
    """

    shapes: tuple[Shape, ...]
    itemsizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    arrivals: tuple[float, ...] | None = None

    @property
    def nbytes(self) -> int:
        """The size of all gradients."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """The size of each gradient."""
        pairs = zip(self.shapes, self.itemsizes, strict=True)
        return [math.prod(shape) * itemsize for shape, itemsize in pairs]

    def buckets(self) -> list[tuple[float, int]]:
        """The buckets of DistributedDataParallel, in the order in which they are sent.

        Returns:
            Of each: when it is complete, a part of the backward pass' time, and its bytes.
        """
        sizes = self.sizes
        arrivals = self._expected(sizes) if self.arrivals is None else self.arrivals
        order = sorted(range(len(sizes)), key=lambda index: (arrivals[index], -index))
        found: list[tuple[float, int]] = []
        size, limit = 0, FIRST_BUCKET_BYTES
        for index in order:
            size += sizes[index]
            if size >= limit or index == order[-1]:
                found.append((arrivals[index], size))
                size, limit = 0, BUCKET_BYTES
        return found

    def _expected(self, sizes: Sequence[int]) -> list[float]:
        done = list(itertools.accumulate(reversed(sizes)))
        return [part / max(1, done[-1]) for part in reversed(done)]


def trained_of(model: nn.Module | Iterable[Tensor | Sequence[int]]) -> Trained:
    """What is trained of a model, of parameters, or of a list of shapes.

    Raises:
        TypeError: it is none of these.
        ValueError: nothing is trained, or a dimension is no integer of at least 0.
    """
    given = list(model.parameters() if isinstance(model, nn.Module) else model)
    tensors = [each for each in given if isinstance(each, Tensor)]
    if tensors and len(tensors) < len(given):
        raise TypeError("Invalid model: must be a module, or tensors, or shapes; not both.")
    if tensors:
        tensors = [tensor for tensor in tensors if tensor.requires_grad]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        itemsizes = [tensor.element_size() for tensor in tensors]
        is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
        device = tensors[0].device if tensors and not tensors[0].is_meta else _CPU
    else:
        shapes = [shape_of(each) for each in given]
        itemsizes, is_double, device = [4] * len(shapes), False, _CPU
    if not sum(map(math.prod, shapes)):
        raise ValueError(
            "Invalid model: it has nothing that is trained. Give a module or parameters of which "
            "some require gradients, or shapes such as [(512, 512), (512,)]."
        )
    dtype = torch.float64 if is_double else torch.float32
    return Trained(tuple(shapes), tuple(itemsizes), dtype, device)


def shape_of(given: object) -> Shape:
    """A shape as a tuple."""
    shape: Any = tuple(given) if isinstance(given, list | tuple | torch.Size) else (None,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise ValueError(
            f"Invalid shape: {given!r}. Must be a list of integers of at least 0, as [512, 256]."
        )
    found: Shape = shape
    return found


def resnet18_shapes() -> Iterator[Shape]:
    """ResNet18 as for CIFAR-10: 11,173,962 parameters."""
    yield from ((64, 3, 3, 3), (64,), (64,))
    before = 64
    for width, _ in itertools.product((64, 128, 256, 512), range(2)):
        yield from ((width, before, 3, 3), (width,), (width,))
        yield from ((width, width, 3, 3), (width,), (width,))
        if before != width:
            yield from ((width, before, 1, 1), (width,), (width,))
        before = width
    yield from ((10, 512), (10,))


def lstm_shapes(words: int = 28_869, width: int = 650, layers: int = 3) -> Iterator[Shape]:
    """The LSTM of the PowerSGD paper for WikiText-2: 28,949,319 parameters."""
    yield (words, width)
    for _ in range(layers):
        yield from ((4 * width, width), (4 * width, width), (4 * width,), (4 * width,))
    yield (words,)


def gpt2_shapes(width: int = 768, layers: int = 12) -> Iterator[Shape]:
    """GPT-2 small: linear layers as [inputs, outputs], the last one tied to the first."""

    def with_bias(*shape: int) -> tuple[Shape, Shape]:
        return shape, (shape[-1],)

    yield from ((50_257, width), (1024, width))
    for _ in range(layers):
        yield from with_bias(width)  # a norm
        yield from with_bias(width, 3 * width)  # attention: queries, keys and values
        yield from with_bias(width, width)
        yield from with_bias(width)
        yield from with_bias(width, 4 * width)
        yield from with_bias(4 * width, width)
    yield from with_bias(width)


#: Shapes that are known by name.
KNOWN_SHAPES = {"resnet18": resnet18_shapes, "lstm": lstm_shapes, "gpt2": gpt2_shapes}
