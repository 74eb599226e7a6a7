"""Parameters that stand for those of a model: the same values, and gradients of their own."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import ParamsT

from efsgd.wire.collectives import leave_modes


class StandIns:
    """One for each parameter. DDP looks at gradients of the model's own in its backward pass."""

    def __init__(self) -> None:
        self.by_parameter: dict[Tensor, nn.Parameter] = {}

    def of(self, given: nn.Module | ParamsT) -> list[Any]:
        """Those of a model's parameters, or of given ones in the form in which they are given."""
        if isinstance(given, DistributedDataParallel):
            given = given.module
        if isinstance(given, nn.Module):
            ignored = getattr(given, "_ddp_params_and_buffers_to_ignore", ())
            pairs = given.named_parameters()
            given = [(n, p) for n, p in pairs if p.requires_grad and n not in ignored]
        standing: list[Any] = []
        for each in given:
            if isinstance(each, dict):
                standing.append({**each, "params": self.of(_listed(each["params"]))})
            elif isinstance(each, tuple):
                standing.append((each[0], self._stand_in(each[1])))
            else:
                standing.append(self._stand_in(each))
        return standing

    def follow(self) -> None:
        """Takes the memory of parameters that have got other memory."""
        for parameter, stand_in in self.by_parameter.items():
            if stand_in.data_ptr() != parameter.data_ptr() or stand_in.shape != parameter.shape:
                stand_in.data = parameter.data

    def _stand_in(self, parameter: Any) -> Any:
        if not isinstance(parameter, Tensor):
            return parameter  # the averager says what it is not
        if parameter not in self.by_parameter:
            with leave_modes():
                own = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            self.by_parameter[parameter] = own
        return self.by_parameter[parameter]


def _listed(params: Any) -> Iterable[Any]:
    return [params] if isinstance(params, Tensor) else params
