"""No compression, for comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from efsgd.algorithms.interfaces import Claims
from efsgd.compressors.tensor_compressor import TensorCompressor


@dataclass(frozen=True)
class Identity(TensorCompressor):
    """Sends all tensors as they are, in one all-reduce; there are no errors to keep.

    With it, error-feedback SGD is SGD with the workers' mean gradient: the baseline of comparisons.

    Example:
        >>> from efsgd.compressors.identity import Identity
        >>> Identity().payload_bytes([(64, 27), (64,)])
        7168
    """

    def compresses(self, shape: Sequence[int]) -> bool:
        return False

    def claims(self) -> Claims:
        """It is averaged, and nothing is left out."""
        return Claims(averages=True, is_unbiased=True, contraction=lambda shape: 1.0, linear=True)
