"""Checkpoints of torch.distributed.checkpoint (DCP) that keep the errors of every worker.

DCP takes a plain tensor to be the same on all workers, and one of them writes it. Errors, and a
Signum's local momenta, are each worker's own. Here each is stored once, by its owner, and their
mean beside them, for any other number of workers. The keys, after the optimizer's name:

    efsgd_world_size            the number of workers that saved
    param_groups                settings and names of parameters, as one object
    state.NAME.KIND             momentum_buffer, momentum_started, q: equal on all workers
    errors.worker W of N.NAME   the error of worker W
    errors.mean.NAME            the mean of these, where N > 1
    errors.OWNER.NAME.KIND      other local state, such as a Signum's local_momentum

NAME is what DCP calls the parameter: without the prefixes that wrappers of modules add.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from efsgd.checkpoint.consolidated import (
    local_means,
    require_optimizer,
    run_between_steps,
    states_in,
)
from efsgd.engine.state import local_state
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.wire.collectives import Exchange

_WORLD_SIZE, _GROUPS, _STATE, _ERRORS = "efsgd_world_size", "param_groups", "state", "errors"
_MEAN = "mean"  # in place of the worker whose errors they are


class OptimizerState:
    """An optimizer as a `Stateful` of DCP: saved by all workers, with the errors of each.

    Put it in the dict that is handed to `torch.distributed.checkpoint.save`, `async_save` or
    `load`, on every worker. With `planner=ElasticLoadPlanner()` any number of workers can load
    what any number has saved; without it as many as saved it. DCP's `process_group` must have the
    workers of the optimizer.

    With equal numbers of workers a run continues to the bit. With another number every worker
    gets the mean of the errors, which continues it but for rounding: all that is sent depends on
    the workers through the mean of gradient and error alone, as far as the compressor is linear.

    Args:
        model: whose names of parameters are stored. They are the same whether it is wrapped
            (DistributedDataParallel, torch.compile) or not.
        optimizer: of parameters of `model`, all of them or some.

    Raises:
        TypeError: `optimizer` is not an optimizer of this package.
        ValueError: a parameter of `optimizer` does not belong to `model`.

    Example:
        >>> import tempfile, torch.distributed.checkpoint as dcp
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.checkpoint import ElasticLoadPlanner, OptimizerState
        >>> model = torch.nn.Linear(32, 32)
        >>> optimizer = PowerSGDOptimizer(
        ...     model.parameters(), lr=0.1, momentum=0.9, momentum_form="sgd"
        ... )
        >>> folder = tempfile.TemporaryDirectory()
        >>> state = {"model": model, "optimizer": OptimizerState(model, optimizer)}
        >>> metadata = dcp.save(state, checkpoint_id=folder.name)
        >>> dcp.load(state, checkpoint_id=folder.name, planner=ElasticLoadPlanner())
        >>> folder.cleanup()
    """

    def __init__(self, model: nn.Module, optimizer: ErrorFeedbackOptimizer) -> None:
        require_optimizer(optimizer)
        self._model, self._optimizer = model, optimizer
        self._names()

    def state_dict(self) -> dict[str, Any]:
        """What DCP is to save, or to load into: the optimizer's own tensors, not copies.

        Every worker must call it, as DCP does: of the errors it has this worker's, and the mean.

        Raises:
            CollectiveError: a collective failed.
        """
        return run_between_steps(self._saving(), self._optimizer, "state_dict()")

    def _saving(self) -> Exchange[dict[str, Any]]:
        transport, saved = self._optimizer.transport, self._optimizer.state_dict()
        names, kinds = self._names(), local_state(self._optimizer.compressor)
        flat = list(itertools.chain(*names))
        states = {flat[position]: own for position, own in states_in(saved).items()}
        local = {n: {k: v for k, v in own.items() if k in kinds} for n, own in states.items()}
        shared = {n: {k: v for k, v in own.items() if k not in kinds} for n, own in states.items()}
        errors = {_owner(transport.worker, transport.world_size): _flattened(local)}
        if transport.world_size > 1:  # one worker's own are the mean
            means = yield from local_means(local, self._optimizer)
            errors[_MEAN] = _flattened(means)
        groups = zip(saved[_GROUPS], names, strict=True)
        return {
            _WORLD_SIZE: transport.world_size,
            # A tuple is one object to DCP: settings may come and go with versions of the package.
            _GROUPS: tuple({**_moved(g, {}), "params": own, "worker": 0} for g, own in groups),
            _STATE: _flattened(shared),
            _ERRORS: errors,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what DCP has loaded into a `state_dict()`. Every worker must call it.

        Args:
            state_dict: from `state_dict()`, filled by `torch.distributed.checkpoint.load`.

        Raises:
            ValueError: it is of another kind, of other parameter groups or of another worker; the
                optimizer is as it was.
        """
        if _WORLD_SIZE not in state_dict:
            raise ValueError(
                "Invalid state_dict: it was not made by OptimizerState.state_dict. Load what "
                "optimizer.state_dict has made with optimizer.load_state_dict."
            )
        names, groups, saved_by = self._names(), state_dict[_GROUPS], state_dict[_WORLD_SIZE]
        _require_groups([group["params"] for group in groups], names)
        positions = {name: index for index, name in enumerate(itertools.chain(*names))}
        transport, owners = self._optimizer.transport, state_dict[_ERRORS]
        own = _owner(transport.worker, transport.world_size)
        source = own if own in owners or len(owners) > 1 else next(iter(owners))
        errors = owners.get(source)
        if errors is None or (source == own and errors and saved_by != transport.world_size):
            raise ValueError(
                f"Invalid state_dict: {own} cannot load the errors of {', '.join(owners)} from a "
                f"checkpoint of {saved_by}. Load it with planner=ElasticLoadPlanner(), on every "
                f"worker."
            )
        whose = {"worker": transport.worker, "world_size": transport.world_size}
        if source != own or groups[0]["world_size"] == 0:  # averaged now, or before it was saved
            whose = {"worker": 0, "world_size": 0}
        state = defaultdict[int, dict[str, Any]](dict)
        for key, value in (*state_dict[_STATE].items(), *errors.items()):
            name, kind = (key, "error") if key in positions else key.rsplit(".", 1)
            state[positions[name]][kind] = value
        restored = [
            {**_moved(group, now), **whose, "params": [positions[n] for n in group["params"]]}
            for group, now in zip(groups, self._optimizer.param_groups, strict=True)
        ]
        self._optimizer.load_state_dict({_STATE: dict(state), _GROUPS: restored})

    def _names(self) -> list[list[str]]:
        """What DCP calls the parameters of each group."""
        of_model = {id(parameter) for parameter in self._model.parameters()}
        own = [list(group["params"]) for group in self._optimizer.param_groups]
        for index, parameter in enumerate(p for group in own for p in group):
            if id(parameter) not in of_model:
                raise ValueError(
                    f"Invalid model: it does not have parameter {index} of the optimizer, of shape "
                    f"{list(parameter.shape)}. Pass the model whose parameters are optimized."
                )
        bearer = torch.optim.SGD([{"params": group} for group in own])
        bearer.state[next(itertools.chain(*own))] = {}  # of one without state DCP would take a step
        found: Any = get_optimizer_state_dict(self._model, bearer)[_GROUPS]
        return [list(group["params"]) for group in found]


class ElasticLoadPlanner(DefaultLoadPlanner):
    """Loads an `OptimizerState` that any number of workers saved; other things as DCP does.

    Where the number is another one, every worker reads the mean of the saved errors. Ranks come
    from the checkpoint. One that does not fit is refused before anything is read, and an optimizer
    changes only when everything has been read.

    Args:
        allow_partial_load: whether other things than optimizers may be missing, as in DCP's.

    Raises:
        ValueError: the checkpoint has no such optimizer, or one of other parameters, shapes or
            kinds of state. `load` raises it within a `CheckpointException`, on every worker.
    """

    def __init__(self, *, allow_partial_load: bool = False) -> None:
        super().__init__(allow_partial_load=allow_partial_load)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Finds the optimizers in `state_dict`, and decides what is read of each."""
        assert metadata is not None
        for start, part in _optimizers_in(state_dict):
            _make_room_(start, part, metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _owner(worker: int, world_size: int) -> str:
    return f"worker {worker} of {world_size}"


def _flattened(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What is kept for each parameter by the last part of its key."""
    return {
        name if kind == "error" else f"{name}.{kind}": value
        for name, kept in states.items()
        for kind, value in kept.items()
    }


def _optimizers_in(
    state_dict: MutableMapping[str, Any], start: str = ""
) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """All `OptimizerState.state_dict`s in a nested dict, each with what its keys start with."""
    if _WORLD_SIZE in state_dict:
        yield start, state_dict
        return
    for key, value in state_dict.items():
        if isinstance(value, MutableMapping):
            yield from _optimizers_in(value, f"{start}{key}.")


def _make_room_(start: str, part: MutableMapping[str, Any], metadata: Metadata) -> None:
    """Puts empty tensors into `part` (modified in place) for what it reads from a checkpoint.

    These are factors at whatever ranks they were saved, and the errors of this worker; or, where
    another number of workers saved, their mean. A ValueError where the checkpoint lacks some.
    """
    everything = metadata.state_dict_metadata.items()
    saved = {key.removeprefix(start): value for key, value in everything if key.startswith(start)}
    if _WORLD_SIZE not in saved:
        raise ValueError(
            f"The checkpoint has no optimizer under {start.removesuffix('.')!r} that was saved as "
            f"an efsgd.checkpoint.OptimizerState. Load what get_optimizer_state_dict returned with "
            f"set_optimizer_state_dict."
        )
    own = next(owner for owner in part[_ERRORS] if owner != _MEAN)
    owners = {key.split(".")[1] for key in saved if key.startswith(f"{_ERRORS}.")}
    source = next((each for each in (own, _MEAN, _owner(0, 1)) if each in owners), own)
    names = [name for group in part[_GROUPS] for name in group["params"]]
    # What follows from ranks and compression comes from the checkpoint, as these do.
    factors = {f"{name}.{kind}" for name in names for kind in ("q", "p")}
    problems, room = list[str](), list[dict[str, Tensor]]()
    for section, here in ((_STATE, part[_STATE]), (f"{_ERRORS}.{source}", part[_ERRORS][own])):
        there = {
            key.removeprefix(f"{section}."): torch.empty(
                value.size, dtype=value.properties.dtype, device="cpu"
            )
            for key, value in saved.items()
            if key.startswith(f"{section}.") and isinstance(value, TensorStorageMetadata)
        }
        for key in {**here, **there}:
            what, is_optional = f"{start}{section}.{key}", key in factors or key in names
            if key not in here or key not in there:
                has = f"it has {what}, unlike the optimizer"
                problems += [] if is_optional else [f"it lacks {what}" if key in here else has]
                continue
            shapes = list(there[key].shape), list(here[key].shape)
            # Factors may be of another rank, or of as many matrices as the checkpoint counts.
            is_factor = shapes[0][:-1] == shapes[1][:-1] or len(shapes[0]) != len(shapes[1])
            if shapes[0] != shapes[1] and not (key in factors and is_factor):
                found = f"{shapes[0]} there and {shapes[1]} in the optimizer"
                problems.append(f"the shape of {what} is {found}")
        room.append(there)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"The checkpoint does not fit the optimizer: {problems[0]}{more}. Make model and "
            f"optimizer as they were when it was saved: with the same parameters, and with the "
            f"settings on which the state depends, such as momentum."
        )
    part[_STATE], part[_ERRORS] = room[0], {source: room[1]}


def _require_groups(saved: Sequence[Sequence[str]], present: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless the same parameters are in the same groups."""
    listed = [
        [f"{name} in group {number}" for number, group in enumerate(groups) for name in group]
        for groups in (saved, present)
    ]
    for there, here in itertools.zip_longest(*listed, fillvalue="nothing"):
        if there != here:
            raise ValueError(
                f"The checkpoint has other parameter groups than the optimizer: {there}, where the "
                f"optimizer has {here}. Make the optimizer with the groups it was saved with."
            )


def _moved(group: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group, tensors on the devices of those in `present`, or on the CPU."""
    return {
        name: v.to(getattr(present.get(name), "device", "cpu")) if isinstance(v, Tensor) else v
        for name, v in group.items()
    }
