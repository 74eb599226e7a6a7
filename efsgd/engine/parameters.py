"""The parameters of an optimizer, one by one."""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
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


def set_overrides_(
    groups: Iterable[dict[str, Any]], name: str, values: Mapping[Tensor, Any]
) -> None:
    """Gives single parameters values of a setting.

    Those left out keep what they have. `per_parameter` is replaced where it changes.
    """
    for group in groups:
        own, parameters = group.get(PER_PARAMETER) or {}, group["params"]
        before = tuple(own.get(name, [None] * len(parameters)))
        after = tuple(values.get(p, old) for p, old in zip(parameters, before, strict=True))
        if after != before:
            group[PER_PARAMETER] = {**own, name: after}


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


def validate_per_parameter(group: Mapping[str, Any], compressor: Compressor) -> None:
    """Checks the compressor's settings in a group, and what it says about single parameters."""
    compressor.validate(group)
    own = group.get(PER_PARAMETER)
    if own is None:
        return
    if not isinstance(own, dict):
        raise TypeError(
            f"Invalid per_parameter: {own!r}. Must be None, or a dict from names of settings to "
            f"a value for each parameter of the group, for example {{'rank': [4, 2]}}."
        )
    allowed = sorted(set(compressor.settings()) - set(compressor.shared_settings()))
    count = len(group.get("params", ()))
    for name, values in own.items():
        if name not in allowed:
            choices = f"one of {allowed}" if allowed else "None: this compressor has none"
            raise ValueError(
                f"Invalid per_parameter: {name!r} is no setting that single parameters may have. "
                f"Must be {choices}."
            )
        if not isinstance(values, list | tuple):
            raise TypeError(
                f"Invalid per_parameter: {name!r} has {values!r}. Must be a list or a tuple, with "
                f"a value or None for each parameter of the group."
            )
        if len(values) != count:
            raise ValueError(
                f"Invalid per_parameter: {name!r} has {len(values)} values for {count} parameters. "
                f"Must have one, or None, for each."
            )
    _validate_values(group, compressor, count if own else 0)


def _validate_values(group: Mapping[str, Any], compressor: Compressor, count: int) -> None:
    """Checks the settings of each parameter; those that occur several times, once."""
    seen: set[str] = set()
    for position in range(count):
        chosen = overrides_of(group, position)
        text = repr(chosen)  # 1, 1.0 and True are equal, and not all of them are ranks
        if text in seen:
            continue
        seen.add(text)
        try:
            compressor.validate({**group, **chosen})
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"{error} That is what per_parameter has for parameter {position} of the group."
            ) from error


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
