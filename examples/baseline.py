"""What PowerSGD is compared with: torch.optim.SGD under DistributedDataParallel, uncompressed."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from examples.distributed import Workers

__all__ = ["CountedSGD", "data_parallel_sgd"]


class CountedSGD(torch.optim.SGD):
    """torch.optim.SGD that knows how many bytes were handed to all-reduces on its behalf."""

    bytes_sent = 0

    def communication_stats(self) -> dict[str, int]:
        """The figures that the examples read from either optimizer."""
        return {"total_bytes_sent": self.bytes_sent, "check_bytes_sent": 0}


def _count_and_average(
    optimizer: CountedSGD, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """DDP's usual all-reduce of a bucket of gradients; counts the bytes of the buffer."""
    buffer = bucket.buffer()
    optimizer.bytes_sent += buffer.numel() * buffer.element_size()
    work = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def data_parallel_sgd(
    model: nn.Module, groups: Iterable[dict[str, Any]], workers: Workers, **options: Any
) -> tuple[nn.Module, CountedSGD]:
    """Makes the optimizer, and wraps the model so that backward averages the gradients.

    Args:
        model: the model to train.
        groups: parameter groups.
        workers: with a single worker, the model is not wrapped.
        **options: arguments of torch.optim.SGD.

    Returns:
        The model to call in training, and the optimizer.
    """
    optimizer = CountedSGD(groups, **options)
    if workers.world_size == 1:
        return model, optimizer
    with warnings.catch_warnings():
        # torch 2.13 deprecates this argument in favor of one that earlier versions lack. Buffers
        # are averaged before each test instead of broadcast before each batch.
        warnings.simplefilter("ignore", FutureWarning)
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    parallel.register_comm_hook(optimizer, _count_and_average)
    return parallel, optimizer
