"""What can go wrong between workers, by name."""

__all__ = ["CollectiveError", "NonFiniteGradientError", "WorkerMismatchError"]


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
