"""Checkpoints for any number of workers.

`OptimizerState` and `ElasticLoadPlanner` are imported when they are first asked for, as
`torch.distributed.checkpoint` takes long to import.
"""

from typing import TYPE_CHECKING, Any

from efsgd.checkpoint.consolidated import (
    average_errors_,
    averaging_,
    consolidated_state_dict,
    consolidation,
)

if TYPE_CHECKING:
    from efsgd.checkpoint.distributed import ElasticLoadPlanner, OptimizerState

__all__ = [
    "ElasticLoadPlanner",
    "OptimizerState",
    "average_errors_",
    "averaging_",
    "consolidated_state_dict",
    "consolidation",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from efsgd.checkpoint import distributed

    return getattr(distributed, name)
