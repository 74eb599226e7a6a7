"""What is kept for each parameter in `optimizer.state`, and its way into buffers and back.

`state[p]` holds tensors only, complete from construction, with equal keys on all workers:

    momentum_buffer   m, shape, dtype and order of dimensions of p; where the group has momentum
    momentum_started  bool []: whether m was ever updated (torch.optim.SGD's first is undampened)
    error             e_w, shape of p, float32 or float64; for compressed tensors
    q                 PowerSGD's warm-started Q, [m, r], float32 or float64; for compressed tensors
    p                 with `alternating=True` the warm-started P, [n, r], of the same dtype
    local_momentum    Signum's m_w, shape of p, float32 or float64; has a momentum_started as well

Errors and local momenta are each worker's own (`LOCAL_STATE`), all else is equal on all workers.

A complex parameter is worked on as its real view, [..., 2], and that is its error's shape, and its
local momentum's.

During training `error`, `q`, `p` and `local_momentum` are live views of batched buffers. Like any
optimizer's state they change with the next step: copy a state_dict (torch.save, copy.deepcopy) to
keep it.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.interfaces import Compressor
from efsgd.algorithms.low_rank.factors import resized
from efsgd.algorithms.majority_vote import LOCAL_FORM
from efsgd.engine.parameters import ParameterInfo, compute_dtype

#: What is kept for one parameter, by name.
State: TypeAlias = MutableMapping[str, Tensor]


#: What of it is each worker's own.
LOCAL_STATE = ("error", "local_momentum")


def complete_(state: State, info: ParameterInfo, compressor: Compressor) -> None:
    """Adds to one parameter's state what is missing in it, and fits the rest (modified in place).

    Raises:
        ValueError: a tensor in it has not the shape that the parameter asks for.
    """
    parameter, settings, entry = info.parameter, info.settings, info.entry(compressor)
    complete_momentum_(state, info)
    dtype, device = compute_dtype(parameter), parameter.device
    if "error" in state:
        require_tensor(state["error"], "error", info.name)
        require_shape(state["error"], info.shape, "error", info.name)
        state["error"] = state["error"].to(device=device, dtype=dtype)
    elif settings["error_feedback"] and entry.level is not None:
        state["error"] = torch.zeros(info.shape, dtype=dtype, device=device)
    if entry.level is None:
        return
    for name, initial in compressor.initial_state(entry, settings).items():
        kept = state.get(name)
        if kept is not None:
            require_tensor(kept, name, info.name)
        if kept is None or kept.shape != initial.shape:
            state[name] = initial if kept is None else _fitted(kept, initial, name, info.name)
        kind = (device, dtype) if initial.is_floating_point() else (initial.device, initial.dtype)
        state[name] = state[name].to(*kind).contiguous()


def _fitted(kept: Tensor, initial: Tensor, name: str, owner: str) -> Tensor:
    """A factor of another rank; anything else has the wrong shape."""
    is_fixed = name in LOCAL_STATE or kept.dim() != 2 or initial.dim() != 2
    if is_fixed or len(kept) != len(initial) or not kept.is_floating_point():
        require_shape(kept, initial.shape, name, owner)
    return resized(kept, initial)


def validate_states(
    listed: Iterable[ParameterInfo], states: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Checks what users may have put into the state, before anything is changed.

    Args:
        listed: the parameters.
        states: of the optimizer.

    Raises:
        TypeError: an entry is no tensor.
        ValueError: it has not the shape that its parameter asks for.
    """
    for info in listed:
        shapes = {"momentum_buffer": info.parameter.shape}
        shapes |= dict.fromkeys(LOCAL_STATE, info.shape)
        for name, value in states.get(info.parameter, {}).items():
            if name in shapes:
                require_tensor(value, name, info.name)
                require_shape(value, shapes[name], name, info.name)


def complete_momentum_(state: State, info: ParameterInfo) -> None:
    """The part of `complete_` for m, which users may replace between steps (modified in place).

    Raises:
        TypeError: it is no tensor.
        ValueError: its shape is not the parameter's.
    """
    if "momentum" not in info.group or info.group["momentum_form"] == LOCAL_FORM:
        return
    parameter, present = info.parameter, state.get("momentum_buffer")
    has_started = state.get("momentum_started")
    if has_started is not None:
        require_tensor(has_started, "momentum_started", info.name)
        require_shape(has_started, torch.Size(), "momentum_started", info.name)
    if present is None:
        if has_started is None or has_started:  # it goes with the buffer
            state["momentum_started"] = torch.tensor(False, device="cpu")
        if info.group["momentum"] != 0:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        return
    require_tensor(present, "momentum_buffer", info.name)
    require_shape(present, parameter.shape, "momentum_buffer", info.name)
    # One that is there, without a word or in place of our zeros, was given by the user.
    if has_started is None or (not has_started and not present.is_meta and bool(present.any())):
        state["momentum_started"] = torch.tensor(True, device="cpu")
    if not _is_like(present, parameter):
        state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        state["momentum_buffer"].copy_(present)


def _is_like(tensor: Tensor, parameter: Tensor) -> bool:
    return (
        tensor.shape == parameter.shape
        and tensor.dtype == parameter.dtype
        and tensor.device == parameter.device
        and (tensor.stride() == parameter.stride() or tensor.stride() == _dense_strides(parameter))
    )


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Those of a tensor made like it, which leaves no gaps in memory."""
    return torch.empty_like(parameter, device="meta").stride()


def release_zero_errors_(states: Iterable[State], kept: Sequence[Tensor] = ()) -> None:
    """Frees the memory of local state that is zero until `attach_` (modified in place).

    A fresh optimizer then never has it twice, in its state and in the buffers of its buckets.

    Args:
        states: of the parameters.
        kept: buffers that nothing is gained by freeing parts of.
    """
    addresses = {buffer.untyped_storage().data_ptr() for buffer in kept}
    for state in states:
        for name in LOCAL_STATE:
            value = state.get(name)
            if value is None or value.untyped_storage().data_ptr() in addresses:
                continue
            if not bool(value.any()):
                state[name] = value.new_zeros(()).expand(value.shape)


def attach_(bucket: Bucket, states: Mapping[int, State]) -> None:
    """Moves errors and the compressor's state into the buffers of a new bucket.

    Args:
        bucket: freshly made (modified in place).
        states: complete, by index; their tensors are replaced by views (modified in place).
    """
    bucket.state_views = bucket.aggregator.state()
    for entry in bucket.layout.entries:
        state = states[entry.index]
        for name, view in bucket.state_views.get(entry.index, {}).items():
            view.copy_(state[name])
            state[name] = view
        if bucket.errors is not None and entry.level is not None:
            bucket.errors.views[entry.index].copy_(state["error"])
        elif "error" in state:
            state["error"] = _apart(state["error"]).contiguous()
            if bool(state["error"].any()):
                bucket.pending_errors[entry.index] = state["error"]
    show_errors_(bucket, states)


def show_errors_(bucket: Bucket, states: Mapping[int, State]) -> None:
    """Makes each state's `error` a view of the buffer that is now the error memory."""
    if bucket.errors is not None:
        for index in bucket.compressed:
            view = bucket.errors.views[index]
            bucket.state_views[index]["error"] = states[index]["error"] = view


def adopt_replaced_(bucket: Bucket, states: Mapping[int, State]) -> None:
    """Takes over tensors that the user has put into a state in place of our views."""
    for index, shown in bucket.state_views.items():
        state = states[index]
        for name, view in shown.items():
            value = state.get(name)
            if value is not view:
                if value is not None:
                    require_tensor(value, name, f"parameter {index}")
                    require_shape(value, view.shape, name, f"parameter {index}")
                    view.copy_(value)
                state[name] = view


def detach_from_buffer_(state: State) -> None:
    """Moves the state of a frozen parameter out of the buffers it shared with others."""
    for name, value in state.items():
        state[name] = _apart(value)


def _apart(value: Tensor) -> Tensor:
    """A tensor that keeps no memory alive but its own: a copy, if it is part of a larger one."""
    is_part = value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if is_part else value


def drop_foreign_errors_(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    world_size: int,
    worker: int,
) -> str | None:
    """Zeroes loaded errors that are those of another worker (modified in place).

    If all workers kept them they would count several times, and in place of the workers' own. Local
    momenta are kept, whoever's they are: each is an estimate of the same mean gradient, counts
    once in each vote, and is soon forgotten.

    Args:
        groups: say whose errors these are. With one worker, they are the mean over the workers.
        state: of all parameters.
        world_size: the number of workers now.
        worker: this worker.

    Returns:
        What to warn of, if it was so.
    """
    saved = groups[0]["worker"], groups[0]["world_size"]
    if saved[1] <= 1 or saved == (worker, world_size):
        return None
    states = [own for own in state.values() if isinstance(own, Mapping)]
    errors, momenta = ([own[name] for own in states if name in own] for name in LOCAL_STATE)
    what, effect = "errors", "left out, and what they had yet to send is lost"
    if not any(map(torch.any, errors)):
        if not any(map(torch.any, momenta)):
            return None
        what, effect = "local momenta", "kept, but training goes on differently until they fade"
    for error in errors:
        error.zero_()
    return (
        f"The {what} that were loaded are those of worker {saved[0]} of {saved[1]}, and this is "
        f"worker {worker} of {world_size}: they were {effect}. "
        f"Save efsgd.checkpoint.consolidated_state_dict(optimizer), or call "
        f"efsgd.checkpoint.average_errors_(optimizer) on every worker before saving, or let every "
        f"worker save and load a state_dict of its own."
    )


def require_tensor(value: object, name: str, owner: str) -> None:
    """Raises TypeError unless an entry of the state of `owner` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Invalid {name} of {owner}: {value!r}. Must be a tensor, as state_dict() has it; or "
            f"delete all that optimizer.state has for the parameter, to start anew."
        )


def require_shape(value: Tensor, shape: torch.Size, name: str, owner: str) -> None:
    """Raises ValueError unless a tensor of the state of `owner` has this shape."""
    if value.shape != shape:
        raise ValueError(
            f"Invalid {name} of {owner}: its shape is {list(value.shape)} and must be "
            f"{list(shape)}. Load a state_dict of the same model, or delete all that "
            f"optimizer.state has for the parameter, to start anew."
        )
