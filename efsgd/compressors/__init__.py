"""Compressors: what an error-feedback SGD can send in place of a gradient."""

from efsgd.algorithms.interfaces import Aggregator, Claims, Compressed, Compressor, Placement
from efsgd.compressors.identity import Identity
from efsgd.compressors.lq_sgd import LQSGD
from efsgd.compressors.powersgd import PowerSGD
from efsgd.compressors.powersgd_plus import PowerSGDPlus
from efsgd.compressors.random_block import RandomBlock
from efsgd.compressors.random_k import RandomK
from efsgd.compressors.sign_norm import SignNorm
from efsgd.compressors.spectral_atomo import SpectralAtomo
from efsgd.compressors.symmetric_quantized import SymmetricQuantized
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.compressors.top_k import TopK
from efsgd.compressors.uniform_quantized import UniformQuantized

__all__ = [
    "LQSGD",
    "Aggregator",
    "Claims",
    "Compressed",
    "Compressor",
    "Identity",
    "Placement",
    "PowerSGD",
    "PowerSGDPlus",
    "RandomBlock",
    "RandomK",
    "SignNorm",
    "SpectralAtomo",
    "SymmetricQuantized",
    "TensorCompressor",
    "TopK",
    "UniformQuantized",
]
