"""What is kept for each parameter in `optimizer.state`, and its way into buffers and back.

`state[p]` holds tensors only, complete from construction, with equal keys on all workers:

    momentum_buffer   m, shape and dtype of p; where the group has momentum
    momentum_started  bool []: whether m was ever updated (torch.optim.SGD's first is undampened)
    error             e_w, shape of p, float32 or float64; for compressed tensors
    q                 PowerSGD's warm-started Q, [m, r], float32 or float64; for compressed tensors

During training `error` and `q` are live views of batched buffers. Like any optimizer's state they
change with the next step: copy a state_dict (torch.save, copy.deepcopy) to keep it.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.arguments import compute_dtype
from efsgd.blocks import Entry
from efsgd.compressors import Compressor
from efsgd.error_feedback import Section

__all__ = ["Member", "attach_", "complete_", "exact_copy", "members", "refuse_overwritten"]

State = MutableMapping[str, Tensor]


@dataclass(frozen=True)
class Member:
    """One parameter of an optimizer.

    Attributes:
        index: its position over all groups.
        parameter: the tensor.
        group: its parameter group.
        name: for messages: its name if the optimizer knows names, and its index.
    """

    index: int
    parameter: Tensor
    group: dict[str, Any]
    name: str


def members(groups: list[dict[str, Any]]) -> Iterator[Member]:
    """All parameters of all groups, in order."""
    index = 0
    for group in groups:
        names = group.get("param_names")
        for position, parameter in enumerate(group["params"]):
            name = f"parameter {index}"
            if names is not None:
                name += f" ({names[position]})"
            yield Member(index, parameter, group, name)
            index += 1


def complete_(state: State, member: Member, compressor: Compressor) -> None:
    """Adds to one parameter's state what is missing in it (modified in place)."""
    parameter, group = member.parameter, member.group
    if group["momentum"] != 0:
        started = state.get("momentum_buffer") is not None
        if not started:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        state.setdefault("momentum_started", torch.tensor(started))
    level = compressor.level(parameter.shape, group)
    if level is None:
        return
    dtype, device = compute_dtype(parameter), parameter.device
    if group["error_feedback"] and "error" not in state:
        state["error"] = torch.zeros(parameter.shape, dtype=dtype, device=device)
    entry = Entry(member.index, tuple(parameter.shape), level)
    for name, initial in compressor.initial_state(entry, group).items():
        present = state.get(name)
        if present is None or present.shape != initial.shape:
            fresh = initial.to(device=device, dtype=dtype)
            if present is not None:  # the rank has changed: keep the columns that both have
                shared = min(present.shape[-1], fresh.shape[-1])
                fresh[..., :shared] = present[..., :shared]
            state[name] = fresh


def attach_(section: Section, states: Mapping[int, State]) -> None:
    """Moves errors and the compressor's state into the buffers of a new section.

    Args:
        section: freshly made (modified in place).
        states: complete, by index; their tensors are replaced by views (modified in place).
    """
    kept = section.aggregator.state()
    for entry in section.layout.entries:
        state = states[entry.index]
        if entry.level is None:
            if "error" in state:
                section.leftovers[entry.index] = state["error"]
            continue
        for name, view in kept[entry.index].items():
            view.copy_(state[name])
            state[name] = view
        if section.errors is not None:
            section.errors.views[entry.index].copy_(state["error"])
    show_errors_(section, states)


def show_errors_(section: Section, states: Mapping[int, State]) -> None:
    """Makes each state's `error` a view of the buffer that is now the error memory."""
    if section.errors is not None:
        for index in section.compressed:
            states[index]["error"] = section.errors.views[index]


def exact_copy(saved: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Copies one parameter's saved state in this package's own dtypes.

    torch's Optimizer.load_state_dict casts whatever it finds to the parameter's dtype, which for
    a bfloat16 parameter would destroy the errors.
    """
    copies: dict[str, Any] = {}
    for name, value in saved.items():
        if isinstance(value, Tensor):
            dtype = value.dtype
            if value.is_floating_point():
                is_momentum = name == "momentum_buffer"
                dtype = parameter.dtype if is_momentum else compute_dtype(parameter)
            device = parameter.device if name != "momentum_started" else value.device
            value = value.detach().to(device=device, dtype=dtype, copy=True)
        copies[name] = value
    return copies


def refuse_overwritten(saved: Mapping[Any, Any], sections: list[Section]) -> None:
    """Refuses a state_dict that was kept without copying it while training went on.

    Raises:
        ValueError: its errors lie in memory that later steps have used for other things.
    """
    scratch = {
        batch.untyped_storage().data_ptr()
        for section in sections
        if section.errors is not None
        for batch in section.deltas.batches
    }
    for state in saved.values():
        error = state.get("error") if isinstance(state, Mapping) else None
        if isinstance(error, Tensor) and error.untyped_storage().data_ptr() in scratch:
            raise ValueError(
                "Invalid state_dict: its errors are views of this optimizer's own memory, which "
                "later steps have overwritten. Copy a state_dict when you take it: "
                "copy.deepcopy(optimizer.state_dict()), or torch.save it."
            )
