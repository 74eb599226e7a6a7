"""Buffers of a model, such as BatchNorm's statistics, which no optimizer knows of."""

import torch
from torch import Tensor

from efsgd.wire.collectives import AllReduceMean, Exchange, run
from efsgd.wire.compare import broadcast_values, compare
from efsgd.wire.transports import Workers, transport_of


def average_buffers(module: torch.nn.Module, process_group: Workers = None) -> None:
    """Gives all workers the mean of their floating-point buffers, and worker 0's other ones.

    Every worker of the group must call it, for example before an evaluation or a checkpoint.

    Args:
        module: the model (its buffers are modified in place).
        process_group: the workers; None is the default group. Without torch.distributed nothing
            happens.

    Raises:
        WorkerMismatchError: the workers' models have different buffers; nothing has changed.
        CollectiveError: a collective failed.

    Example:
        >>> from efsgd import average_buffers
        >>> average_buffers(torch.nn.BatchNorm1d(4))
    """
    run(buffer_exchange(module), transport_of(process_group), "average_buffers()")


@torch.no_grad()
def buffer_exchange(module: torch.nn.Module) -> Exchange[None]:
    """`average_buffers` as an exchange, for any driver."""
    named = dict(module.named_buffers())
    lines = [f"buffer {n}, {list(b.shape)}, {b.dtype}" for n, b in named.items()]
    tensors = [*named.values(), *module.parameters(), torch.zeros(0)]
    yield from compare(lines, tensors[0].device)
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for buffer in named.values():
        if buffer.is_floating_point():
            kinds.setdefault((buffer.device, buffer.dtype), []).append(buffer)
    for same_kind in kinds.values():
        flat = torch.cat([b.reshape(-1) for b in same_kind])
        mean = yield AllReduceMean(flat, "buffers")
        sizes = [b.numel() for b in same_kind]
        for buffer, part in zip(same_kind, mean.split(sizes), strict=True):
            buffer.copy_(part.view(buffer.shape))
    others = [buffer for buffer in named.values() if not buffer.is_floating_point()]
    yield from broadcast_values(others, source=0)
