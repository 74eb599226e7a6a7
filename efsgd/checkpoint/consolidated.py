"""One checkpoint for any number of workers.

`optimizer.state_dict()` belongs to one worker, for its errors are its own. The other workers need
only the mean of all errors: everything that is ever sent depends on the workers through the mean of
gradient and error alone, as far as the compressor is linear. So a dict that holds this mean, loaded
on every worker, continues the run on any number of them: exactly but for rounding with PowerSGD,
and with every compressor without losing anything of what was to be sent.

Signum's momenta are each worker's own as well, and are averaged in the same way.
"""

import copy
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from efsgd.engine.parameters import device_of
from efsgd.engine.state import local_state
from efsgd.errors import warn_user
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.wire.collectives import AllReduceMean, Exchange, run
from efsgd.wire.compare import compare

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


def average_errors_(optimizer: ErrorFeedbackOptimizer) -> None:
    """Gives every worker the mean of all workers' errors, or of their local momenta.

    Every worker of the optimizer's group must call it, between the same two steps. From then until
    the next step any single worker's `state_dict()` is a checkpoint for any number of workers, and
    equal to that of every other. Training continues as it would have, but for rounding: see above.

    As a hook it makes every `state_dict()` such a checkpoint, where all workers call that method
    (a worker that calls it alone waits for the others)::

        optimizer.register_state_dict_pre_hook(average_errors_)

    Like all hooks of an optimizer it is neither copied nor pickled with it.

    Args:
        optimizer: whose errors or local momenta are replaced (modified in place). Its groups note
            that these are no worker's own; nothing else changes. Its next step begins with a
            comparison of the workers.

    Raises:
        CollectiveError: a collective failed; nothing has changed on this worker.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.checkpoint import average_errors_
        >>> model = torch.nn.Linear(32, 32)
        >>> optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum_form="sgd")
        >>> average_errors_(optimizer)
        >>> hook = optimizer.register_state_dict_pre_hook(average_errors_)
    """
    run_between_steps(averaging_(optimizer), optimizer, "average_errors_()")


def averaging_(optimizer: ErrorFeedbackOptimizer) -> Exchange[None]:
    """`average_errors_` as an exchange, for any driver."""
    optimizer = unwrapped(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {p: optimizer.state[p] for p in parameters if p in optimizer.state}
    means = yield from local_means(states, optimizer)
    for parameter, mean in means.items():
        state = dict(states[parameter])
        for name, value in mean.items():
            state[name] = state[name].contiguous()  # it may be zeros that share their memory
            state[name].copy_(value)
        # Another dict, so that the next step looks at it anew: an error that waits to be sent
        # uncompressed may have been zero on this worker.
        optimizer.state[parameter] = state
    optimizer.plan_change()
    notes = optimizer.engine.notes
    notes.worker, notes.world_size = 0, 0
    notes.write_counters(optimizer.param_groups)


def consolidated_state_dict(optimizer: ErrorFeedbackOptimizer) -> dict[str, Any]:
    """A state_dict that can be loaded on any number of workers.

    Every worker of the optimizer's group must call it, between the same two steps. All get equal
    dicts, so it suffices that one of them saves it. Load it on every worker with
    `optimizer.load_state_dict`.

    Args:
        optimizer: not modified.

    Returns:
        A copy of `optimizer.state_dict()` in which every error, and every local momentum, is the
        mean over the workers. Its tensors are contiguous, but for momentum buffers of parameters
        that are not, such as channels_last ones: as in torch.optim.SGD these are like the
        parameters.

    Raises:
        CollectiveError: a collective failed.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.checkpoint import consolidated_state_dict
        >>> model = torch.nn.Linear(32, 32)
        >>> optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum_form="sgd")
        >>> optimizer.load_state_dict(consolidated_state_dict(optimizer))
    """
    return run_between_steps(consolidation(optimizer), optimizer, "consolidated_state_dict()")


def consolidation(optimizer: ErrorFeedbackOptimizer) -> Exchange[dict[str, Any]]:
    """`consolidated_state_dict` as an exchange, for any driver."""
    saved = optimizer.state_dict()
    means = yield from local_means(states_in(saved), unwrapped(optimizer))
    state = {key: {**own, **means.get(key, {})} for key, own in saved["state"].items()}
    consolidated = copy.deepcopy({**saved, "state": state})
    for group in consolidated["param_groups"]:
        group.update(worker=0, world_size=0)
    return consolidated


def states_in(state_dict: Mapping[str, Any]) -> dict[int, dict[str, Tensor]]:
    """The states in a `state_dict()` by position, in the same order on every worker."""
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    return {key: state_dict["state"][key] for key in keys if key in state_dict["state"]}


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, where it is within one that adds noise to gradients."""
    return getattr(optimizer, "original_optimizer", optimizer)


def require_optimizer(optimizer: object) -> None:
    """Raises TypeError unless it is an optimizer of this package."""
    if not isinstance(optimizer, ErrorFeedbackOptimizer):
        raise TypeError(
            f"Invalid optimizer: {type(optimizer).__name__}. Must be an optimizer of efsgd, which "
            f"keeps errors or local momenta. Save others with their own state_dict(), and beside "
            f"them the GradientAverager that exchanges their gradients with this function."
        )


def run_between_steps(exchange: Exchange[T], optimizer: ErrorFeedbackOptimizer, call: str) -> T:
    """Runs an exchange about local state, once errors of other workers are left out of it."""
    optimizer = unwrapped(optimizer)
    require_optimizer(optimizer)
    transport = optimizer.transport
    note = optimizer.settle_errors(transport.world_size, transport.worker)
    result = run(exchange, transport, call)
    if note is not None:  # as an error, a warning must not keep the others waiting
        warn_user(note)
    return result


def local_means(
    states: Mapping[Key, Mapping[str, Tensor]], optimizer: ErrorFeedbackOptimizer
) -> Exchange[dict[Key, dict[str, Tensor]]]:
    """The means over the workers of what is local in `states`, which are left as they are."""
    lines, same_kind = [], defaultdict[tuple[Any, ...], list[tuple[Key, str, Tensor]]](list)
    for number, (key, own) in enumerate(states.items()):
        for name in (name for name in local_state(optimizer.compressor) if name in own):
            value = own[name]
            lines.append(f"{name} of parameter {number}: {list(value.shape)}, {value.dtype}")
            same_kind[value.device, value.dtype].append((key, name, value))
    yield from compare(lines, device_of(optimizer.param_groups))
    means: dict[Key, dict[str, Tensor]] = {key: {} for key in states}
    for found in same_kind.values():
        flat = torch.cat([value.reshape(-1) for *_, value in found])
        parts = (yield AllReduceMean(flat, "errors")).split([v.numel() for *_, v in found])
        for (key, name, value), part in zip(found, parts, strict=True):
            means[key][name] = part.view(value.shape)
    return means
