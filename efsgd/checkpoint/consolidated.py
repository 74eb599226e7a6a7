"""One checkpoint for any number of workers.

`optimizer.state_dict()` belongs to one worker: its errors are its own, and loading each worker's
dict on the same number of workers continues a run to the bit. What the other workers need of
a worker's errors is only their mean: everything that is ever sent depends on the workers through
the mean of gradient and error alone, as far as the compressor is linear. So a dict that holds the
mean of the errors, loaded on every worker, continues the run on any number of them: exactly but for
rounding with PowerSGD, and with every compressor without losing anything of what was to be sent.
`consolidated_state_dict` makes such a dict. `average_errors_` has the optimizers themselves hold
the mean, so that what a framework saves on its own, one worker's `state_dict()`, is such a dict.

Signum's momenta are local like errors, and dealt with alike. Its workers then begin with one mean
momentum, an estimate of the same mean gradient as their own with less noise, and grow apart again.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from efsgd.engine.parameters import list_parameters
from efsgd.engine.state import LOCAL_STATE, State
from efsgd.errors import warn_user
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.wire.collectives import AllReduceMean, Exchange, run
from efsgd.wire.compare import compare
from efsgd.wire.transports import current_transport

T = TypeVar("T")


def average_errors_(optimizer: ErrorFeedbackOptimizer) -> None:
    """Gives every worker the mean of all workers' errors, or of their local momenta.

    Every worker of the optimizer's group must call it, between the same two steps. From then until
    the next step any single worker's `state_dict()` is a checkpoint for any number of workers, and
    equal to that of every other. Training goes on as it would have, but for rounding: see above.

    As a hook it makes every `state_dict()` such a checkpoint, where all workers call that method
    (a worker that calls it alone waits for the others)::

        optimizer.register_state_dict_pre_hook(average_errors_)

    Like all hooks of an optimizer it is neither copied nor pickled with it.

    Args:
        optimizer: whose errors or local momenta are replaced (modified in place). Its groups note
            that these are no worker's own; nothing else changes.

    Raises:
        CollectiveError: a collective failed; nothing has changed on this worker.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.checkpoint.consolidated import average_errors_
        >>> optimizer = PowerSGDOptimizer(torch.nn.Linear(32, 32).parameters(), lr=0.1)
        >>> average_errors_(optimizer)
        >>> hook = optimizer.register_state_dict_pre_hook(average_errors_)
    """
    _run(averaging_(optimizer), optimizer)


@torch.no_grad()
def averaging_(optimizer: ErrorFeedbackOptimizer) -> Exchange[None]:
    """`average_errors_` as an exchange, for any driver."""
    parameters = [info.parameter for info in list_parameters(optimizer.param_groups)]
    states = [optimizer.state[p] for p in parameters if p in optimizer.state]
    yield from _average_local_(states, parameters[0].device)
    for bucket in optimizer._engine.plan.buckets:
        for entry in bucket.layout.entries:
            # An error that waits to be sent uncompressed is looked for where it was not zero.
            if bucket.errors is None or entry.level is None:
                error = optimizer.state.get(bucket.parameters[entry.index], {}).get("error")
                if error is not None and bool(error.any()):
                    bucket.pending_errors[entry.index] = error
    _disown_(optimizer.param_groups)


def consolidated_state_dict(optimizer: ErrorFeedbackOptimizer) -> dict[str, Any]:
    """A state_dict that can be loaded on any number of workers.

    Every worker of the optimizer's group must call it, between the same two steps. All get equal
    dicts, so it suffices that one of them saves it. Load it on every worker with
    `optimizer.load_state_dict`.

    Args:
        optimizer: not modified.

    Returns:
        A copy of `optimizer.state_dict()` in which every error, and every local momentum, is the
        mean over the workers.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.checkpoint.consolidated import consolidated_state_dict
        >>> model = torch.nn.Linear(32, 32)
        >>> optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1)
        >>> optimizer.load_state_dict(consolidated_state_dict(optimizer))
    """
    return _run(consolidation(optimizer), optimizer)


@torch.no_grad()
def consolidation(optimizer: ErrorFeedbackOptimizer) -> Exchange[dict[str, Any]]:
    """`consolidated_state_dict` as an exchange, for any driver."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    states = state_dict["state"]
    device = next(list_parameters(optimizer.param_groups)).parameter.device
    listed = [states[key] for key in dict.fromkeys(keys) if key in states]
    yield from _average_local_(listed, device)
    _disown_(state_dict["param_groups"])
    return state_dict


def _run(exchange: Exchange[T], optimizer: object) -> T:
    """Runs an exchange about local state, of which errors of other workers are left out."""
    if not isinstance(optimizer, ErrorFeedbackOptimizer):
        raise TypeError(
            f"Invalid optimizer: {type(optimizer).__name__}. Must be one of this package, which "
            f"keeps errors or local momenta."
        )
    transport = current_transport(optimizer.process_group)
    note = optimizer.settle_errors(transport.world_size, transport.worker)
    result = run(exchange, transport)
    if note is not None:  # as an error, a warning must not keep the others waiting
        warn_user(note)
    return result


def _disown_(groups: Iterable[dict[str, Any]]) -> None:
    """Notes in the groups that local state is that of no worker in particular."""
    for group in groups:
        group.update(worker=0, world_size=0)


def _average_local_(states: Sequence[State], device: torch.device) -> Exchange[None]:
    """Replaces the local values in `states` by their means, once all of these are there."""
    found = [(n, s, name) for n, s in enumerate(states) for name in LOCAL_STATE if name in s]
    lines = [
        f"{name} of parameter {number}: {list(state[name].shape)}, {state[name].dtype}"
        for number, state, name in found
    ]
    yield from compare(lines, device)
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for _, state, name in found:
        value = state[name] = state[name].contiguous()  # it may be zeros that share their memory
        kinds.setdefault((value.device, value.dtype), []).append(value)
    means = []
    for values in kinds.values():
        flat = torch.cat([value.reshape(-1) for value in values])
        means.append((yield AllReduceMean(flat, "errors")))
    for values, mean in zip(kinds.values(), means, strict=True):
        parts = mean.split([value.numel() for value in values])
        for value, part in zip(values, parts, strict=True):
            value.copy_(part.view(value.shape))
