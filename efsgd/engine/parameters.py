"""The parameters of an optimizer, one by one, and what its groups say of them.

`param_groups` is a list that anybody may change between steps: parameters and whole groups come,
go, come back and change places. A group that was elsewhere for a while has old counters, and
`per_parameter` is by position. So counters and overrides are kept in `GroupNotes`, by parameter;
what the groups have is a copy of them, which a state_dict saves.
"""

import math
import operator
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from efsgd.algorithms.interfaces import Compressor
from efsgd.layout import Entry, real_view

#: Parameter groups of an optimizer.
Groups: TypeAlias = list[dict[str, Any]]

#: What `per_parameter` of a group says, in a form that cannot change.
Overrides: TypeAlias = tuple[tuple[str, tuple[Any, ...]], ...]

#: The entry of a parameter group for settings of single parameters.
PER_PARAMETER = "per_parameter"


def settings_of(group: dict[str, Any], position: int) -> dict[str, Any]:
    """The settings of the parameter at this position of a group.

    Example:
        >>> from efsgd.engine.parameters import settings_of
        >>> group = {"rank": 4, "per_parameter": {"rank": (2, None)}}
        >>> settings_of(group, 0)["rank"], settings_of(group, 1)["rank"]
        (2, 4)
    """
    own = overrides_of(group, position)
    return {**group, **own} if own else group


def overrides_of(group: Mapping[str, Any], position: int) -> dict[str, Any]:
    """What the parameter at this position of a group has in place of the group's settings."""
    own = group.get(PER_PARAMETER) or {}
    chosen = ((name, own[name][position]) for name in sorted(own))
    return {name: value for name, value in chosen if value is not None}


def frozen(group: Mapping[str, Any]) -> Overrides:
    """What `per_parameter` says, to be compared with what it says later."""
    own = group.get(PER_PARAMETER)
    return tuple([(name, tuple(own[name])) for name in sorted(own)]) if own else ()


def require_dense(gradient: Tensor | None) -> None:
    """Raises NotImplementedError where a gradient is sparse."""
    if gradient is not None and gradient.layout != torch.strided:
        raise NotImplementedError(
            "Signum does not take sparse gradients: it sends a sign for every element all the "
            "same. Use dense ones, for example nn.Embedding(..., sparse=False)."
        )


def require_noise(parameter: Tensor, name: str) -> None:
    """Raises ValueError where Opacus has made gradients of single records that nobody protects."""
    if getattr(parameter, "grad_sample", None) is None:
        return
    if getattr(parameter, "summed_grad", None) is None:
        raise ValueError(
            f"{name} has gradients of single records (Opacus's grad_sample), and nothing has added "
            f"noise. Compression and error feedback come after it: wrap this optimizer or averager "
            f"in efsgd.privacy.PrivateOptimizer. Where no privacy is meant, set p.grad_sample to "
            f"None before each step."
        )


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of errors and factors: float32, or float64 for a parameter of that precision."""
    is_double = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if is_double else torch.float32


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of an optimizer.

    Attributes:
        index: its position over all groups.
        parameter: the tensor.
        group: its parameter group.
        position: its place in the group.
        name: for messages: its name if the optimizer knows names, and its index.
        has_sparse_gradients: its gradients are sent uncompressed, made dense.
        first: the number of its first matrix over all groups, in which a stack of matrices counts
            as many; None: its index.
    """

    index: int
    parameter: Tensor
    group: dict[str, Any]
    position: int
    name: str
    has_sparse_gradients: bool = False
    first: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its group, and what it has of its own in their place."""
        return settings_of(self.group, self.position)

    @property
    def is_trained(self) -> bool:
        """Whether steps work on it: it requires a gradient, and has been initialised.

        Of others nothing but this is read, compared or sent.
        """
        return self.parameter.requires_grad and not is_lazy(self.parameter)

    @property
    def values(self) -> Tensor:
        """What is worked on: this worker's part of the parameter, the real view of a complex one.

        This and `gradient` are where local values are found, and nowhere else.
        """
        return real_view(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """This worker's own gradient of it, as backward has left it."""
        return self.parameter.grad

    @property
    def shape(self) -> torch.Size:
        """Of `values`."""
        shape = self.parameter.shape
        return torch.Size((*shape, 2)) if self.parameter.is_complex() else shape

    def compressed_shape(self, compressor: Compressor) -> torch.Size:
        """As which it is compressed: what is no matrix by itself is none as a real view either."""
        count = compressor.batch_dims_of(self.settings)
        if self.parameter.dim() >= count + 2:
            return self.shape
        return torch.Size((*self.shape[:count], math.prod(self.shape[count:])))

    def entry(self, compressor: Compressor) -> Entry:
        """Its place in a layout, once compression has started."""
        level = None
        if not self.has_sparse_gradients:
            level = compressor.level(self.compressed_shape(compressor), self.settings)
        batch_dims = compressor.batch_dims_of(self.settings)
        return Entry(self.index, tuple(self.shape), level, batch_dims, self.first)

    def entry_now(self, compressor: Compressor) -> Entry:
        """Its place in the layout of the next step."""
        if self.group["step"] >= self.group["start_compressing_at"]:
            return self.entry(compressor)
        return Entry(self.index, tuple(self.shape), None, first=self.first)


def require_writable(info: ParameterInfo) -> None:
    """Raises RuntimeError where a parameter is an inference tensor, which no step may change."""
    if info.parameter.is_inference():
        raise RuntimeError(
            f"{info.name} is an inference tensor: it was made under torch.inference_mode(), and "
            f"nothing may change it outside. Make the model outside of inference mode, or replace "
            f"the parameter there by nn.Parameter(parameter.clone())."
        )


def device_of(groups: Sequence[Mapping[str, Any]]) -> torch.device:
    """Where buffers of an optimizer may live that are no parameter's."""
    trained = (p.device for group in groups for p in group["params"] if p.requires_grad)
    return next(trained, torch.device("cpu"))


def list_parameters(
    groups: Sequence[dict[str, Any]], sparse: Container[Tensor] = ()
) -> Iterator[ParameterInfo]:
    """All parameters of all groups, in order; one that is listed twice appears once.

    Those in `sparse` are known to have sparse gradients.
    """
    index, first, seen = 0, 0, set()
    for group in groups:
        names = group.get("param_names")
        for position, parameter in enumerate(group["params"]):
            name = f"parameter {index}"
            if names is not None and len(names) == len(group["params"]):
                name += f" ({names[position]})"
            if parameter not in seen:
                has_sparse = parameter in sparse
                yield ParameterInfo(index, parameter, group, position, name, has_sparse, first)
            seen.add(parameter)
            index += 1
            first += _count_matrices(parameter, settings_of(group, position).get("batch_dims", 0))


def _count_matrices(parameter: Tensor, batch_dims: int) -> int:
    """How many matrices a parameter is; one that has no shape yet is one."""
    return math.prod(parameter.shape[:batch_dims]) if batch_dims and not is_lazy(parameter) else 1


class GroupNotes:
    """Counters of an optimizer, and settings of its single parameters.

    Attributes:
        step: the number of steps that were taken.
        worker: whose errors are in the state.
        world_size: the number of workers at the last step; 0 if the errors are nobody's in
            particular.

    Args:
        defaults: settings of a group that has none of its own.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults
        self.step, self.worker, self.world_size = 0, 0, 0
        # What was last written to each group: whoever writes other counters there means them.
        self._written: dict[int, tuple[dict[str, Any], tuple[int, int, int]]] = {}
        # What each parameter that ever had overrides has, and what the groups were when last seen.
        self._own: dict[Tensor, dict[str, Any]] = {}
        self._seen: dict[int, tuple[dict[str, Any], list[Tensor], Overrides]] = {}

    def shared(self, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The settings of the optimizer as a whole, which are those of any group."""
        return groups[0] if groups else self._defaults

    def load(self, groups: Sequence[dict[str, Any]]) -> None:
        """Takes over the counters of groups that were loaded; their overrides are theirs."""
        self._own, self._seen, self._written = {}, {}, {}
        for group in groups[:1]:
            self.step, self.worker = group["step"], group["worker"]
            self.world_size = group["world_size"]
        self.settle(groups)

    def count_step(self, groups: Sequence[dict[str, Any]], context: tuple[int, int]) -> None:
        """A step was applied, with so many workers of which this one is one."""
        self.step, (self.world_size, self.worker) = self.step + 1, context
        self.write_counters(groups)

    def write_counters(self, groups: Sequence[dict[str, Any]]) -> None:
        """Brings the counters in the groups up to date."""
        counters = self.step, self.worker, self.world_size
        for group in groups:
            group["step"], group["worker"], group["world_size"] = counters
            self._written[id(group)] = group, counters

    def settle(self, groups: Sequence[dict[str, Any]]) -> None:
        """Brings groups up to date that may have been elsewhere, or have other parameters now."""
        for group in groups:
            _, written = self._written.get(id(group), (group, None))
            found: Any = group.get("step"), group.get("worker"), group.get("world_size")
            if written is not None and found != written and None not in found:
                self.step, self.worker, self.world_size = found  # as torch swaps states in and out
        self.write_counters(groups)
        for group in groups:
            if self._own or group.get(PER_PARAMETER):
                self._align(group)

    def _align(self, group: dict[str, Any]) -> None:
        """Overrides move with their parameters, unless they were set anew with these."""
        parameters, given = group["params"], group.get(PER_PARAMETER) or {}
        if not isinstance(given, dict) or not all(
            isinstance(v, list | tuple) for v in given.values()
        ):
            return  # whoever checks it says so
        said = frozen(group)
        _, before, said_before = self._seen.get(id(group), (group, parameters, said))
        has_moved = len(before) != len(parameters) or any(map(operator.is_not, before, parameters))
        if has_moved and said == said_before and not self._are_others(parameters, len(before)):
            own = [self._own.get(parameter, {}) for parameter in parameters]
            names = sorted({name for each in own for name in each})
            group[PER_PARAMETER] = {n: tuple(each.get(n) for each in own) for n in names} or None
            said = frozen(group)
        elif any(len(values) != len(parameters) for _, values in said):
            return
        for place, parameter in enumerate(parameters):
            if chosen := overrides_of(group, place):
                self._own[parameter] = chosen
            else:
                self._own.pop(parameter, None)
        self._seen[id(group)] = group, list(parameters), said

    def _are_others(self, parameters: Sequence[Tensor], count: int) -> bool:
        """Whether as many stand there that were never seen: torch swaps them in like that."""
        known = {id(parameter) for _, seen, _ in self._seen.values() for parameter in seen}
        return len(parameters) == count and known.isdisjoint(map(id, parameters))
