"""What was handed to collectives: bytes are counted, never computed."""

from typing import Any

from efsgd.wire.collectives import Collective


class TrafficCounter:
    """Counts the buffers one worker hands to collectives.

    A step's own collectives are kept apart from those of the checks before it.

    Attributes:
        steps: that were applied.
        skipped_steps: that were left out.
        total_bytes_sent: in all steps and checks.
        check_bytes_sent: in checks.
        decision_bytes_sent: in decisions on what later steps send.
        grad_norm: of the last step's Δ', if it was asked for.
    """

    def __init__(self) -> None:
        self.steps = self.skipped_steps = 0
        self.total_bytes_sent = 0
        self.check_bytes_sent = self.decision_bytes_sent = 0
        self.grad_norm: float | None = None
        self._uncompressed = 0
        self._in_check = False
        self._sizes: list[int] = []

    def begin_step(self, bytes_uncompressed: int) -> None:
        """What follows belongs to a step whose gradients have this many bytes."""
        self._uncompressed, self._in_check, self._sizes = bytes_uncompressed, False, []
        self.grad_norm = None

    def begin_check(self) -> None:
        """What follows, up to the next step, belongs to checks between workers."""
        self._in_check = True

    def record_decision(self, collective: Collective) -> None:
        """Counts the buffer of one collective that belongs to no step, in bytes."""
        self.total_bytes_sent += _bytes_of(collective)
        self.decision_bytes_sent += _bytes_of(collective)

    def end_step(self) -> None:
        """The step was applied."""
        self.steps += 1

    def skip_step(self) -> None:
        """The step was left out, by all workers alike."""
        self.skipped_steps += 1

    def record(self, collective: Collective) -> None:
        """Counts the buffer of one collective, in bytes."""
        size = _bytes_of(collective)
        self.total_bytes_sent += size
        if self._in_check:
            self.check_bytes_sent += size
        else:
            self._sizes.append(size)

    def report(self) -> dict[str, Any]:
        """The figures as a plain dict; see `ErrorFeedbackSGD.communication_stats`."""
        sent = sum(self._sizes)
        return {
            "collectives": len(self._sizes),
            "bytes_sent": sent,
            "bytes_uncompressed": self._uncompressed,
            "ratio": self._uncompressed / sent if sent else float("nan"),
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "total_bytes_sent": self.total_bytes_sent,
            "check_bytes_sent": self.check_bytes_sent,
            "decision_bytes_sent": self.decision_bytes_sent,
            **({} if self.grad_norm is None else {"grad_norm": self.grad_norm}),
        }


def _bytes_of(collective: Collective) -> int:
    return collective.buffer.numel() * collective.buffer.element_size()
