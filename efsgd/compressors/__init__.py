"""Compressors: what an error-feedback SGD can send in place of a gradient."""

from efsgd.compressors.base import Aggregator, Compressed, Compressor
from efsgd.compressors.powersgd import PowerSGD

__all__ = ["Aggregator", "Compressed", "Compressor", "PowerSGD"]
