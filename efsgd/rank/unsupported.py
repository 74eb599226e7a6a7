"""What a rank scheduler refuses, before anything has changed."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch.optim import Optimizer

from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.rank.base import Layer, RankPolicy, Value

_OWNERS: WeakKeyDictionary[RankPolicy, ReferenceType[Any]] = WeakKeyDictionary()


def require_types(optimizer: object, policy: object, lr_of: object) -> None:
    """Checks the arguments of a scheduler.

    Raises:
        TypeError: one is of the wrong type.
    """
    if not isinstance(optimizer, ErrorFeedbackOptimizer):
        raise TypeError(
            f"Invalid optimizer: {type(optimizer).__name__}. Must be one of this package, for "
            f"example efsgd.PowerSGDOptimizer."
        )
    if not isinstance(policy, RankPolicy):
        raise TypeError(
            f"Invalid policy: {policy!r}. Must be an efsgd.rank.RankPolicy, for example "
            f"Accordion(low=1, high=4)."
        )
    if lr_of is not None and not isinstance(lr_of, Optimizer):
        raise TypeError(
            f"Invalid lr_of: {type(lr_of).__name__}. Must be a torch.optim.Optimizer of the "
            f"same parameters, or None for the first argument."
        )


def require_sole(optimizer: ErrorFeedbackOptimizer, policy: RankPolicy) -> None:
    """Checks that a policy and a setting of an optimizer belong to no other scheduler.

    Raises:
        ValueError: one of them does.
    """
    owner = _OWNERS.get(policy)
    if owner is not None and owner() is not None:
        raise ValueError(
            f"Invalid policy: {policy!r} belongs to another RankScheduler, and remembers what it "
            f"has seen there. Must be a new one; or call close() of the other first."
        )
    for watcher in optimizer.watchers:
        other = getattr(getattr(watcher, "__self__", None), "policy", None)
        if isinstance(other, RankPolicy) and other.setting == policy.setting:
            raise ValueError(
                f"Invalid optimizer: a RankScheduler with {other!r} decides on its "
                f"{policy.setting} already. Must be one for each setting: call close() of the "
                f"other one first."
            )


def set_owner_(scheduler: object, policy: RankPolicy) -> None:
    """Notes that a policy works for a scheduler, as long as that is there."""
    _OWNERS[policy] = ref(scheduler)


def clear_owner_(policy: RankPolicy) -> None:
    """Notes that a policy is free."""
    _OWNERS.pop(policy, None)


def require_rates(lr_of: Optimizer, layers: Sequence[Layer]) -> None:
    """Checks that an optimizer that is to tell learning rates has the layers.

    Raises:
        ValueError: it has none of them.
    """
    if all(layer.lr is None for layer in layers):
        raise ValueError(
            f"Invalid lr_of: {type(lr_of).__name__}. Must have the parameters that are "
            f"compressed, and has none of them: their learning rates are not known."
        )


def require_mapping(values: object, policy: RankPolicy, method: str) -> Mapping[int, Value]:
    """What a policy has returned, if it is a dict.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"Invalid result of {type(policy).__name__}.{method}: {values!r}. Must be a dict from "
            f"the indices of layers to values; an empty one changes nothing."
        )
    return values


def require_exchange(proposal: object, policy: RankPolicy) -> Generator[Any, Any, Any]:
    """What `propose` has returned, if it is a generator.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(proposal, Generator):
        raise TypeError(
            f"Invalid result of {type(policy).__name__}.propose: {proposal!r}. Must be a "
            f"generator: where it needs no collective, let `yield from ()` come before `return`."
        )
    return proposal


def require_known(
    decided: Sequence[float], layers: Sequence[Layer], policy: RankPolicy
) -> dict[int, Value]:
    """Proposed numbers as the values that they stand for, by index.

    Raises:
        ValueError: one is neither a value of the policy nor the layer's present one.
    """
    found = {}
    for layer, proposed in zip(layers, decided, strict=True):
        choices: Iterable[Value] = (*policy.values, layer.value)
        known = {float(value): value for value in choices}
        if proposed not in known:
            raise ValueError(
                f"Invalid {policy.setting} of {layer.name}: {proposed}. What "
                f"{type(policy).__name__} proposes must be one of its values, which are "
                f"{list(policy.values)}."
            )
        found[layer.index] = known[proposed]
    return found


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
