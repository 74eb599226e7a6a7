"""Settings that single parameters have of their own, beside those of their group.

A group's `per_parameter` is None, or has for some of the compressor's settings a value for each of
the group's parameters, in their order; None there is the group's own::

    optimizer.param_groups[0]["per_parameter"] = {"rank": (4, None, 1)}

It is replaced, never modified: a state_dict that was taken keeps what it had.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from efsgd.compressors import Compressor

__all__ = ["PER_PARAMETER", "frozen", "settings_of", "validate_per_parameter"]

#: The entry of a parameter group.
PER_PARAMETER = "per_parameter"


def settings_of(group: dict[str, Any], position: int) -> dict[str, Any]:
    """The settings of one parameter.

    Args:
        group: its parameter group.
        position: its place in the group.

    Example:
        >>> from efsgd.individual import settings_of
        >>> group = {"rank": 4, "per_parameter": {"rank": (2, None)}}
        >>> settings_of(group, 0)["rank"], settings_of(group, 1)["rank"]
        (2, 4)
    """
    own = group.get(PER_PARAMETER)
    if not own:
        return group
    chosen = {name: values[position] for name, values in own.items()}
    return {**group, **{name: value for name, value in chosen.items() if value is not None}}


def frozen(group: Mapping[str, Any]) -> Hashable:
    """What `per_parameter` says, to be compared with what it says later."""
    own = group.get(PER_PARAMETER)
    return own and tuple((name, tuple(own[name])) for name in sorted(own))


def validate_per_parameter(group: Mapping[str, Any], compressor: Compressor) -> None:
    """Checks what a group says about single parameters.

    Args:
        group: a parameter group, or the defaults of one.
        compressor: whose settings these are.

    Raises:
        TypeError: it is of the wrong type.
        ValueError: it names what is no setting of single parameters, has not one value for each
            of them, or a value is out of range.
    """
    own = group.get(PER_PARAMETER)
    if own is None:
        compressor.validate(group)
        return
    if not isinstance(own, Mapping):
        raise TypeError(
            f"Invalid per_parameter: {own!r}. Must be None, or a dict from names of settings to "
            f"a value for each parameter of the group, for example {{'rank': [4, 2]}}."
        )
    allowed = sorted(set(compressor.settings()) - set(compressor.shared_settings()))
    for name, values in own.items():
        if name not in allowed:
            raise ValueError(
                f"Invalid per_parameter: {name!r} is no setting that single parameters may have. "
                f"Must be one of {allowed}."
            )
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise TypeError(
                f"Invalid per_parameter: {name!r} has {values!r}. Must be a list or a tuple, with "
                f"a value or None for each parameter of the group."
            )
        if len(values) != len(group.get("params", ())):
            raise ValueError(
                f"Invalid per_parameter: {name!r} has {len(values)} values for "
                f"{len(group.get('params', ()))} parameters. Must have one, or None, for each."
            )
    for settings in _distinct(group, own):
        compressor.validate(settings)


def _distinct(
    group: Mapping[str, Any], own: Mapping[str, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """The settings that occur, each once."""
    names = list(own)
    for values in dict.fromkeys(zip(*own.values(), strict=True)):
        chosen = dict(zip(names, values, strict=True))
        yield {**group, **{name: value for name, value in chosen.items() if value is not None}}
