"""Choices for all layers together, in numbers alone: no tensors, no workers."""

from efsgd.rank.allocation.allocate import Candidate, allocate, allocate_within

__all__ = ["Candidate", "allocate", "allocate_within"]
