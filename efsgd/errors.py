"""What can go wrong between workers, by name."""

import sys
import warnings


class CollectiveError(RuntimeError):
    """A collective failed or timed out, or another worker could not take part in a step.

    The step that raises it has changed nothing on this worker: parameters and optimizer
    state are bitwise what they were before it.
    """


class NonFiniteGradientError(RuntimeError):
    """A worker met a gradient that is NaN or infinite.

    Raised on every worker in the same step; the step has changed nothing anywhere.
    """


class WorkerMismatchError(RuntimeError):
    """The workers of a group do not hold the same parameters, values or settings.

    Raised on every worker with the same text, before anything has been changed.
    """


def warn_user(text: str) -> None:
    """Warns at the line that called this package, or torch on the way to it.

    Args:
        text: what to warn of.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inner(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _is_inner(module: str) -> bool:
    return module.partition(".")[0] in ("efsgd", "torch", "contextlib")
