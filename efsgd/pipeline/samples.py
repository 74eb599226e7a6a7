"""Where tensors of samples are kept: in memory, or in a file that is mapped into it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.wire.compare import checksum, digest_of


class SampleStore:
    """One row for each sample and output, of a size of its own for each output.

    Args:
        capacity: how many samples there is room for; None for any number.
        file: where rows are, a path to which the number of the output is added; None for memory.
    """

    def __init__(self, capacity: int | None, file: str | None) -> None:
        self._capacity, self._file = capacity, file
        self._places: dict[int, dict[int, int]] = {}  # by output: the row of each sample
        self._rows: dict[int, Tensor] = {}

    def has(self, sample: int, output: int) -> bool:
        """Whether it is kept."""
        return sample in self._places.get(output, ())

    def get(self, samples: Sequence[int], output: int) -> Tensor:
        """What is kept of some samples, [samples, numbers]."""
        places = self._places[output]
        return self._rows[output][[places[sample] for sample in samples]]

    def numel(self, output: int) -> int:
        """How many numbers are kept of a sample."""
        return self._rows[output].shape[1]

    def require_room(self, samples: Iterable[int]) -> None:
        """Raises ValueError unless these can be kept as well."""
        if self._capacity is None:
            return
        wanted = set(samples)
        for places in list(self._places.values()) or [{}]:
            total = len(wanted | places.keys())
            if total > self._capacity:
                raise ValueError(
                    f"{total} samples, where Link(capacity={self._capacity}) keeps no more. Raise "
                    f"it to the number of samples in the data set, with file= if memory is short, "
                    f"or use memory='none'."
                )

    def keep(self, values: Mapping[Any, Tensor]) -> None:
        """Keeps flat tensors by (sample, output), for which there is room."""
        wanted: dict[int, dict[int, Tensor]] = {}
        for (sample, output), value in values.items():
            wanted.setdefault(output, {})[sample] = value
        for output, own in wanted.items():
            places = self._places.setdefault(output, {})
            for sample in own:
                places.setdefault(sample, len(places))
            rows = self._room(output, len(places), next(iter(own.values())))
            for sample, value in own.items():
                rows[places[sample]] = value

    def _room(self, output: int, count: int, like: Tensor) -> Tensor:
        """Rows for at least so many samples, with those that are kept."""
        rows = self._rows.get(output)
        if rows is None and self._file is not None:
            assert self._capacity is not None  # Link says so
            name, size = f"{self._file}.{output}", self._capacity * like.numel()
            mapped = torch.from_file(name, shared=True, size=size, dtype=like.dtype)
            rows = mapped.view(self._capacity, like.numel())
        elif rows is None:
            rows = like.new_empty(count, like.numel())
        elif count > len(rows):
            larger = rows.new_empty(max(count, 2 * len(rows)), rows.shape[1])
            larger[: len(rows)] = rows
            rows = larger
        self._rows[output] = rows
        return rows

    def state(self, changes: Mapping[Any, Tensor]) -> dict[str, Any]:
        """Samples and their rows, by output, after changes like those that `keep` is given."""
        copy = SampleStore(None, None)
        copy._places = {output: dict(places) for output, places in self._places.items()}
        copy._rows = {
            output: self.get(list(places), output) for output, places in self._places.items()
        }
        copy.keep(changes)
        found = {}
        for output, places in copy._places.items():
            rows = copy._rows[output]  # a part of them would be saved with the others
            rows = rows if len(rows) == len(places) else rows[: len(places)].clone()
            found[str(output)] = {"samples": list(places), "rows": rows}
        return found

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Keeps copies of what `state` has returned, and nothing else."""
        for own in state.values():
            SampleStore(self._capacity, None).require_room(own["samples"])
        self._places, self._rows = {}, {}
        for output, own in state.items():
            rows = own["rows"].to("cpu" if self._file is not None else device)
            kept = zip(own["samples"], rows, strict=True)
            self.keep({(sample, int(output)): row for sample, row in kept})

    def digest(self, changes: Mapping[Any, Tensor]) -> int:
        """The same for stores with the same state, in whichever order."""
        found = []
        for output, own in sorted(self.state(changes).items()):
            order = sorted(range(len(own["samples"])), key=own["samples"].__getitem__)
            samples = tuple(own["samples"][place] for place in order)
            found.append((output, samples, checksum(own["rows"][order])))
        return digest_of(repr(found).encode())
