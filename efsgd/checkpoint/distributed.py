"""Checkpoints of torch.distributed.checkpoint (DCP) that keep the errors of every worker.

DCP takes a plain tensor to be the same on all workers, and one of them writes it. That is true of
all but errors, or a Signum's local momenta: each worker has its own, and those of the others would
be lost without a word. Here they are stored under keys that say whose they are, so that each is
written once, by its owner, and everything else once in all; `efsgd.checkpoint.keys` has the keys.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from efsgd.checkpoint.keys import (
    ERRORS,
    GROUPS,
    STATE,
    WORLD_SIZE,
    adopt_factors_,
    check_fit,
    local_key,
    optimizers_in,
    owner_key,
    owner_numbers,
)
from efsgd.engine.state import LOCAL_STATE
from efsgd.errors import warn_user
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.optimizers.settings import LOCAL
from efsgd.wire.collectives import AllReduceMean, Exchange, Transport, run
from efsgd.wire.compare import compare
from efsgd.wire.transports import current_transport

_SUMS = "sums"  # in place of an owner: of the saved errors that this worker has read


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
        >>> from efsgd.checkpoint.distributed import ElasticLoadPlanner, OptimizerState
        >>> model = torch.nn.Linear(32, 32)
        >>> optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum=0.9)
        >>> folder = tempfile.TemporaryDirectory()
        >>> state = {"model": model, "optimizer": OptimizerState(model, optimizer)}
        >>> metadata = dcp.save(state, checkpoint_id=folder.name)
        >>> dcp.load(state, checkpoint_id=folder.name, planner=ElasticLoadPlanner())
        >>> folder.cleanup()
    """

    def __init__(self, model: nn.Module, optimizer: ErrorFeedbackOptimizer) -> None:
        if not isinstance(optimizer, ErrorFeedbackOptimizer):
            raise TypeError(
                f"Invalid optimizer: {type(optimizer).__name__}. Must be an optimizer of efsgd; "
                f"save others with torch.distributed.checkpoint.state_dict."
            )
        self._model, self._optimizer = model, optimizer
        self._names()

    def state_dict(self) -> dict[str, Any]:
        """What DCP is to save, or to load into: the optimizer's own tensors, not copies.

        It has what the module describes, of the errors only this worker's.
        """
        transport = current_transport(self._optimizer.process_group)
        note = self._optimizer.settle_errors(transport.world_size, transport.worker)
        if note is not None:
            warn_user(note)
        saved, names = self._optimizer.state_dict(), self._names()
        flat = [name for group in names for name in group]
        state: dict[str, dict[str, Any]] = {}
        errors: dict[str, Tensor] = {}
        for index, kept in saved[STATE].items():
            name, local = flat[index], [kind for kind in LOCAL_STATE if kind in kept]
            state[name] = {kind: value for kind, value in kept.items() if kind not in local}
            errors |= {local_key(name, kind): kept[kind] for kind in local}
        groups = zip(saved[GROUPS], names, strict=True)
        return {
            WORLD_SIZE: transport.world_size,
            # A tuple is one object to DCP: settings may come and go with versions of the package.
            GROUPS: tuple(_portable({**group, "params": own}) for group, own in groups),
            STATE: state,
            ERRORS: {owner_key(transport.worker, transport.world_size): errors},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what DCP has loaded into a `state_dict()`. Every worker must call it.

        Args:
            state_dict: from `state_dict()`, filled by `torch.distributed.checkpoint.load`.

        Raises:
            ValueError: it is of another kind, of other parameter groups or of another worker; the
                optimizer is as it was.
            WorkerMismatchError: the workers load different things.
        """
        if WORLD_SIZE not in state_dict:
            raise ValueError(
                "Invalid state_dict: it was not made by OptimizerState.state_dict. Load what "
                "optimizer.state_dict has made with optimizer.load_state_dict."
            )
        names, groups = self._names(), state_dict[GROUPS]
        _check_groups([list(group["params"]) for group in groups], names)
        transport = current_transport(self._optimizer.process_group)
        errors, is_mean = self._errors_in(state_dict, transport)
        is_mean |= groups[0]["world_size"] == 0  # averaged before it was saved
        whose = (0, 0) if is_mean else (transport.worker, transport.world_size)
        positions = {name: index for index, name in enumerate(itertools.chain(*names))}
        state: dict[int, dict[str, Any]] = {}
        for name, kept in state_dict[STATE].items():
            keys = ((kind, local_key(name, kind)) for kind in LOCAL_STATE)
            local = {kind: errors[key] for kind, key in keys if key in errors}
            state[positions[name]] = {**kept, **local}
        restored = []
        for group, own, now in zip(groups, names, self._optimizer.param_groups, strict=True):
            indices = [positions[name] for name in own]
            owner = dict(zip(LOCAL, whose, strict=True))
            restored.append({**_restored(group, now), **owner, "params": indices})
        self._optimizer.load_state_dict({STATE: state, GROUPS: restored})

    def _errors_in(
        self, state_dict: Mapping[str, Any], transport: Transport
    ) -> tuple[dict[str, Tensor], bool]:
        """The errors that this worker loads, and whether they are a mean."""
        saved_by, by_owner = state_dict[WORLD_SIZE], state_dict[ERRORS]
        errors: dict[str, Tensor]
        if _SUMS in by_owner:
            errors, scale = by_owner[_SUMS], transport.world_size / saved_by
            first = next(p for group in self._optimizer.param_groups for p in group["params"])
            run(_average_(errors, scale, first.device), transport)
            return errors, True
        owner = owner_key(transport.worker, transport.world_size)
        errors = by_owner.get(owner, {})
        if owner not in by_owner or (errors and saved_by != transport.world_size):
            raise ValueError(
                f"Invalid state_dict: {owner} cannot load the errors of {', '.join(by_owner)} "
                f"from a checkpoint of {saved_by}. Load it with planner=ElasticLoadPlanner(), on "
                f"every worker."
            )
        return errors, False

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
        found: Any = get_optimizer_state_dict(self._model, bearer)[GROUPS]
        return [list(group["params"]) for group in found]


class ElasticLoadPlanner(DefaultLoadPlanner):
    """Loads an `OptimizerState` that any number of workers saved; other things as DCP does.

    Where the number is another one, each saved error is read by one of the present workers and
    added to the others that it reads, and the workers average these sums. So no more is read than
    was saved, and the memory that it takes does not depend on how many workers saved. Ranks come
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
        self._sums: dict[str, Tensor] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Finds the optimizers in `state_dict` and decides which errors this worker reads."""
        assert metadata is not None
        self._sums, found = {}, []
        for start, part in optimizers_in(state_dict):
            adopt_factors_(start, part, metadata)
            saved_by = check_fit(start, part, metadata)
            part[STATE] = {name: _emptied(kept) for name, kept in part[STATE].items()}
            [(owner, errors)] = part[ERRORS].items()
            worker, world_size = owner_numbers(owner)
            if saved_by == world_size or not errors:
                part[ERRORS] = {owner: _emptied(errors)}
                continue
            sums = {name: _zeros_like(error) for name, error in errors.items()}
            for other in range(worker, saved_by, world_size):
                for name, total in sums.items():
                    self._sums[f"{start}{ERRORS}.{owner_key(other, saved_by)}.{name}"] = total
            part[ERRORS] = {}
            found.append((part, sums))
        super().set_up_planner(state_dict, metadata, is_coordinator)
        for key, total in self._sums.items():
            self.state_dict[key] = torch.empty_like(total, device="meta")
        for part, sums in found:
            part[ERRORS] = {_SUMS: sums}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where DCP is to put what it reads: for an error that is to be added, a new tensor."""
        total = self._sums.get(index.fqn)
        return super().lookup_tensor(index) if total is None else torch.empty_like(total)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Adds an error that has been read (a part of one, if it was saved in parts)."""
        total = self._sums.get(read_item.dest_index.fqn)
        if total is not None:
            ranges = zip(read_item.dest_offsets, read_item.lengths, strict=True)
            total[tuple(slice(first, first + length) for first, length in ranges)] += tensor
        super().commit_tensor(read_item, tensor)


def _check_groups(saved: Sequence[Sequence[str]], present: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless the same parameters are in the same groups."""
    listed = [
        [f"{name} in group {position}" for position, group in enumerate(groups) for name in group]
        for groups in (saved, present)
    ]
    for there, here in itertools.zip_longest(*listed, fillvalue="nothing"):
        if there != here:
            raise ValueError(
                f"The checkpoint has other parameter groups than the optimizer: {there}, where the "
                f"optimizer has {here}. Make the optimizer with the groups it was saved with."
            )


def _portable(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group, without what belongs to one worker or one device."""
    kept = {name: value for name, value in group.items() if name != "worker"}
    return {n: v.detach().cpu() if isinstance(v, Tensor) else v for n, v in kept.items()}


def _restored(group: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `_portable`: tensors on the devices of the present settings."""
    restored = dict(group)
    for name, value in group.items():
        if isinstance(value, Tensor) and isinstance(present.get(name), Tensor):
            restored[name] = value.to(present[name].device)
    return restored


def _emptied(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {n: torch.empty_like(t) if isinstance(t, Tensor) else t for n, t in tensors.items()}


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@torch.no_grad()
def _average_(sums: Mapping[str, Tensor], scale: float, device: torch.device) -> Exchange[None]:
    """Replaces sums of errors by the mean over all workers that saved one.

    Args:
        sums: of what this worker has read, [*shape] each (modified in place).
        scale: the number of workers that load, over that of those that saved.
        device: where buffers may live.
    """
    lines = [f"error of {name}, shape {list(t.shape)}, times {scale}" for name, t in sums.items()]
    yield from compare(lines, device)
    for total in sums.values():
        yield AllReduceMean(total.mul_(scale), "saved errors")
