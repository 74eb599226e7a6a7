"""Who carries collectives: a torch.distributed process group, or nobody."""

from collections.abc import Callable
from typing import TypeAlias, cast

import torch.distributed as dist
from torch import Tensor

from efsgd.errors import CollectiveError
from efsgd.wire.calls import Call
from efsgd.wire.collectives import Collective, Transport

if dist.is_available():
    # torch imports this by itself when the first optimizer is made. If that is after
    # init_process_group, its functions keep the group as a default argument: it then outlives
    # destroy_process_group, and its threads may abort the process at exit.
    import torch.distributed.nn.functional  # noqa: F401 (imported for its effect)

#: What is accepted as the workers: a process group, a transport, or None for the default group.
Workers: TypeAlias = "dist.ProcessGroup | Transport | None"


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

    def start(self, collective: Collective) -> Callable[[], Tensor]:
        """Answers at once, from the buffer itself."""
        return lambda: collective.combine([collective.buffer])[0]


class ProcessGroup:
    """The workers of a ``torch.distributed`` process group.

    Attributes:
        group: the process group.
        world_size: the number of its workers.
        worker: this worker.

    Args:
        group: the process group; None is the default group.

    Raises:
        ValueError: this process is not a member of `group`.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group: dist.ProcessGroup | None = dist.group.WORLD if group is None else group
        self.world_size: int = dist.get_world_size(group)
        self.worker: int = dist.get_rank(group)
        self._call: Call | None = None
        if self.worker < 0:
            raise ValueError(
                "process_group does not contain this process. Construct the optimizer only on "
                "the members of its group, or pass the group that this process belongs to."
            )

    def begin(self, call: str) -> None:
        """What follows belongs to this call, which every worker of the group makes."""
        self._call = Call(call, self.group, self.worker)

    def start(self, collective: Collective) -> Callable[[], Tensor]:
        """Starts `collective` asynchronously on the group.

        Raises:
            CollectiveError: (also from the returned function) the collective failed or timed out.
        """
        try:
            work, answer = collective.launch(self.group)
        except RuntimeError as error:
            raise CollectiveError(
                f"{type(collective).__name__} of {collective.purpose} could not be started on "
                f"worker {self.worker} of {self.world_size}: {error}."
            ) from error

        def wait() -> Tensor:
            try:
                if self._call is None or collective.buffer.device.type != "cpu":
                    work.wait()
                else:
                    self._call.wait_for(work)
                return answer()
            except RuntimeError as error:
                raise self._failure(collective, error) from error

        return wait

    def _failure(self, collective: Collective, error: RuntimeError) -> CollectiveError:
        call, elsewhere = "an exchange", ""
        if self._call is not None:
            call = self._call.name
            self._call.tell(call)
            elsewhere = self._call.who_is_elsewhere()
        found = str(error) if elsewhere in str(error) else f"{elsewhere}. {error}"
        return CollectiveError(
            f"{type(collective).__name__} of {collective.purpose} failed on worker {self.worker} "
            f"of {self.world_size} in {call}: {found}. Every worker of the group must call {call}, "
            f"at the same place among its calls and not within 'if rank == 0:'. If all of them "
            f"do, another worker has probably died or hung."
        )


def transport_of(workers: Workers = None) -> Transport:
    """The transport in force, wherever a process group is accepted.

    Args:
        workers: a transport is returned as it is, if there are several workers. A process group,
            or None for the default group, gives a `ProcessGroup` where it has several workers.

    Returns:
        `Alone` where there is one worker.

    Raises:
        RuntimeError: a group is given, but torch.distributed is not initialised any more.
    """
    transport: Transport
    if workers is not None and is_transport(workers):
        transport = cast(Transport, workers)
    elif not (dist.is_available() and dist.is_initialized()):
        if workers is not None:
            raise RuntimeError(
                "The optimizer has a process_group, but torch.distributed is not initialised: the "
                "group is gone. Assign another one, or None for the default group, to "
                "optimizer.process_group."
            )
        return _ALONE
    else:
        transport = ProcessGroup(cast("dist.ProcessGroup | None", workers))
    return transport if transport.world_size > 1 else _ALONE


def is_transport(workers: object) -> bool:
    """Whether this is a `Transport` and no process group, which has no `start`."""
    return hasattr(workers, "start") and hasattr(workers, "world_size")


def validate_workers(workers: object) -> None:
    """Checks what is given as `process_group`, or what torch gives those that are not in it.

    Raises:
        TypeError: it is neither a process group nor a `Transport`.
    """
    if workers is None or is_transport(workers):
        return
    if dist.is_available() and (
        isinstance(workers, dist.ProcessGroup) or workers is dist.GroupMember.NON_GROUP_MEMBER
    ):
        return
    raise TypeError(
        f"Invalid process_group: {workers!r}. Must be what torch.distributed.new_group() returned, "
        f"an efsgd.wire.collectives.Transport, or None for the default group."
    )


_ALONE = Alone()
