"""Low-rank products fused into what is done with them, by torch.compile.

Written as a sum of r outer products, P̂Q^T is an elementwise expression. The compiler then needs no
memory for it: one pass reads the other operands, and each element of P̂Q^T is made where it is used.
Only products of small rank gain by this; see `Fusion.MAX_RANK`.
"""

import functools
import types
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.layout import Elementwise

# Otherwise the compiler writes an expression with many inputs to memory before using it twice.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "realize_opcount_threshold": 1000,
}


class Fusion:
    """Compiles, once for each function, shape and set of flags, and applies.

    Numbers are passed as tensors, so that a new learning rate compiles nothing.
    """

    #: Up to this rank a sum of outer products is faster than a product of matrices, and from this
    #: number of elements on (docs/benchmarks.md, "Choices within a step").
    MAX_RANK = 8
    MIN_FLOATS = 2**18
    #: Rows of Q must stay in the fastest cache from one row of the matrix to the next.
    MAX_Q_FLOATS = 2**14

    @classmethod
    def gains(cls, n: int, m: int, r: int, device: str) -> bool:
        """Whether a product [n, r] by [r, m] is faster fused than multiplied out in chunks."""
        if device != "cpu":  # nothing was measured there yet; a launch saved is a launch saved
            return r <= cls.MAX_RANK
        return r <= cls.MAX_RANK and n * m >= cls.MIN_FLOATS and r * m <= cls.MAX_Q_FLOATS

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Callable[..., None] | None] = {}

    def prepare(
        self,
        function: Elementwise,
        factors: tuple[Tensor, Tensor],
        operands: Sequence[Tensor],
        options: Mapping[str, Any],
    ) -> bool:
        """Compiles what `apply_` will need, on zeros of the same shapes; nothing is modified.

        Returns whether `apply_` will find it compiled, or will not want it compiled.
        """
        P_hat, Q = factors
        if not self.gains(P_hat.shape[0], Q.shape[1], Q.shape[0], P_hat.device.type):
            return True
        zeros = [
            torch.empty_strided(o.shape, o.stride(), dtype=o.dtype, device=P_hat.device).zero_()
            for o in operands
        ]
        return self.apply_(function, P_hat, Q, zeros, options)

    def apply_(
        self,
        function: Elementwise,
        P_hat: Tensor,
        Q: Tensor,
        operands: Sequence[Tensor],
        options: Mapping[str, Any],
    ) -> bool:
        """Calls `function([P̂Q^T], *([operand] for operand in operands), **options)`, fused.

        P̂ is [n, r], Q [r, m]; operands have n·m elements each and one shape, the first dimension n
        (modified in place). Options that are floats become tensors of no dimension; all else is
        compiled in. Returns whether it was done; if not, nothing has changed.
        """
        (n, r), m = P_hat.shape, Q.shape[1]
        if not self.gains(n, m, r, P_hat.device.type):
            return False
        numbers = {k: _tensor(k, v) for k, v in options.items() if isinstance(v, float)}
        flags = {name: v for name, v in options.items() if name not in numbers}
        flags |= {"together": False} if "together" in flags else {}  # one at a time, here
        operands = [operand.detach() for operand in operands]
        if all(operand.is_contiguous() for operand in operands):  # for loops over two indices
            operands = [operand.view(n, m) for operand in operands]
        kinds = tuple((o.shape, o.stride(), o.dtype) for o in operands)
        key = function, n, m, r, P_hat.dtype, P_hat.device, kinds, tuple(flags.items())
        if key not in self._compiled:
            self._compiled[key] = self._segment(function, (n, m, r), flags)
        segment = self._compiled[key]
        if segment is None:
            return False
        try:
            # Flat, so that strides which mean nothing (of a rank of 1) cannot matter.
            segment(P_hat.mT.reshape(-1), Q.reshape(-1), operands, numbers)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            if None not in self._compiled.values():
                _warn("some products are not fused", error)
            self._compiled[key] = None
            return False
        return True

    def _segment(
        self, function: Elementwise, shape: tuple[int, int, int], flags: Mapping[str, Any]
    ) -> Callable[..., None]:
        n, m, r = shape

        def segment(
            P_hat: Tensor, Q: Tensor, operands: list[Tensor], numbers: dict[str, Tensor]
        ) -> None:
            columns, rows = P_hat.view(r, n, 1), Q.view(r, 1, m)
            product = columns[0] * rows[0]
            for index in range(1, r):
                product = product + columns[index] * rows[index]
            product = product.view(operands[0].shape)
            function([product], *([operand] for operand in operands), **numbers, **flags)

        # Recompilations are counted for each code object, so every segment gets one of its own.
        code = segment.__code__.replace(co_name="fused")
        own = types.FunctionType(code, globals(), code.co_name, None, segment.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False, options=_OPTIONS)


@functools.cache
def shared_fusion() -> Fusion:
    """The one of this process, so that nothing is compiled twice."""
    return Fusion()


@functools.lru_cache(maxsize=256)
def _tensor(name: str, number: float) -> Tensor:
    # One for each name: where two numbers were the same tensor, the compiler would rely on it.
    return torch.tensor(number, dtype=torch.float64, device="cpu")


@functools.cache
def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can make code for a device; warns where it cannot.

    The answer holds for the life of the process.
    """
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.zeros(1, device=device))
    except Exception as error:
        _warn("torch.compile does not work here", error)
        return False
    return True


def _is_of_compiler(error: Exception) -> bool:
    """Whether it was raised while compiling, before anything has run."""
    from torch._dynamo import exc  # takes seconds to import, and is there if anything was compiled

    return isinstance(error, exc.TorchDynamoException | exc.FailOnRecompileLimitHit)


def _warn(what: str, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    warnings.warn(
        f"compile=True cannot do what it should: {what} ({reason}). Steps run without it there, "
        f"with the same results to rounding. On a CPU it needs a C++ compiler such as g++, on "
        f"CUDA Triton. Install it, or leave compile out.",
        stacklevel=2,
    )
