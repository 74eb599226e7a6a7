"""What was handed to collectives: bytes are counted, never computed."""

from typing import Any

from efsgd.wire.collectives import Collective


class TrafficCounter:
    """Counts the buffers one worker hands to collectives.

    A step's own collectives are kept apart from those of checks and decisions before it.

    Attributes:
        steps: that were applied.
        skipped_steps: that were left out.
        total_bytes_sent: in all steps, checks and decisions.
        check_bytes_sent: in comparisons of workers.
        decision_bytes_sent: in decisions on what later steps send.
        grad_norm: of the last step's Δ', if it was asked for.
    """

    def __init__(self) -> None:
        self.steps = self.skipped_steps = 0
        self.total_bytes_sent = 0
        self.check_bytes_sent = self.decision_bytes_sent = 0
        self.grad_norm: float | None = None
        self._uncompressed = 0
        self._sizes: list[int] = []

    def begin_step(self, bytes_uncompressed: int) -> None:
        """What is recorded next belongs to a step whose gradients have this many bytes."""
        self._uncompressed, self._sizes, self.grad_norm = bytes_uncompressed, [], None

    def record(self, collective: Collective) -> None:
        """Counts a collective of a step."""
        size = collective.nbytes
        self.total_bytes_sent += size
        self._sizes.append(size)

    def record_check(self, collective: Collective) -> None:
        """Counts a collective that compares workers."""
        self.total_bytes_sent += collective.nbytes
        self.check_bytes_sent += collective.nbytes

    def record_decision(self, collective: Collective) -> None:
        """Counts a collective of a decision, which belongs to no step."""
        self.total_bytes_sent += collective.nbytes
        self.decision_bytes_sent += collective.nbytes

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
