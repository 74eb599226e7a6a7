"""Compressed activations and gradients between the stages of a pipeline, in torch's own engine.

`CompressedStage` takes the place of `torch.distributed.pipelining.PipelineStage`, under every
schedule of torch's.
"""

from efsgd.pipeline.link import Link
from efsgd.pipeline.stage import CompressedStage

__all__ = ["CompressedStage", "Link"]
