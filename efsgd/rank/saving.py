"""What a rank scheduler saves, and the checks of what it loads."""

from collections.abc import Mapping, Sequence
from typing import Any

from efsgd.rank.base import Layer, RankPolicy

__all__ = ["load_policy", "saved", "validate_saved"]

_MUST = "Must be what state_dict() of a RankScheduler with the same policy returned."
_COUNTS = "calls", "last_step"


def saved(
    policy: RankPolicy,
    layers: Sequence[Layer],
    counts: tuple[int, int],
    sums: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The state_dict of a scheduler, not copied.

    Args:
        policy: of the scheduler.
        layers: as they are now.
        counts: how many windows were decided on, and the number of the step after the last.
        sums: what the policy's accumulators save.
    """
    return {
        "kind": type(policy).__name__,
        "setting": policy.setting,
        "values": {layer.index: layer.value for layer in layers},
        **dict(zip(_COUNTS, counts, strict=True)),
        "policy": policy.state_dict(),
        "sums": list(sums),
    }


def validate_saved(state_dict: Any, policy: RankPolicy, layers: Sequence[Layer]) -> None:
    """Checks what a scheduler is to load.

    Raises:
        ValueError: it is no such dict, another policy's, or of another model.
    """
    expected = saved(policy, layers, (0, 0), []).keys()
    if not isinstance(state_dict, Mapping) or state_dict.keys() != expected:
        found = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
        raise ValueError(f"Invalid state_dict: it has {found!r}. {_MUST}")
    own = type(policy).__name__, policy.setting, [layer.index for layer in layers]
    theirs = state_dict["kind"], state_dict["setting"], list(state_dict["values"])
    if theirs != own or len(state_dict["sums"]) != len(policy.accumulators):
        raise ValueError(
            f"Invalid state_dict: in it {theirs[0]} has the {theirs[1]} of parameters {theirs[2]}, "
            f"and here {own[0]} has the {own[1]} of {own[2]}. Make model and policy as they were "
            f"when it was saved."
        )
    for accumulator, sums in zip(policy.accumulators, state_dict["sums"], strict=True):
        accumulator.validate(sums, layers)


def load_policy(policy: RankPolicy, state_dict: Mapping[str, Any]) -> None:
    """Has a policy go on from its part of a state_dict, or stay as it is.

    Raises:
        ValueError: it cannot.
    """
    before = policy.state_dict()
    try:
        policy.load_state_dict(state_dict)
    except Exception as error:
        policy.load_state_dict(before)
        raise ValueError(
            f"Invalid state_dict: {type(policy).__name__} cannot go on from {state_dict!r}. {_MUST}"
        ) from error
