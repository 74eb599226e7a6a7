"""Before each step the ends of a link tell each other what they are about to do."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from efsgd.errors import CollectiveError, WorkerMismatchError
from efsgd.wire.calls import store_of

# How many handshakes this process has completed at each link of a group, by its own stage and the
# neighbor. Stages that are made anew go on counting.
_COUNTS: MutableMapping[Any, Counter[tuple[int, int]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Said:
    """What one end of a link tells the other.

    Attributes:
        step: the number that it has for the step that begins.
        is_whole: whether its last step has come to its end.
        lines: what must be the same at both ends.
    """

    step: int
    is_whole: bool
    lines: Sequence[str]


class Handshake:
    """What a stage and a neighbor tell each other, by the store in which the processes have met.

    Nothing is sent between stages for it, so that no order of their messages can be upset, nor
    what a failed step has left be taken for it. A handshake counts once this end has heard the
    other; until then it can be tried again.

    Args:
        group: of the pipeline; None is the default one.
        stage: the index of the stage.
        neighbor: that of the stage at the other end.
    """

    def __init__(self, group: Any, stage: int, neighbor: int) -> None:
        self._group: Any = dist.group.WORLD if group is None else group
        self._stage, self._neighbor = stage, neighbor
        self._counts = _COUNTS.setdefault(self._group, Counter())

    def tell(self, said: Said) -> None:
        """Begins a handshake."""
        store_of(self._group).set(self._key(self._stage, 0), json.dumps(asdict(said)))

    def hear(self) -> Said:
        """What the neighbor has told, who may need as long as the time-out of the store.

        Raises:
            CollectiveError: the neighbor does not take part.
        """
        store = store_of(self._group)
        with self._withdrawing(store):
            theirs = Said(**json.loads(store.get(self._key(self._neighbor, 0))))
        # Who tells this has heard all that was told before.
        self._forget(store, self._key(self._stage, -1))
        self._counts[self._stage, self._neighbor] += 1
        return theirs

    def compare(self, own: Said, theirs: Said) -> None:
        """Raises WorkerMismatchError if the lines differ, and so does the neighbor."""
        for pair in zip(own.lines, theirs.lines, strict=True):
            if pair[0] != pair[1]:
                first, second = sorted((self._stage, self._neighbor))
                said = pair if first == self._stage else pair[::-1]
                raise WorkerMismatchError(
                    f"The ends of the link between stages {first} and {second} differ. Stage "
                    f"{first}: {said[0]}; stage {second}: {said[1]}. All stages must have the same "
                    f"links, load the same checkpoint, announce the same samples, and train or "
                    f"evaluate in the same step."
                )

    @contextlib.contextmanager
    def _withdrawing(self, store: Any) -> Iterator[None]:
        """Takes back what was told, where nobody has answered."""
        try:
            yield
        except BaseException as error:
            self._forget(store, self._key(self._stage, 0))
            if not isinstance(error, Exception):
                raise
            raise CollectiveError(
                f"Stage {self._neighbor} has not begun the step that stage {self._stage} is in, "
                f"within the time-out of the process group. All stages must take the same steps."
            ) from error

    @staticmethod
    def _forget(store: Any, key: str) -> None:
        with contextlib.suppress(Exception):  # it is not there, or the store has gone
            store.delete_key(key)

    def _key(self, teller: int, offset: int) -> str:
        number = self._counts[self._stage, self._neighbor] + offset
        link = "-".join(map(str, sorted((self._stage, self._neighbor))))
        return f"efsgd/pipeline/{link}/{teller}/{number}"
