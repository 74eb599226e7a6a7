"""A process group of one's own, with the workers of another one."""

import torch
import torch.distributed as dist


def own_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A new group of gloo with the same workers, in which another thread may exchange something.

    Every worker of `group` calls it. None where no gloo carries what is on CPUs.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialised. Call init_process_group first, as "
            "DistributedDataParallel needs it."
        )
    whole = dist.group.WORLD if group is None else group
    assert whole is not None
    try:  # a group may have several backends, by device
        backend = whole._get_backend(torch.device("cpu"))
    except RuntimeError:
        return None
    if backend.name() != "gloo":
        return None
    options = getattr(backend, "options", None)
    own: dist.ProcessGroup = dist.new_group(
        dist.get_process_group_ranks(whole),
        timeout=getattr(options, "_timeout", None),
        backend="gloo",
        use_local_synchronization=whole is not dist.group.WORLD,
        group_desc="efsgd",
    )
    return own


def end_own_group(own: dist.ProcessGroup, group: dist.ProcessGroup | None) -> None:
    """Ends what `own_group` has made of a group, where another one may be made after it.

    torch names groups of some workers by these workers: the next one would find the addresses of
    the last, and wait for them.
    """
    if group is None or group is dist.group.WORLD:
        dist.destroy_process_group(own)
