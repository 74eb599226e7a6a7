"""Hypothesis strategies for tests of compressors: shapes, numbers of workers, gradients.

Tensors are made from drawn seeds, never drawn element by element: an example takes microseconds,
and shrinks to a small shape. The only module of the package that needs hypothesis.
"""

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from efsgd.testing.gradients import EVERY_KIND, made_up

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "efsgd.testing.strategies needs hypothesis, which cannot be imported. Install it with "
        "pip install hypothesis; it is also in the extra efsgd[test]."
    ) from error

__all__ = [
    "gradients",
    "matrix_shapes",
    "seeds",
    "shape_lists",
    "shapes",
    "tensor_shapes",
    "tensors",
    "vector_shapes",
    "world_sizes",
]

#: Of a parameter.
Shape: TypeAlias = tuple[int, ...]

_small, _large = st.integers(1, 6), st.integers(7, 20)


def vector_shapes() -> st.SearchStrategy[Shape]:
    """Shapes of what is mostly sent as it is: one number, a vector, or no element at all."""
    empty: list[Shape] = [(0,), (0, 4), (4, 0), (3, 0, 2)]
    return st.one_of(st.just(()), st.tuples(st.integers(1, 20)), st.sampled_from(empty))


def matrix_shapes() -> st.SearchStrategy[Shape]:
    """Shapes of two dimensions up to 20: tall, wide, square, one row and one column."""
    one = st.just(1)
    return st.one_of(
        _large.map(lambda size: (size, size)),
        st.tuples(_large, _small),
        st.tuples(_small, _large),
        st.tuples(_large, _large),
        st.tuples(one, _large),
        st.tuples(_large, one),
    )


def tensor_shapes() -> st.SearchStrategy[Shape]:
    """Shapes of three to five dimensions, like those of convolutions, of at most 324 elements."""
    inner = st.integers(1, 3)
    first = st.integers(1, 12)
    return st.one_of(*(st.tuples(first, *[inner] * extra) for extra in (2, 3, 4)))


def shapes() -> st.SearchStrategy[Shape]:
    """Any of `matrix_shapes`, `tensor_shapes` and `vector_shapes`; some have no element."""
    return st.one_of(matrix_shapes(), tensor_shapes(), vector_shapes())


@st.composite
def shape_lists(draw: st.DrawFn, max_size: int = 5) -> list[Shape]:
    """Shapes of one to `max_size` parameters; equal ones, which share a batch, often stand apart.

    Example:
        >>> from hypothesis import given
        >>> from efsgd import PowerSGD
        >>> from efsgd.testing.strategies import shape_lists
        >>> @given(shape_lists())
        ... def test_never_sends_more(shapes):
        ...     elements = sum(torch.Size(shape).numel() for shape in shapes)
        ...     assert PowerSGD(rank=2).payload_bytes(shapes) <= 4 * elements
        >>> test_never_sends_more()
    """
    distinct = draw(st.lists(shapes(), min_size=1, max_size=max(1, max_size - 2)))
    repeats = draw(st.lists(st.sampled_from(distinct), max_size=max_size - len(distinct)))
    return draw(st.permutations(distinct + repeats))


def world_sizes() -> st.SearchStrategy[int]:
    """Numbers of workers: 1 to 4, and 8."""
    return st.sampled_from([1, 2, 3, 4, 8])


def seeds() -> st.SearchStrategy[int]:
    """Seeds for what is made rather than drawn, and of compressors."""
    return st.integers(0, 2**31 - 1)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[Shape] | None = None,
    *,
    kinds: Sequence[str] = EVERY_KIND,
) -> Tensor:
    """One worker's gradient of one parameter: float64, on the CPU.

    Args:
        shape: of the parameter; by default any of `shapes`.
        kinds: those to choose from; see `gradients`.
    """
    chosen = draw(shapes() if shape is None else shape)
    return made_up(draw(st.sampled_from(kinds)), chosen, 0, draw(seeds()))


@st.composite
def gradients(
    draw: st.DrawFn,
    shapes: st.SearchStrategy[Sequence[Shape]] | None = None,
    workers: st.SearchStrategy[int] | None = None,
    *,
    kinds: Sequence[str] = EVERY_KIND,
) -> list[list[Tensor]]:
    """All workers' gradients of one step, by worker and by parameter: float64, on the CPU.

    Each parameter has a kind, which is the same on all workers:

    * "gaussian": independent standard normal numbers;
    * "one_hot": a single 1, elsewhere on each worker, and zeros;
    * "scaled": gaussian, times 1e-3, 1 or 1e3, by worker;
    * "rank_deficient": of rank 1 on each worker;
    * "constant": all elements of a worker are the same gaussian number;
    * "zero";
    * "sparse": gaussian, with about seven zeros among eight elements;
    * "huge", "tiny": gaussian, times 1e30 or 1e-30, whose squares float32 does not hold.

    Args:
        shapes: of the parameters; by default `shape_lists`.
        workers: their number; by default `world_sizes`.
        kinds: those to choose from.

    Example:
        >>> from hypothesis import given, strategies as st
        >>> from efsgd.testing.strategies import gradients
        >>> @given(gradients(st.just([(4, 3)]), st.just(2), kinds=["one_hot"]))
        ... def test_one_element_each(made):
        ...     assert [[int(tensor.sum()) for tensor in own] for own in made] == [[1], [1]]
        >>> test_one_element_each()
    """
    chosen = draw(shape_lists() if shapes is None else shapes)
    world_size = draw(world_sizes() if workers is None else workers)
    kind_of = [draw(st.sampled_from(kinds)) for _ in chosen]
    seed = draw(seeds())
    return [
        [made_up(kind_of[i], shape, worker, seed, i) for i, shape in enumerate(chosen)]
        for worker in range(world_size)
    ]
