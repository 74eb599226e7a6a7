"""Numbers by which policies know parameters, wherever these stand in the groups."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from efsgd.engine.observation import Observation
from efsgd.engine.parameters import ParameterInfo


class ParameterNumbers:
    """Each parameter's number, which it keeps: at first its position over all groups.

    Groups may come, go and change places between steps. A parameter that is new has a new number,
    and one that comes back has its old one.
    """

    def __init__(self, infos: Iterable[ParameterInfo]) -> None:
        self._numbers: dict[Tensor, int] = {}
        self.apply(infos)
        # What the parameters of the last observation were, and their numbers by position there.
        self._observed: Sequence[ParameterInfo] | None = None
        self._places: dict[int, int] = {}

    def apply(self, infos: Iterable[ParameterInfo]) -> list[ParameterInfo]:
        """The parameters with their numbers as indices."""
        found = []
        for info in infos:
            if info.parameter not in self._numbers:
                self._numbers[info.parameter] = 1 + max(self._numbers.values(), default=-1)
            found.append(replace(info, index=self._numbers[info.parameter]))
        return found

    def apply_to(self, observation: Observation, infos: Sequence[ParameterInfo]) -> Observation:
        """A step as it was observed, of these parameters, with their numbers as indices."""
        if infos is not self._observed:
            numbered = zip(infos, self.apply(infos), strict=True)
            self._observed, self._places = infos, {old.index: new.index for old, new in numbered}
        places = self._places
        if all(place == number for place, number in places.items()):
            return observation
        return replace(
            observation,
            gradients={places[index]: value for index, value in observation.gradients.items()},
            errors={places[index]: value for index, value in observation.errors.items()},
        )

    def load(self, infos: Iterable[ParameterInfo], numbers: Iterable[int]) -> None:
        """Takes over the numbers that these parameters have in a state_dict, in order."""
        parameters = (info.parameter for info in infos)
        self._numbers, self._observed = dict(zip(parameters, numbers, strict=True)), None
