"""What decides how far each parameter is compressed, as training goes on. It names no policy."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from efsgd.compressors import Compressor
from efsgd.engine.observation import Observation
from efsgd.engine.parameters import PER_PARAMETER, ParameterInfo, compute_dtype, list_parameters
from efsgd.rank.accumulation import Accumulator
from efsgd.rank.fixed_traffic import Background
from efsgd.wire.collectives import Exchange

#: What is decided on for one parameter: a rank, a density, a number of bits.
Value: TypeAlias = int | float


@dataclass(frozen=True)
class Layer:
    """A parameter for which a policy decides.

    Attributes:
        index: its position over all groups of the optimizer.
        name: for messages: its name if the optimizer knows names, and its index.
        shape: as which it is compressed.
        value: of the setting that is decided on, as it is now.
        group: the position of its parameter group.
        lr: the learning rate of its group, now; None where nobody knows.
        settings: all that its group and it have, as they are now.
        dtype: of its errors and factors.
        device: the parameter's.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    value: Value
    group: int
    lr: float | None
    settings: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device

    def level(self, compressor: Compressor, setting: str, value: Value) -> Any:
        """How far the compressor compresses it at a value; None: it is sent uncompressed."""
        return compressor.level(self.shape, {**self.settings, setting: value})


class RankPolicy(ABC):
    """Decides on one setting of each layer: the rank of PowerSGD, or what another compressor has.

    `RankScheduler` calls the methods, in the order in which they stand here. Time is cut into
    windows, which end where `RankScheduler.step` is called.

    Attributes:
        setting: the name of the setting: a key of parameter groups.
        background: what is sent besides; counted anew before `begin` and before each `propose`.
    """

    setting: str = "rank"
    background: Background = Background()

    def __repr__(self) -> str:
        """Class and arguments: workers whose policies read differently refuse to decide together.

        Arguments are the attributes that have names of the constructor's. A function stands there
        with its name, and no address does. A policy whose attributes may differ between workers has
        to define this itself.
        """
        names = inspect.signature(type(self).__init__).parameters
        found = {name: getattr(self, name) for name in names if hasattr(self, name)}
        shown = (f"{n}={getattr(v, '__qualname__', None) or repr(v)}" for n, v in found.items())
        return re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(self).__name__}({', '.join(shown)})")

    @property
    @abstractmethod
    def values(self) -> Sequence[Value]:
        """All values it may ever decide for, in any order."""

    @abstractmethod
    def begin(self, layers: Sequence[Layer], compressor: Compressor) -> Mapping[int, Value]:
        """Makes ready for the first window. Nothing may be communicated.

        Args:
            layers: those that the compressor compresses at some of `values`.
            compressor: of the optimizer.

        Returns:
            What the first window is to have, by the layers' indices.

        Raises:
            ValueError: the policy and the compressor do not go together.
        """

    def count_step(self) -> None:
        """A step is about to be shown, in as many parts as it has devices and dtypes."""
        for accumulator in self.accumulators:
            accumulator.count_step()

    @abstractmethod
    def observe(self, observation: Observation) -> None:
        """Is shown a step that is about to be applied; once for each device and dtype."""

    @abstractmethod
    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        """What the next window should have. It may communicate, and must not change anything.

        All workers call it, and all then take what worker 0 proposes: what is decided is the same
        on every worker by construction. What one worker raises after its last collective is raised
        on all; before it the others would wait for a collective until the time-out.

        Args:
            layers: as they are now.
            world_size: the number of workers.
            worker: this worker's place among them, from 0.

        Returns:
            By index, each one of `values`. A layer that is left out keeps its value.
        """

    @abstractmethod
    def commit(self, layers: Sequence[Layer]) -> None:
        """All workers have agreed; a window begins.

        Args:
            layers: with their new values.
        """

    @property
    def accumulators(self) -> Sequence[Accumulator]:
        """Sums of what was observed: what belongs to one worker alone."""
        return ()

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that it goes on from, without what the accumulators hold: plain numbers."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from there."""


def layers_of(
    groups: Sequence[dict[str, Any]],
    compressor: Compressor,
    setting: str,
    values: Iterable[Value],
    lr_of: Optimizer,
) -> list[Layer]:
    """The parameters that are compressed at some of these values, in order.

    Args:
        groups: of the optimizer that compresses.
        compressor: decides what is compressed.
        setting: a name of one of its settings.
        values: of the setting.
        lr_of: an optimizer of the same parameters, whose learning rates count.

    Raises:
        ValueError: there is no such setting, or single parameters cannot have it, or a value of it
            is out of range, or no parameter is compressed.
    """
    allowed = sorted(set(compressor.settings()) - set(compressor.shared_settings()))
    kind = type(compressor).__name__
    if setting not in allowed:
        raise ValueError(
            f"Invalid setting: {setting!r}. Must be a setting of {kind} that each parameter may "
            f"have for itself: one of {allowed}."
        )
    choices = list(dict.fromkeys(values))
    lrs = {id(p): group.get("lr") for group in lr_of.param_groups for p in group["params"]}
    positions = {id(group): position for position, group in enumerate(groups)}
    found = []
    for info in list_parameters(groups):
        settings = info.settings
        own = [_with_setting(info, {**settings, setting: value}) for value in choices]
        for each in own:
            _validate(compressor, each, setting, choices)
        if all(each.entry(compressor).level is None for each in own):
            continue
        lr = lrs.get(id(info.parameter))
        found.append(
            Layer(
                info.index,
                info.name,
                tuple(info.compressed_shape),
                settings[setting],
                positions[id(info.group)],
                None if lr is None else float(lr),
                settings,
                compute_dtype(info.parameter),
                info.parameter.device,
            )
        )
    if not found:
        raise ValueError(
            f"Invalid {setting} values: {choices}. With none of them {kind} compresses any "
            f"parameter of this optimizer: there is nothing to decide on."
        )
    return found


def _validate(
    compressor: Compressor, info: ParameterInfo, setting: str, choices: Sequence[Value]
) -> None:
    try:
        compressor.validate(info.group)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{error} That is for {setting}={info.group[setting]!r} of {info.name}, one of the "
            f"values {list(choices)} of the policy. Another setting is decided on by a policy that "
            f"is made with setting='density', for example."
        ) from error


def _with_setting(info: ParameterInfo, settings: dict[str, Any]) -> ParameterInfo:
    """The parameter as if it were in a group with these settings."""
    group = {**settings, PER_PARAMETER: None}
    return ParameterInfo(info.index, info.parameter, group, 0, info.name)
