"""Do both ends of a link speak of the same thing? They tell each other before their first step."""

import json
from collections import Counter
from collections.abc import MutableMapping, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from efsgd.errors import CollectiveError, WorkerMismatchError
from efsgd.wire.calls import store_of

# How many handshakes stages of this process have begun, by group and by stage and side: the numbers
# of those that belong together.
_COUNTS: MutableMapping[Any, Counter[tuple[int, str]]] = WeakKeyDictionary()


class Handshake:
    """What a stage tells its neighbors, by the store in which the processes have met.

    Nothing is sent between stages for it, so that no order of their messages can be upset.

    Args:
        group: of the pipeline; None is the default one.
        stage: the index of the stage.
    """

    def __init__(self, group: Any, stage: int) -> None:
        self._group: Any = dist.group.WORLD if group is None else group
        self._stage = stage

    def tell(self, side: str, lines: Sequence[str]) -> None:
        """Begins a handshake: says what this stage has at its "next" or "previous" side."""
        _COUNTS.setdefault(self._group, Counter())[self._stage, side] += 1
        store_of(self._group).set(self._key(self._stage, side, side), json.dumps(list(lines)))

    def compare(self, side: str, lines: Sequence[str], patience: timedelta) -> None:
        """Compares with what the neighbor at that side has at its own.

        Raises:
            WorkerMismatchError: they differ; the neighbor raises the same.
            CollectiveError: the neighbor does not take part.
        """
        neighbor = self._stage + (1 if side == "next" else -1)
        opposite = "previous" if side == "next" else "next"
        key = self._key(neighbor, opposite, side)
        try:
            store_of(self._group).wait([key], patience)
        except Exception as error:
            raise CollectiveError(
                f"Stage {neighbor} has not begun the step that stage {self._stage} is in, after "
                f"{patience.total_seconds():.0f} s. All stages must take the same steps, and load "
                f"the same checkpoint."
            ) from error
        theirs = json.loads(store_of(self._group).get(key))
        for own, other in zip(lines, theirs, strict=True):
            if own != other:
                first, second = sorted((self._stage, neighbor))
                said = (own, other) if first == self._stage else (other, own)
                raise WorkerMismatchError(
                    f"The ends of the link between stages {first} and {second} differ. Stage "
                    f"{first}: {said[0]}; stage {second}: {said[1]}. Give all stages the same "
                    f"links, and load the same checkpoint on all of them."
                )

    def _key(self, stage: int, side: str, own_side: str) -> str:
        count = _COUNTS[self._group][self._stage, own_side]
        return f"efsgd/pipeline/{stage}/{side}/{count}"
