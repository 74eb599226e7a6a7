"""A process group of one's own, with the workers of another one."""

import torch
import torch.distributed as dist


def own_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A new group with the same workers: collectives of other threads do not come in between.

    Every worker of `group` calls it. On gloo only: elsewhere one communicator is safer.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialised. Call init_process_group first, as "
            "DistributedDataParallel needs it."
        )
    if dist.get_backend(group) != "gloo":
        return group
    whole = dist.group.WORLD if group is None else group
    assert whole is not None
    options = getattr(whole._get_backend(torch.device("cpu")), "options", None)
    own: dist.ProcessGroup = dist.new_group(
        dist.get_process_group_ranks(whole),
        timeout=getattr(options, "_timeout", None),
        backend="gloo",
        use_local_synchronization=group is not None,
        group_desc="efsgd",
    )
    return own
