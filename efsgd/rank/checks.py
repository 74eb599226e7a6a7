"""Checks of what policies and schedulers are given."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from efsgd.checks import plain, require_integer, require_number
from efsgd.compressors import Compressor
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.rank.base import RankPolicy
from efsgd.rank.layers import Layer, Value


def require_numbers(*, above: float | None = None, **numbers: object) -> None:
    """Raises a ValueError unless all are finite numbers of at least 0, or above a number."""
    for name, value in numbers.items():
        require_number(name, value, above=above)


def require_counts(**counts: object) -> None:
    """Raises a ValueError unless all are integers of at least 1."""
    for name, value in counts.items():
        require_integer(name, value, 1)


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r}. Must be one of {list(choices)}.")


def require_exchange(made: object, what: str) -> Generator[Any, Any, Any]:
    """Raises a TypeError unless it is a generator, as an exchange is."""
    if not isinstance(made, Generator):
        raise TypeError(
            f"Invalid {what}: {made!r}. Must be a generator: where it needs no collective, let "
            f"`yield from ()` come before `return`."
        )
    return made


def require_mapping(values: object, policy: object, method: str) -> Mapping[int, Value]:
    """The dict that a policy's method has returned, with plain numbers; else a TypeError."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"Invalid result of {type(policy).__name__}.{method}: {values!r}. Must be a dict from "
            f"the indices of layers to values; an empty one changes nothing."
        )
    return {index: plain(value) for index, value in values.items()}


def require_known(
    proposed: Sequence[float], layers: Sequence[Layer], policy: RankPolicy
) -> dict[int, Value]:
    """What was proposed, by index, as values of the policy; a ValueError where one is not."""
    found = {}
    for layer, number in zip(layers, proposed, strict=True):
        known = {float(value): value for value in (*policy.values, layer.value)}
        if number not in known:
            raise ValueError(
                f"Invalid {policy.setting} of {layer.name}: {number}. What "
                f"{type(policy).__name__} proposes must be one of its values, which are "
                f"{list(policy.values)}."
            )
        found[layer.index] = known[number]
    return found


def require_layers(
    layers: Sequence[Layer], policy: RankPolicy, compressor: Compressor, lr_of: Optimizer | None
) -> None:
    """Raises a ValueError where there is nothing to decide on, or `lr_of` has none of it."""
    if not layers:
        raise ValueError(
            f"Invalid {policy.setting} values: {list(policy.values)}. With none of them "
            f"{type(compressor).__name__} compresses any parameter of this optimizer: there is "
            f"nothing to decide on."
        )
    if lr_of is not None and all(layer.lr is None for layer in layers):
        raise ValueError(
            f"Invalid lr_of: {type(lr_of).__name__}. Must have the parameters that are "
            f"compressed, and has none of them: their learning rates are not known."
        )


def validate_arguments(
    optimizer: object, policy: object, lr_of: object, others: Iterable[Any]
) -> None:
    """Raises an error unless a scheduler can be made of these, beside `others` that are open."""
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
    for other in others:
        if other.policy is policy:
            raise ValueError(
                f"Invalid policy: {policy!r} belongs to another RankScheduler, and has its state. "
                f"Must be a new one; or call close() of the other first."
            )
        if other.optimizer is optimizer and other.policy.setting == policy.setting:
            raise ValueError(
                f"Invalid optimizer: a RankScheduler with {other.policy!r} decides on its "
                f"{policy.setting} already. Call close() of the other one first."
            )
