"""What an optimizer says of its steps: bytes, phases, and figures for loggers."""

import math
from typing import Any

import torch
from torch import Tensor

from efsgd.engine.observation import Observation
from efsgd.engine.parameters import Groups, ParameterInfo, list_parameters
from efsgd.engine.step import Step

_PREFIX = "efsgd/"


class _Norms:
    """The norms of errors and gradients in the last step that was applied, by index.

    They stay on the device until they are asked for.
    """

    def __init__(self, engine: Step) -> None:
        self._engine = engine
        self._step = -1
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, observation: Observation) -> None:
        if self._step != self._engine.notes.step:
            self._step, self.found = self._engine.notes.step, {}
        for index, error in observation.errors.items():
            gradient = observation.gradients.get(index)
            given = error.new_zeros(()) if gradient is None else _norm(gradient, error.dtype)
            self.found[index] = _norm(error, error.dtype), given * observation.scale


class Reporting:
    """The part of an optimizer that says what it has done.

    Attributes:
        engine: takes the steps.
        param_groups: those of the optimizer.
    """

    engine: Step
    param_groups: Groups

    def communication_stats(self) -> dict[str, Any]:
        """What was handed to collectives by this worker, counted from the buffers.

        With one worker nothing leaves the process; the figures are then those of the buffers that
        would have been sent.

        Returns:
            Of the last step: `collectives`; `bytes_sent`; `bytes_uncompressed`, the size of all
            gradients; `ratio` of the two. Of all steps since construction: `steps` that were
            applied and `skipped_steps` that were not; `total_bytes_sent`, of which
            `check_bytes_sent` went into comparing workers and `decision_bytes_sent` into decisions
            of rank schedulers. Bytes are those of one worker's buffers: not times the number of
            workers, nor times what an all-reduce makes of them on the wire. With `max_grad_norm`
            also `grad_norm`, the norm of the last step's Δ' before it was clipped. While
            `time_phases` is set, also `phase_seconds` of the last step, a dict whose names are
            those of the ranges in torch.profiler.
        """
        phases = self.engine.phases
        seconds = {"phase_seconds": dict(phases.seconds)} if phases.is_timing else {}
        return self.engine.traffic.report() | seconds

    def metrics(self, *, by_layer: bool = False) -> dict[str, float]:
        """The figures that loggers of training runs take: numbers, by names such as "efsgd/ratio".

        Nothing is sent for them. The first call has norms measured from the next step on, in a pass
        over errors and gradients; until then, and where nobody ever calls, that costs nothing.

        Args:
            by_layer: whether each compressed parameter's relative error is there as well.

        Returns:
            The numbers of `communication_stats()`, with "efsgd/" before their names. Once it is
            measured, also "efsgd/relative_error": of the last step that was applied, this worker's
            ‖e‖/‖g‖ over all compressed parameters, where e is the error that it began with and g
            the gradient. A few is usual at small ranks; where it grows from epoch to epoch, the
            rank is too small. And with `by_layer` "efsgd/relative_error/NAME" for each parameter.

        Example:
            >>> from efsgd import PowerSGDOptimizer
            >>> model = torch.nn.Linear(32, 32)
            >>> optimizer = PowerSGDOptimizer(model.named_parameters(), lr=0.1, momentum_form="sgd")
            >>> for _ in range(3):
            ...     model(torch.randn(8, 32)).square().mean().backward()
            ...     optimizer.step()
            ...     figures = optimizer.metrics(by_layer=True)
            >>> figures["efsgd/steps"], figures["efsgd/ratio"] > 1
            (3.0, True)
            >>> figures["efsgd/relative_error"] == figures["efsgd/relative_error/weight"]
            True
        """
        watchers = self.engine.watchers
        measured = next((w for w in watchers if isinstance(w, _Norms)), None)
        if measured is None:
            measured = _Norms(self.engine)
            watchers.append(measured)
        figures = {
            _PREFIX + name: float(value)
            for name, value in self.communication_stats().items()
            if isinstance(value, int | float) and not math.isnan(value)
        }
        if not measured.found:
            return figures
        norms = [(float(error), float(given)) for error, given in measured.found.values()]
        errors, gradients = zip(*norms, strict=True)
        figures[_PREFIX + "relative_error"] = _ratio(math.hypot(*errors), math.hypot(*gradients))
        if by_layer:
            names = {info.index: _name(info) for info in list_parameters(self.param_groups)}
            for index, pair in zip(measured.found, norms, strict=True):
                if index in names:
                    figures[f"{_PREFIX}relative_error/{names[index]}"] = _ratio(*pair)
        return figures

    @property
    def time_phases(self) -> bool:
        """Whether steps are timed; on an accelerator timing waits for it between phases."""
        return self.engine.phases.is_timing

    @time_phases.setter
    def time_phases(self, is_timing: bool) -> None:
        self.engine.phases.is_timing = is_timing
        self.engine.phases.begin_step()


def _norm(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def _ratio(error: float, gradient: float) -> float:
    """Of an error to a gradient, which may be zero."""
    if gradient == 0:
        return math.inf if error > 0 else 0.0
    return error / gradient


def _name(info: ParameterInfo) -> str:
    """The name of a parameter as the model has it, or its number."""
    names = info.group.get("param_names") or ()
    is_named = len(names) == len(info.group["params"])
    return str(names[info.position]) if is_named else f"parameter {info.index}"
