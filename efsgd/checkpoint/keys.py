"""What an `OptimizerState` puts into a checkpoint, and whether a checkpoint fits an optimizer.

The keys, after the name that the program gives to the optimizer:

    efsgd_world_size            the number of workers that saved
    param_groups                settings and names of parameters, as one object
    state.NAME.KIND             momentum_buffer, momentum_started, q: equal on all workers
    errors.worker W of N.NAME   the error of worker W
    errors.worker W of N.NAME.local_momentum    its local momentum, of a Signum

NAME is what torch.distributed.checkpoint calls the parameter: without the prefixes that wrappers of
modules add.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

#: Key of the number of workers that saved.
WORLD_SIZE = "efsgd_world_size"


#: Key of the parameter groups, with names in place of parameters.
GROUPS = "param_groups"


#: Key of what is equal on all workers.
STATE = "state"


#: Key of what each worker has of its own.
ERRORS = "errors"


#: What depends on a parameter's rank, of its state.
FACTORS = ("q", "p")


def owner_key(worker: int, world_size: int) -> str:
    """The part of a key that says whose an error is.

    Example:
        >>> from efsgd.checkpoint.keys import owner_key, owner_numbers
        >>> owner_numbers(owner_key(2, world_size=8))
        (2, 8)
    """
    return f"worker {worker} of {world_size}"


def owner_numbers(owner: str) -> tuple[int, int]:
    """The worker and the number of workers that `owner_key` has put into words."""
    _, worker, _, world_size = owner.split(" ")
    return int(worker), int(world_size)


def local_key(name: str, kind: str) -> str:
    """The part of a key that says which parameter's error or local momentum it is.

    Args:
        name: of the parameter.
        kind: one of `efsgd.engine.state.LOCAL_STATE`.
    """
    return name if kind == "error" else f"{name}.{kind}"


def optimizers_in(
    state_dict: MutableMapping[str, Any], start: str = ""
) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """All optimizers in a nested dict, each with what its keys in a checkpoint start with.

    Args:
        state_dict: in which some dicts are from `OptimizerState.state_dict`.
        start: of the keys of `state_dict` itself.
    """
    if WORLD_SIZE in state_dict:
        yield start, state_dict
        return
    for key, value in state_dict.items():
        if isinstance(value, MutableMapping):
            yield from optimizers_in(value, f"{start}{key}.")


def adopt_factors_(start: str, part: MutableMapping[str, Any], metadata: Metadata) -> None:
    """Makes room for the factors and errors that a checkpoint has, at whatever ranks it has them.

    The ranks themselves come from it too, with all settings of the groups; so there may be a factor
    where the optimizer has none yet, and none where it has one.

    Args:
        start: what the optimizer's keys start with.
        part: from `OptimizerState.state_dict` (modified in place); its tensors are left alone.
        metadata: of the checkpoint.
    """
    [(own, errors)] = part[ERRORS].items()
    saved = {key.removeprefix(start): value for key, value in metadata.state_dict_metadata.items()}
    first = next((key for key in saved if key.startswith(f"{ERRORS}.")), "")
    owner = first.removeprefix(f"{ERRORS}.").partition(".")[0]
    state, local = {}, dict(errors)
    for name, kept in part[STATE].items():
        state[name] = dict(kept)
        places = [(state[name], kind, f"{STATE}.{name}.{kind}") for kind in FACTORS]
        for place, kind, key in (*places, (local, name, f"{ERRORS}.{owner}.{name}")):
            there, here = saved.get(key), place.get(kind)
            if there is None:
                place.pop(kind, None)
            elif isinstance(there, TensorStorageMetadata) and _is_of_another_rank(there, here):
                like = [own for own in kept.values() if isinstance(own, Tensor) and own.dim() > 0]
                device = like[0].device if like else torch.device("cpu")  # moved when loaded
                place[kind] = torch.empty(there.size, dtype=there.properties.dtype, device=device)
    part[STATE], part[ERRORS] = state, {own: local}


def _is_of_another_rank(there: TensorStorageMetadata, here: Tensor | None) -> bool:
    return here is None or (len(there.size) == 2 == here.dim() and there.size[0] == here.shape[0])


def check_fit(start: str, part: Mapping[str, Any], metadata: Metadata) -> int:
    """Compares keys and shapes of an optimizer with those in a checkpoint, before it is read.

    Args:
        start: what the optimizer's keys start with.
        part: from `OptimizerState.state_dict`.
        metadata: of the checkpoint.

    Returns:
        The number of workers whose errors the checkpoint has; the present one if it has none.

    Raises:
        ValueError: the checkpoint is of another kind, or of another optimizer.
    """
    keys = {key for key in metadata.state_dict_metadata if key.startswith(start)}
    if start + WORLD_SIZE not in keys:
        raise ValueError(
            f"The checkpoint has no optimizer under {start.removesuffix('.')!r} that was saved as "
            f"an efsgd.checkpoint.distributed.OptimizerState. What was saved with "
            f"get_optimizer_state_dict is to be loaded with set_optimizer_state_dict."
        )
    of_state, of_errors = f"{start}{STATE}.", f"{start}{ERRORS}."
    saved = {key for key in keys if key.startswith((of_state, of_errors))}
    owners = {k.removeprefix(of_errors).partition(".")[0] for k in saved if k.startswith(of_errors)}
    [(own, errors)] = part[ERRORS].items()
    world_size = max(owner_numbers(owner)[1] for owner in owners or {own})
    wanted = {
        f"{of_state}{name}.{kind}": value
        for name, kept in part[STATE].items()
        for kind, value in kept.items()
    }
    for worker in range(world_size):
        of_owner = f"{of_errors}{owner_key(worker, world_size)}."
        wanted |= {f"{of_owner}{name}": error for name, error in errors.items()}
    problems = [f"it lacks {key}" for key in wanted if key not in saved]
    problems += [f"it has {key}, unlike the optimizer" for key in sorted(saved - wanted.keys())]
    problems += _other_shapes(wanted, metadata)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"The checkpoint does not fit the optimizer: {problems[0]}{more}. Make model and "
            f"optimizer as they were when it was saved: with the same parameters, and with the "
            f"settings on which the state depends, such as momentum."
        )
    return world_size


def _other_shapes(wanted: Mapping[str, Any], metadata: Metadata) -> Iterator[str]:
    for key, value in wanted.items():
        there = metadata.state_dict_metadata.get(key)
        if not (isinstance(there, TensorStorageMetadata) and isinstance(value, Tensor)):
            continue  # DCP reads other objects whatever they are
        if there.size != value.shape:
            shapes = f"{list(there.size)} there and {list(value.shape)} in the optimizer"
            yield f"the shape of {key} is {shapes}"
