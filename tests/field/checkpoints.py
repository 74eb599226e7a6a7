"""Checkpoints of the machine: what workers save, who loads it, and what the reference has then."""

import copy
from collections.abc import Sequence
from typing import Any

from efsgd.checkpoint.consolidated import consolidation
from efsgd.testing import lockstep
from tests.field.machine import Workers


def own(workers: Workers) -> list[Any]:
    """What each worker saves: its optimizer's state, and of its scheduler, if there is one."""
    windows = [None] * workers.world_size if workers.windows is None else workers.windows.saved()
    return list(zip([o.state_dict() for o in workers.optimizers], windows, strict=True))


def resume(workers: Workers, place: int, *, with_windows: bool) -> None:
    """Each worker loads its own, or for a `place` other than 0 what another one saved."""
    count, origins = workers.world_size, workers.origins
    sources = [(worker + place) % count for worker in range(count)]
    saved = own(workers)
    errors = workers.reference.errors
    workers.reference.errors = [copy.deepcopy(errors[source]) for source in sources]
    _load(workers, [saved[source] for source in sources], with_windows=with_windows)
    workers.origins = [origins[source] for source in sources]


def resume_with(workers: Workers, world_size: int, *, with_windows: bool) -> None:
    """Another number of workers, all of which load the same."""
    workers.settle_all()
    windows = None if workers.windows is None else workers.windows.consolidated()
    saved = lockstep([consolidation(optimizer) for optimizer in workers.optimizers]).results[0]
    reference = workers.reference
    errors = [sum(each) / workers.world_size for each in zip(*reference.errors, strict=True)]
    reference.errors = [copy.deepcopy(errors) for _ in range(world_size)]
    reference.deltas = [copy.deepcopy(errors) for _ in range(world_size)]
    workers.world_size = reference.world_size = world_size
    _load(workers, [(saved, windows)] * world_size, with_windows=with_windows)


def _load(workers: Workers, saved: Sequence[Any], *, with_windows: bool) -> None:
    workers.out = []
    groups = [
        [workers.slot_of(p).number for p in group["params"]]
        for group in workers.optimizers[0].param_groups
    ]
    present = {number for numbers in groups for number in numbers}
    for slot in workers.slots:
        frozen = not slot.parameters[0].requires_grad
        value = slot.parameters[0].detach()
        slot.parameters = [value.clone().requires_grad_(not frozen) for _ in saved]
        slot.is_known = slot.is_known and slot.number in present
        slot.is_sparse = slot.may_be_sparse = False
    if workers.windows is not None:
        workers.windows.close()
    workers.make_optimizers(groups)
    for optimizer, (state_dict, _) in zip(workers.optimizers, saved, strict=True):
        optimizer.load_state_dict(copy.deepcopy(state_dict))
    workers.fit_reference()  # loading has fitted factors to ranks
    workers.begin_scheduling()
    windows = [own for _, own in saved]
    if with_windows and workers.windows is not None and windows[0] is not None:
        workers.windows.load(windows)
