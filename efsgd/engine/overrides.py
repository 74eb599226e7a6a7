"""Settings of single parameters: how groups are given them, and how they are checked."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.parameters import PER_PARAMETER, overrides_of


def set_overrides_(
    groups: Iterable[dict[str, Any]], name: str, values: Mapping[Tensor, Any]
) -> None:
    """Gives single parameters values of a setting.

    Those left out keep what they have. `per_parameter` is replaced where it changes.
    """
    for group in groups:
        own, parameters = group.get(PER_PARAMETER) or {}, group["params"]
        before = tuple(own.get(name, [None] * len(parameters)))
        after = tuple(values.get(p, old) for p, old in zip(parameters, before, strict=True))
        if after != before:
            group[PER_PARAMETER] = {**own, name: after}


def validate_per_parameter(group: Mapping[str, Any], compressor: Compressor) -> None:
    """Checks the compressor's settings in a group, and what it says about single parameters."""
    compressor.validate(group)
    own = group.get(PER_PARAMETER)
    if own is None:
        return
    if not isinstance(own, dict):
        raise TypeError(
            f"Invalid per_parameter: {own!r}. Must be None, or a dict from names of settings to "
            f"a value for each parameter of the group, for example {{'rank': [4, 2]}}."
        )
    allowed = sorted(set(compressor.settings()) - set(compressor.shared_settings()))
    count = len(group.get("params", ()))
    for name, values in own.items():
        if name not in allowed:
            choices = f"one of {allowed}" if allowed else "None: this compressor has none"
            raise ValueError(
                f"Invalid per_parameter: {name!r} is no setting that single parameters may have. "
                f"Must be {choices}."
            )
        if not isinstance(values, list | tuple):
            raise TypeError(
                f"Invalid per_parameter: {name!r} has {values!r}. Must be a list or a tuple, with "
                f"a value or None for each parameter of the group."
            )
        if len(values) != count:
            raise ValueError(
                f"Invalid per_parameter: {name!r} has {len(values)} values for {count} parameters. "
                f"Must have one, or None, for each."
            )
    _validate_values(group, compressor, count if own else 0)


def _validate_values(group: Mapping[str, Any], compressor: Compressor, count: int) -> None:
    """Checks the settings of each parameter; those that occur several times, once."""
    seen: set[str] = set()
    for position in range(count):
        chosen = overrides_of(group, position)
        text = repr(chosen)  # 1, 1.0 and True are equal, and not all of them are ranks
        if text in seen:
            continue
        seen.add(text)
        try:
            compressor.validate({**group, **chosen})
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"{error} That is what per_parameter has for parameter {position} of the group."
            ) from error
