"""What a compressor is tried with, and what makes a function a law."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from efsgd.checks import plain, require_integer
from efsgd.compressors import Compressor
from efsgd.testing.simulation import Simulation
from efsgd.testing.violations import CompressorLawError, Violation

#: Matrices, tall and wide; tensors of more dimensions; vectors; one number; nothing. Equal shapes
#: stand apart.
SHAPES: tuple[tuple[int, ...], ...] = (
    (12, 10),
    (10,),
    (),
    (6, 4, 3, 3),
    (1, 9),
    (12, 10),
    (0, 3),
    (40, 24),
    (9, 1),
    (33,),
)


@dataclass(frozen=True)
class Trial:
    """A compressor, and what it is tried with. See `efsgd.testing.check_compressor`."""

    compressor: Compressor
    world_sizes: Sequence[int] = (1, 2, 3, 4)
    shapes: Sequence[Sequence[int]] = SHAPES
    steps: int = 4
    seed: int = 0
    processes: int = 0
    error_feedback: bool = True

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        object.__setattr__(self, "world_sizes", tuple(map(plain, self.world_sizes)))
        object.__setattr__(self, "shapes", [tuple(map(plain, shape)) for shape in self.shapes])
        require_integer("steps", self.steps, 1)
        require_integer("processes", self.processes, 0)
        if not self.world_sizes or min(self.world_sizes) < 1:
            raise ValueError(
                f"Invalid world_sizes: {self.world_sizes!r}. Must be one or more numbers of "
                f"workers, none below 1."
            )
        if not any(map(math.prod, self.shapes)):
            raise ValueError(f"Invalid shapes: {self.shapes!r}. At least one must have an element.")

    @property
    def several(self) -> int:
        """The smallest number of workers above one, if there is one."""
        return min((size for size in self.world_sizes if size > 1), default=1)

    @property
    def fewest_and_most(self) -> tuple[int, ...]:
        """The smallest and the largest number of workers, for what hardly depends on it."""
        return tuple(sorted({min(self.world_sizes), max(self.world_sizes)}))

    def simulate(
        self,
        world_size: int,
        dtype: torch.dtype = torch.float64,
        shapes: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> Simulation:
        """Fresh workers; see `Simulation`."""
        options = {"error_feedback": self.error_feedback, "seed": self.seed, **options}
        chosen = self.shapes if shapes is None else shapes
        return Simulation(self.compressor, world_size, chosen, dtype, **options)

    def kinds_of_steps(self, steps: int) -> dict[Hashable, list[int]]:
        """The numbers of the first steps, by their kinds."""
        group, found = dict(self.simulate(1).group), dict[Hashable, list[int]]()
        for step in range(steps):
            found.setdefault(self.compressor.step_kind(step, group), []).append(step)
        return found

    def first_steps(self) -> list[int]:
        """The first step of each kind, among the steps of a run and four more."""
        return [steps[0] for steps in self.kinds_of_steps(self.steps + 4).values()]

    def compressed_shapes(self) -> list[torch.Size]:
        """The shapes that are compressed, each once, the smallest first."""
        group = self.simulate(1).group
        distinct = {torch.Size(shape) for shape in self.shapes if math.prod(shape) > 0}
        found = [shape for shape in distinct if self.compressor.level(shape, group) is not None]
        return sorted(found, key=lambda shape: (shape.numel(), tuple(shape)))


#: Raises a `CompressorLawError` where it does not hold.
Law: TypeAlias = Callable[[Trial], None]


def law(remedy: str) -> Callable[[Law], Law]:
    """Makes a function a law: a `Violation`, or any other error, is raised in its name."""

    def decorate(function: Law) -> Law:
        @functools.wraps(function)
        def checked(trial: Trial) -> None:
            named = functools.partial(CompressorLawError, function.__name__, trial.compressor)
            try:
                function(trial)
            except Violation as violation:
                error = named(violation.found, violation.remedy or remedy)
                raise error from violation.__cause__
            except CompressorLawError:
                raise
            except Exception as error:
                what = f"it raised {type(error).__name__}: {error}"
                raise named(what, "Its methods must not raise.") from error

        return checked

    return decorate
