"""Loading a state_dict: what is filled in, what is checked, and in which dtypes it is copied."""

import itertools
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.parameters import (
    PER_PARAMETER,
    Groups,
    ParameterInfo,
    compute_dtype,
    list_parameters,
)
from efsgd.engine.state import State, complete_, local_state, require_shape, require_tensor
from efsgd.engine.update import Method
from efsgd.optimizers.settings import kind_of, validate_groups


def fit_(
    state: dict[str, Any],
    present: Mapping[str, Any],
    validate: Callable[[Mapping[str, Any], Compressor], None],
) -> tuple[Compressor, Mapping[str, Any], str | None]:
    """Makes what `__setstate__` is given a state of this optimizer (modified in place).

    `present` are the optimizer's own attributes until now. Returns the compressor, the defaults of
    groups, and what to warn of.
    """
    compressor: Compressor = (state if "_compressor" in state else present)["_compressor"]
    defaults = (state if "defaults" in state else present)["defaults"]
    groups = state["param_groups"]
    note = keep_other_settings(groups, compressor)
    fill_missing_settings(groups, present.get("param_groups", []), defaults)
    validate_groups(validate, compressor, groups)
    if (loaded := present.get("_loading")) is not None:
        state["state"].update(exact_copies(groups, loaded, compressor))
    return compressor, defaults, note


def keep_other_settings(groups: Sequence[dict[str, Any]], compressor: Compressor) -> str | None:
    """Leaves out a compressor's settings from groups that were saved with one of another kind.

    Errors and momenta are as good for the one as for the other, settings are not. Returns what to
    warn of.
    """
    own, others = kind_of(compressor), set()
    for group in groups:
        if group.get("compressor", own) != own:
            others.add(group["compressor"])
            group["compressor"] = own
            for name in (*compressor.settings(), PER_PARAMETER):
                group.pop(name, None)
    if not others:
        return None
    return (
        f"What was loaded was saved with {', '.join(sorted(others))}, and this optimizer goes on "
        f"with {own} and the settings that it has; errors and momenta are those loaded."
    )


def fill_missing_settings(
    groups: Sequence[dict[str, Any]],
    present: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> None:
    """Gives loaded groups the settings they lack, as an SGD's groups lack all of ours.

    They come from the `present` groups, and where these have none, from the constructor.
    """
    for position, group in enumerate(groups):
        before = present[position] if position < len(present) else {}
        for name, default in defaults.items():
            group.setdefault(name, before.get(name, default))
        if "compile" in before:  # of the machine, not of the run that was saved
            group["compile"] = before["compile"]


def exact_copies(
    groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any], compressor: Compressor
) -> dict[Tensor, dict[str, Any]]:
    """The state of each parameter as `state_dict` has it, copied in this package's own dtypes.

    torch's Optimizer.load_state_dict casts whatever it finds to the parameter's dtype, which for
    a bfloat16 parameter would destroy the errors.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    saved = state_dict["state"]
    return {
        info.parameter: _exact_copy(saved[keys[info.index]], info, local_state(compressor))
        for info in list_parameters(groups)
        if keys[info.index] in saved
    }


_MUST = "Must be what state_dict() returned, of this class or, for an SGD, of torch.optim.SGD."


def validate_type(state_dict: object) -> None:
    """Checks that what is loaded is a dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Invalid state_dict: {state_dict!r}. {_MUST}")


def validate_structure(state_dict: Mapping[str, Any], settings: Iterable[str]) -> None:
    """Checks that what is loaded is a state_dict of an optimizer of the right kind.

    Every group must have one of `settings`, which tell the right kinds.
    """
    for name, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(name), kind):
            raise ValueError(
                f"Invalid state_dict: its {name!r} is no {kind.__name__.lower()}. It has "
                f"{sorted(map(str, state_dict))[:9]}. {_MUST}"
            )
    state = state_dict["state"]
    for group in state_dict["param_groups"]:
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(f"Invalid state_dict: a group without 'params'. {_MUST}")
        own = [state[key] for key in group["params"] if key in state]
        if strange := [value for value in own if not isinstance(value, Mapping)]:
            raise ValueError(f"Invalid state_dict: a parameter's state is {strange[0]!r}. {_MUST}")
        if not any(name in group for name in settings):
            keys = sorted({str(key) for value in own for key in value})
            raise ValueError(
                f"Invalid state_dict: it is another optimizer's. Its parameters' state has {keys}, "
                f"its groups {sorted(map(str, group))}. {_MUST}"
            )


def refuse_overwritten(saved: Mapping[Any, Any], buckets: Sequence[Bucket]) -> None:
    """Refuses a state_dict that was kept without a copy, and whose errors later steps overwrote."""
    scratch = {
        batch.untyped_storage()._cdata
        for bucket in buckets
        if bucket.errors is not None
        for batch in bucket.deltas.batches
    }
    for state in saved.values():
        error = state.get("error") if isinstance(state, Mapping) else None
        if isinstance(error, Tensor) and error.untyped_storage()._cdata in scratch:
            raise ValueError(
                "Invalid state_dict: its errors are views of this optimizer's own memory, which "
                "later steps have overwritten. Copy a state_dict when you take it: "
                "copy.deepcopy(optimizer.state_dict()), or torch.save it."
            )


def _exact_copy(
    saved: Mapping[str, Any], info: ParameterInfo, local: tuple[str, ...]
) -> dict[str, Any]:
    copies: dict[str, Any] = {}
    parameter = info.parameter
    for name, value in saved.items():
        if name == "momentum_buffer" and value is None:  # as earlier versions of torch save it
            continue
        if name in ("momentum_buffer", "momentum_started", *local):
            require_tensor(value, name, info.name)
        if isinstance(value, Tensor):
            if name in ("momentum_buffer", *local):
                shape = info.shape if name in local else parameter.shape
                require_shape(value, shape, name, info.name)
            dtype = value.dtype
            if name == "momentum_buffer":
                dtype = parameter.dtype
            elif value.is_floating_point():
                dtype = compute_dtype(parameter)
            device = torch.device("cpu") if name == "momentum_started" else parameter.device
            value = value.detach().to(device=device, dtype=dtype, copy=True)
        copies[name] = value
    return copies


def complete_states_(groups: Groups, states: MutableMapping[Tensor, State], method: Method) -> None:
    """Adds to all parameters' states what is missing in them, and fits the rest (in place)."""
    for info in list_parameters(groups):
        if info.is_trained:
            complete_(states[info.parameter], info, method)
    if not states:  # all are frozen: torch.distributed.checkpoint steps what has no state
        for info in itertools.islice(list_parameters(groups), 1):
            states[info.parameter] = {}
