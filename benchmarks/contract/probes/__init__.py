"""The probes, by group; importing them registers their rows."""

from benchmarks.contract.probes import (
    checkpoints,
    construction,
    copies,
    flags,
    frameworks,
    gradients,
    hooks,
    rules,
    state,
    tensors,
    workers,
)

__all__ = [
    "checkpoints",
    "construction",
    "copies",
    "flags",
    "frameworks",
    "gradients",
    "hooks",
    "rules",
    "state",
    "tensors",
    "workers",
]
