"""Compressors: what an error-feedback SGD can send in place of a gradient."""

from efsgd.compressors.base import Aggregator, Claims, Compressed, Compressor
from efsgd.compressors.powersgd import PowerSGD
from efsgd.compressors.tensor_compressor import TensorCompressor

__all__ = ["Aggregator", "Claims", "Compressed", "Compressor", "PowerSGD", "TensorCompressor"]
