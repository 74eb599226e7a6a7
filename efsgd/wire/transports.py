"""Who carries collectives: a torch.distributed process group, or nobody."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from efsgd.errors import CollectiveError
from efsgd.wire.collectives import AllGather, AllReduceMean, AllToAll, Broadcast, Collective

if dist.is_available():
    # torch imports this by itself when the first optimizer is made. If that is after
    # init_process_group, its functions keep the group as a default argument: it then outlives
    # destroy_process_group, and its threads may abort the process at exit.
    import torch.distributed.nn.functional  # noqa: F401 (imported for its effect)


class Alone:
    """A group of one worker: every collective is answered by its own buffer, nothing is sent.

    Example:
        >>> from efsgd.wire.collectives import AllReduceMean
        >>> from efsgd.wire.transports import Alone
        >>> Alone().start(AllReduceMean(torch.tensor([1.0, 2.0]), "an example"))()
        tensor([1., 2.])
    """

    world_size = 1
    worker = 0
    group: dist.ProcessGroup | None = None

    def start(self, collective: Collective) -> Callable[[], Tensor]:
        """Answers at once with the buffer itself (stacked, for an `AllGather`)."""
        if isinstance(collective, AllGather):
            return lambda: collective.buffer.unsqueeze(0)
        return lambda: collective.buffer


class ProcessGroup:
    """The workers of a ``torch.distributed`` process group.

    Attributes:
        group: the process group.
        world_size: the number of its workers.
        worker: this worker.

    Args:
        group: the process group; None is the default group.

    Raises:
        ValueError: this process is not a info of `group`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group: dist.ProcessGroup | None = dist.group.WORLD if group is None else group
        self.world_size: int = dist.get_world_size(group)
        self.worker: int = dist.get_rank(group)
        if self.worker < 0:
            raise ValueError(
                "process_group does not contain this process. Construct the optimizer only on "
                "the infos of its group, or pass the group that this process belongs to."
            )

    def start(self, collective: Collective) -> Callable[[], Tensor]:
        """Starts `collective` asynchronously on the group.

        Raises:
            CollectiveError: (also from the returned function) the collective failed or timed out.
        """
        try:
            answer, work = self._launch(collective)
        except RuntimeError as error:
            raise self._failure(collective, error) from error

        def wait() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failure(collective, error) from error
            if isinstance(collective, AllReduceMean):
                answer.div_(self.world_size)
            return answer

        return wait

    def _launch(self, collective: Collective) -> tuple[Tensor, Any]:
        buffer, group = collective.buffer, self.group
        match collective:
            case AllReduceMean():
                # A sum that is divided later: gloo has no mean.
                return buffer, dist.all_reduce(buffer, group=group, async_op=True)
            case AllGather():
                gathered = buffer.new_empty((self.world_size, *buffer.shape))
                parts = list(gathered.unbind(0))
                return gathered, dist.all_gather(parts, buffer, group=group, async_op=True)
            case AllToAll():
                rows = buffer.new_empty(buffer.shape)
                return rows, dist.all_to_all_single(rows, buffer, group=group, async_op=True)
            case Broadcast(source=source):
                work = dist.broadcast(buffer, group_src=source, group=group, async_op=True)
                return buffer, work

    def _failure(self, collective: Collective, error: RuntimeError) -> CollectiveError:
        return CollectiveError(
            f"{type(collective).__name__} of {collective.purpose} failed on worker {self.worker} "
            f"of {self.world_size}: {error}. Another worker has probably died or "
            f"hung, or its settings were changed alone, so that it called something else."
        )


def current_transport(group: dist.ProcessGroup | None = None) -> Alone | ProcessGroup:
    """The transport in force: `ProcessGroup` where there are several workers, else `Alone`.

    Args:
        group: the process group; None is the default group.

    Raises:
        RuntimeError: a group is given, but torch.distributed is not initialised any more.
    """
    if group is not None and not dist.is_initialized():
        raise RuntimeError(
            "The optimizer has a process_group, but torch.distributed is not initialised: the "
            "group is gone. Assign another one, or None for the default group, to "
            "optimizer.process_group."
        )
    if not (dist.is_available() and dist.is_initialized()):
        return Alone()
    transport = ProcessGroup(group)
    return transport if transport.world_size > 1 else Alone()
