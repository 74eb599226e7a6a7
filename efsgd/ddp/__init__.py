"""Compression during the backward pass, as a communication hook of DistributedDataParallel."""

from efsgd.ddp.hook import CompressionState, compress

__all__ = ["CompressionState", "compress"]
