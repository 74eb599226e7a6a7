"""What is compared with: optimizers of torch.optim under DistributedDataParallel, uncompressed."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from examples.distributed import Workers
from examples.optimizers import Wrapped
from examples.settings import Settings
from examples.training import parameter_groups


class CountedOptimizer(Wrapped):
    """An optimizer that knows how many bytes were handed to all-reduces on its behalf."""

    bytes_sent = 0

    def communication_stats(self) -> dict[str, int]:
        """The figures that the examples read from any optimizer."""
        return {"total_bytes_sent": self.bytes_sent, "check_bytes_sent": 0}


def _count_and_average(
    optimizer: CountedOptimizer, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """DDP's usual all-reduce of a bucket of gradients; counts the bytes of the buffer."""
    buffer = bucket.buffer()
    optimizer.bytes_sent += buffer.numel() * buffer.element_size()
    work = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def data_parallel(
    model: nn.Module, optimizer: torch.optim.Optimizer, workers: Workers
) -> tuple[nn.Module, CountedOptimizer]:
    """Wraps the model so that backward averages the gradients, and the optimizer to count bytes.

    Args:
        model: the model to train.
        optimizer: of its parameters.
        workers: with a single worker, the model is not wrapped.

    Returns:
        The model to call in training, and the optimizer to step.
    """
    counted = CountedOptimizer(optimizer)
    if workers.world_size == 1:
        return model, counted
    with warnings.catch_warnings():
        # torch 2.13 deprecates this argument in favor of one that earlier versions lack. Buffers
        # are averaged before each test instead of broadcast before each batch.
        warnings.simplefilter("ignore", FutureWarning)
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    parallel.register_comm_hook(counted, _count_and_average)
    return parallel, counted


def sgd(
    model: nn.Module, settings: Settings, seed: int, workers: Workers
) -> tuple[nn.Module, CountedOptimizer]:
    """torch.optim.SGD under DistributedDataParallel."""
    groups = parameter_groups(model, settings.weight_decay)
    return data_parallel(model, SGD(groups, **settings.of_sgd()), workers)
