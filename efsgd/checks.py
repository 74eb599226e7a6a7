"""Checks of arguments, with errors of one form: what was given, what it must be, the remedy.

NumPy's and torch's scalars are numbers like Python's own; bools are none.
"""

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """Python's own number for a scalar of NumPy or a tensor without dimensions; else the value.

    Example:
        >>> from efsgd.checks import plain
        >>> plain(torch.tensor(2.5)), plain("gather")
        (2.5, 'gather')
    """
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value


def is_integer(value: object, least: int, most: float = math.inf) -> bool:
    """Whether it is an integer from `least` to `most`."""
    number = plain(value)
    is_number = isinstance(number, Integral) and not isinstance(number, bool)
    return is_number and least <= number <= most


def is_number(value: object) -> bool:
    """Whether it is a real number, be it infinite or NaN."""
    number = plain(value)
    return isinstance(number, Real) and not isinstance(number, bool)


def require_integer(
    name: str, value: object, least: int, most: int | None = None, *, remedy: str = ""
) -> None:
    """Raises ValueError where it is no integer from `least` to `most`.

    Example:
        >>> from efsgd.checks import require_integer
        >>> require_integer("rank", 0, 1, remedy="Use 1, 2 or 4.")
        Traceback (most recent call last):
        ValueError: Invalid rank: 0. Must be an integer of at least 1. Use 1, 2 or 4.
    """
    if not is_integer(value, least, math.inf if most is None else most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        _reject(name, value, f"an integer {bounds}", remedy)


def require_number(
    name: str,
    value: object,
    *,
    least: float = 0,
    above: float | None = None,
    most: float | None = None,
    finite: bool = True,
    remedy: str = "",
) -> None:
    """Raises ValueError where it is no number of at least `least`, or above `above`.

    Args:
        name: of the argument.
        value: what was given for it.
        least: the smallest number that is allowed; makes no difference with `above`.
        above: in place of `least`, the largest number that is too small.
        most: the largest number that is allowed.
        finite: whether infinity is not allowed; makes no difference with `most`.
        remedy: one sentence or more.
    """
    number = plain(value)
    is_right = (
        is_number(number)
        and (number >= least if above is None else number > above)
        and (number <= most if most is not None else number <= sys.float_info.max or not finite)
    )
    if not is_right:
        kind = "a finite number" if finite and most is None else "a number"
        bound = f"of at least {least}" if above is None else f"above {above}"
        bound += "" if most is None else f" and at most {most}"
        _reject(name, value, f"{kind} {bound}", remedy)


def require_bool(name: str, value: object, *, remedy: str = "") -> None:
    """Raises ValueError where it is neither True nor False."""
    if not isinstance(plain(value), bool):
        _reject(name, value, "a bool", remedy)


def require_choice(name: str, value: object, choices: Sequence[str], *, remedy: str = "") -> None:
    """Raises ValueError where it is none of these words."""
    if value not in choices:
        *others, last = map(repr, choices)
        _reject(name, value, f"{', '.join(others)} or {last}", remedy)


def _reject(name: str, value: object, wanted: str, remedy: str) -> None:
    raise ValueError(f"Invalid {name}: {value!r}. Must be {wanted}. {remedy}".rstrip())
