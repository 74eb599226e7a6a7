"""L-GreCo: the ranks that send least, of all whose errors together are no larger than uniform ones.

Source: Alimohammadi, Markov, Frantar, Alistarh: "L-GreCo: Layerwise-Adaptive Gradient Compression
for Efficient and Accurate Deep Learning", MLSys 2024, arXiv 2210.17357.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from efsgd.checks import plain
from efsgd.compressors import Compressor
from efsgd.engine.observation import Observation
from efsgd.rank.accumulation import Accumulator
from efsgd.rank.allocation import Candidate, allocate_within
from efsgd.rank.approximation.tables import ErrorTables
from efsgd.rank.base import RankPolicy
from efsgd.rank.checks import require_counts, require_exchange, require_numbers
from efsgd.rank.costs.objectives import Costs
from efsgd.rank.costs.volumes import byte_table
from efsgd.rank.layers import Layer, Value
from efsgd.rank.policies.uniform import Uniform
from efsgd.wire.collectives import Exchange


class LGreCo(RankPolicy):
    """Gives each layer the rank it needs: least traffic at no more error than a uniform rank's.

    Each window ends with a decision. What the layers' last corrected gradients Δ_w = g_w + e_w sum
    up to says how large the error of each layer would be at each rank. Of the choices whose errors
    add up to no more than those of the reference, one that sends least is taken, or next to least
    where layers are many (see `allocate`). So steps never send more than with the reference, and
    the error is never larger, as far as it was measured. What decisions send comes on top.

    Differences to the authors' code: errors are those of the mean over the workers, not worker 0's;
    their sums are not rounded up to a grid, which excludes the uniform choice itself; the reference
    is what is taken where nothing better is found; factors keep what they learned.

    Args:
        reference: the uniform rank whose total error must be kept; or another policy, such as
            `Accordion`, whose rank of each layer is taken in its place.
        values: the ranks to choose from, the reference's among them. None: all from `shrink` times
            the reference's least to `grow` times its greatest.
        shrink: see `values`.
        grow: see `values`.
        tolerance: the errors may add up to this many times the reference's. Below 1, more may be
            sent than with the reference.
        observations: how many steps at the end of a window are summed; all those of the first, as
            nobody knows where it will end. Other windows are expected to be as long as the last.
            Where one is so much shorter that none was summed, ranks stay as they are.
        interval: how many windows lie between two decisions, at least 1.
        spectrum: how errors of low-rank approximations are found. "power": by power iteration,
            which sends `iterations` times as much as a step of the greatest of `values`. "svd":
            from the mean itself, which is sent whole.
        iterations: see `spectrum`.
        gradients: "mean" over the workers, or "worker 0", as in the authors' code.
        sketch: how many numbers of each layer are sent to know the norm of what the greatest rank
            leaves; see `Accordion`.
        costs: what is to be least, in any unit: `StepTime`, or a function; see `efsgd.rank.Costs`.
            None: bytes.
        setting: of which a uniform reference is a value. A policy has its own.

    Raises:
        TypeError: `costs` cannot be called.
        ValueError: an argument is out of range, or the reference's values are not among `values`;
            from `RankScheduler`: it is not known how the compressor's errors depend on the setting.

    Source: arXiv 2210.17357.
    """

    _compressor: Compressor  # known from `begin` on

    def __init__(
        self,
        reference: Value | RankPolicy = 4,
        values: Sequence[Value] | None = None,
        *,
        shrink: float = 0.5,
        grow: float = 2.0,
        tolerance: float = 1.0,
        observations: int = 10,
        interval: int = 1,
        spectrum: str = "power",
        iterations: int = 2,
        gradients: str = "mean",
        sketch: int | None = 4096,
        costs: Costs | None = None,
        setting: str = "rank",
    ) -> None:
        require_numbers(above=0.0, shrink=shrink, grow=grow, tolerance=tolerance)
        require_counts(observations=observations, interval=interval)
        if costs is not None and (isinstance(costs, type) or not callable(costs)):
            raise TypeError(
                f"Invalid costs: {costs!r}. Must be None, for bytes, StepTime(), for milliseconds, "
                f"or a function like efsgd.rank.Costs."
            )
        if not isinstance(reference, RankPolicy):
            reference = Uniform(reference, setting)
        self.reference = reference
        self.setting = reference.setting
        if setting not in (self.setting, "rank"):
            raise ValueError(
                f"Invalid setting: {setting!r}. The reference decides on {self.setting!r}; make it "
                f"with another setting, or leave this one out."
            )
        own = reference.values
        chosen = _between(own, shrink, grow) if values is None else tuple(map(plain, values))
        require_numbers(**{f"values[{place}]": value for place, value in enumerate(chosen)})
        if missing := [value for value in own if value not in chosen]:
            raise ValueError(
                f"Invalid values: {list(chosen)}. They lack {missing}, which the reference may "
                f"ask for, and must have all of its values."
            )
        self.tolerance, self.costs = plain(tolerance), costs
        self.spectrum, self.iterations = spectrum, plain(iterations)
        self.gradients, self.sketch = gradients, plain(sketch)
        self.observations: int = plain(observations)
        self.interval: int = plain(interval)
        self.values = tuple(sorted(set(chosen)))
        options = spectrum, self.iterations, gradients, self.sketch
        self._tables = ErrorTables(self.setting, self.values, *options)
        self._windows = 0  # that have ended
        self._steps = 0  # of the present window
        self._length = 0  # of the last window, in steps
        self._targets: dict[int, Value] = {}  # the reference's value of each layer
        self._pending: dict[int, Value] = {}
        self._accumulator = Accumulator(with_errors=True)
        self.accumulators = (self._accumulator, *reference.accumulators)

    @property
    def _is_looking(self) -> bool:
        """Whether a decision ends the present window."""
        return (self._windows + 1) % self.interval == 0

    @property
    def _is_summing(self) -> bool:
        """Whether the present step is one of the last, in a window as long as the last one."""
        return self._steps > self._length - self.observations

    def begin(self, layers: Sequence[Layer], compressor: Compressor) -> Mapping[int, Value]:
        """The reference's."""
        self._tables.validate(compressor, layers)
        self._compressor, self._windows = compressor, -1  # the first `commit` begins window 0
        self._steps, self._targets = 0, {}
        self.reference.background = self.background
        self._pending = dict(self.reference.begin(layers, compressor))
        return self._pending

    def count_step(self) -> None:
        """Counts all steps, those too that are not summed."""
        self._steps += 1
        self._accumulator.count_step()
        self.reference.count_step()

    def observe(self, observation: Observation) -> None:
        """Adds the corrected gradients of a step, if it is one of the last."""
        if self._is_summing:
            self._accumulator.add(observation)
        self.reference.observe(observation)

    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        """The choice of least cost, at no more error than the reference's."""
        self.reference.background = self.background
        seen = [self._as_reference_has_it(layer) for layer in layers]
        wanted = yield from self.reference.propose(seen, world_size, worker)
        self._pending = {**{layer.index: layer.value for layer in seen}, **wanted}
        changed = {i: v for i, v in self._pending.items() if v != self._targets.get(i)}
        # Those that have a sum, and something to be compared with.
        sums = self._accumulator.sums
        known = [n for n in layers if n.index in sums and self._pending[n.index] in self.values]
        if not (self._is_looking and self._is_summing and known):
            return changed
        errors = yield from self._tables.measure(
            self._compressor, known, self._accumulator, world_size, worker
        )
        options = self._compressor, known, self.setting, self.values, world_size
        costs: Sequence[Sequence[float]]
        if self.costs is None:
            costs = byte_table(*options)
        else:
            costs = yield from require_exchange(self.costs(*options), "costs")
            if [len(row) for row in costs] != [len(self.values)] * len(known):
                raise ValueError(
                    f"Invalid costs: {costs!r}. Must be {len(known)} rows, one for each layer, of "
                    f"{len(self.values)} numbers, one for each value."
                )
        if not all(math.isfinite(error) for row in errors for error in row):
            return changed  # an overflow: there is nothing to go by
        # A layer without errors had no gradients, and keeps what the reference has for it.
        rows = [row for row in zip(known, costs, errors, strict=True) if any(row[2])]
        if not rows:
            return changed
        table = [[Candidate(*pair) for pair in zip(*row, strict=True)] for _, *row in rows]
        reference = [self.values.index(self._pending[layer.index]) for layer, *_ in rows]
        chosen = allocate_within(table, reference, self.tolerance)
        found = {n.index: self.values[k] for (n, *_), k in zip(rows, chosen, strict=True)}
        return {**self._pending, **found}

    def _as_reference_has_it(self, layer: Layer) -> Layer:
        return dataclasses.replace(layer, value=self._targets.get(layer.index, layer.value))

    def commit(self, layers: Sequence[Layer]) -> None:
        """Keeps what the reference wants, and sums anew if the next window counts."""
        self._targets, self._pending = self._pending, {}
        self.reference.commit([self._as_reference_has_it(layer) for layer in layers])
        self._length, self._steps = self._steps, 0
        self._windows += 1
        self._accumulator.begin(layers if self._is_looking else ())

    def state_dict(self) -> dict[str, Any]:
        """Numbers of windows and steps, and the reference's values and state."""
        return {
            "windows": self._windows,
            "steps": self._steps,
            "length": self._length,
            "targets": dict(self._targets),
            "reference": self.reference.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores it."""
        self._windows, self._steps = state_dict["windows"], state_dict["steps"]
        self._length = state_dict["length"]
        self._targets = dict(state_dict["targets"])
        self.reference.load_state_dict(state_dict["reference"])


def _between(values: Sequence[Value], shrink: float, grow: float) -> Sequence[int]:
    """All ranks from a share of the least to a multiple of the greatest of these."""
    if not all(isinstance(plain(value), int) for value in values):
        raise ValueError(
            f"Invalid values: None. Must be given where those of the reference are no integers, "
            f"as here: {list(values)}."
        )
    first, last = math.floor(shrink * min(values)), math.ceil(grow * max(values))
    return range(max(1, first), max(first, last, int(max(values))) + 1)
