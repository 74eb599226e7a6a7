"""Do all workers of a process group make the same call? Those that wait long tell each other.

A program that makes a call on one worker only, in `if rank == 0:` for example, would wait for the
time-out of its group, half an hour on gloo, and no error would name that call. Whoever has waited
for some seconds writes into the store of the group in which call, and reads what others wrote.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

# How many calls this worker has made, by group: the numbers of calls that belong together.
_COUNTS: MutableMapping[Any, int] = WeakKeyDictionary()

PATIENCE = timedelta(seconds=3)  # before a worker says that it waits
_GLANCE = timedelta(seconds=1)  # between two looks at what others have said


class Call:
    """A call that every worker of a process group makes, such as a step.

    Args:
        name: for messages.
        group: the process group.
        worker: this worker.
    """

    def __init__(self, name: str, group: Any, worker: int) -> None:
        self.name, self._group, self._worker = name, group, worker
        self._number = _COUNTS[group] = _COUNTS.get(group, 0) + 1
        self._has_told = False

    def wait_for(self, work: Any) -> None:
        """Waits for a collective of this call.

        Raises:
            RuntimeError: it failed, or other workers wait in another call.
        """
        patience = PATIENCE
        while not self._is_done(work, patience):
            self.tell(self.name)
            if elsewhere := self.who_is_elsewhere():
                raise RuntimeError(elsewhere)
            patience = _GLANCE
        if self._has_told:
            self.tell("")

    def tell(self, name: str) -> None:
        """Writes for the others in which call this worker is."""
        self._has_told = True
        with contextlib.suppress(Exception):  # there is no store, or it has gone with its owner
            store_of(self._group).set(_key(self._worker), json.dumps([self._number, name]))

    @staticmethod
    def _is_done(work: Any, patience: timedelta) -> bool:
        try:
            work.wait(patience)
        except RuntimeError:
            if work.is_completed():  # it has failed, or is done this very moment
                work.wait()
                return True
            return False
        return True

    def who_is_elsewhere(self) -> str:
        """Which workers wait in other calls, as far as they have told; empty if none has."""
        found = defaultdict[str, list[int]](list)
        with contextlib.suppress(Exception):
            store = store_of(self._group)
            for worker in range(dist.get_world_size(self._group)):
                if worker != self._worker and store.check([_key(worker)]):
                    number, name = json.loads(store.get(_key(worker)))
                    if number == self._number and name not in ("", self.name):
                        found[name].append(worker)
        said = [f"worker {', '.join(map(str, who))} waits in {name}" for name, who in found.items()]
        return "; ".join(said)


def store_of(group: Any) -> Any:
    """The store by which the processes of a group have met: torch has no public name for it."""
    return dist.distributed_c10d._world.pg_map[group][1]


def _key(worker: int) -> str:
    return f"efsgd/waits/{worker}"
