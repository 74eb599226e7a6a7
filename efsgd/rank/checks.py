"""The arguments of policies."""

import math
from collections.abc import Sequence


def require_numbers(*, above: float | None = None, **numbers: object) -> None:
    """Checks that these are finite numbers of at least 0, or above a number.

    Raises:
        ValueError: one of them is not.
    """
    for name, value in numbers.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        least = 0 if above is None else above
        if not is_number or not least <= value < math.inf or value == above:  # type: ignore[operator]
            words = "of at least 0" if above is None else f"above {above}"
            raise ValueError(f"Invalid {name}: {value!r}. Must be a finite number {words}.")


def require_counts(**counts: object) -> None:
    """Checks that these are integers of at least 1.

    Raises:
        ValueError: one of them is not.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"Invalid {name}: {value!r}. Must be an integer of at least 1.")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Checks that a word is one of some.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r}. Must be one of {list(choices)}.")
