"""Checkpoints for any number of workers."""

from efsgd.checkpoint.consolidated import (
    average_errors_,
    averaging_,
    consolidated_state_dict,
    consolidation,
)

__all__ = ["average_errors_", "averaging_", "consolidated_state_dict", "consolidation"]
