"""The state_dict of a rank scheduler."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from efsgd.rank.base import RankPolicy
from efsgd.rank.layers import Layer

_MUST = "Must be what state_dict() of a RankScheduler with the same policy returned."


def saved(
    policy: RankPolicy,
    layers: Sequence[Layer],
    numbers: Sequence[int],
    calls: int,
    last_step: int,
    sums: list[Any],
) -> dict[str, Any]:
    """The dict, not copied. `calls` counts decisions, the last at `last_step`.

    `numbers` are those of all parameters, by position.
    """
    return {
        "numbers": list(numbers),
        "kind": type(policy).__name__,
        "setting": policy.setting,
        "values": {layer.index: layer.value for layer in layers},
        "calls": calls,
        "last_step": last_step,
        "policy": policy.state_dict(),
        "sums": sums,
    }


def validate_saved(
    state_dict: Any, policy: RankPolicy, layers: Sequence[Layer], numbers: Sequence[int]
) -> list[Layer]:
    """Raises a ValueError where it is no such dict, another policy's, or of another model.

    `numbers` are those that all parameters have now, by position. Returns the layers with the
    numbers of the dict.
    """
    expected = saved(policy, layers, numbers, 0, 0, []).keys()
    if not isinstance(state_dict, Mapping) or state_dict.keys() != expected:
        found = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
        raise ValueError(f"Invalid state_dict: it has {found!r}. {_MUST}")
    places, theirs_by_place = {n: place for place, n in enumerate(numbers)}, state_dict["numbers"]
    if len(theirs_by_place) != len(numbers):
        raise ValueError(
            f"Invalid state_dict: it is of {len(theirs_by_place)} parameters, and the optimizer "
            f"has {len(numbers)}. Make model and optimizer as they were."
        )
    layers = [replace(layer, index=theirs_by_place[places[layer.index]]) for layer in layers]
    own = type(policy).__name__, policy.setting, [layer.index for layer in layers]
    theirs = state_dict["kind"], state_dict["setting"], list(state_dict["values"])
    if theirs != own or len(state_dict["sums"]) != len(policy.accumulators):
        raise ValueError(
            f"Invalid state_dict: in it {theirs[0]} has the {theirs[1]} of parameters {theirs[2]}, "
            f"and here {own[0]} has the {own[1]} of {own[2]}. Make model and policy as they were."
        )
    for accumulator, sums in zip(policy.accumulators, state_dict["sums"], strict=True):
        accumulator.validate(sums, layers)
    return layers


def load_policy(policy: RankPolicy, state_dict: Mapping[str, Any]) -> None:
    """Restores a policy's part of a state_dict, or raises a ValueError and leaves it as it is."""
    before = policy.state_dict()
    try:
        policy.load_state_dict(state_dict)
    except Exception as error:
        policy.load_state_dict(before)
        raise ValueError(
            f"Invalid state_dict: {type(policy).__name__} cannot restore {state_dict!r}. {_MUST}"
        ) from error
