"""Workers begin with the same model, as DistributedDataParallel sees to it."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from efsgd.engine.consistency import broadcast_parameters
from efsgd.engine.parameters import device_of
from efsgd.integrations.model_buffers import buffer_exchange
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.wire.collectives import Exchange, run
from efsgd.wire.compare import broadcast_values, compare


def broadcast_model(model: nn.Module, optimizer: ErrorFeedbackOptimizer) -> None:
    """Gives all workers the parameters and buffers of worker 0, where there are several."""
    transport = optimizer.transport
    if transport.world_size > 1:
        run(_exchange(model, optimizer), transport, "attach()")


def _exchange(model: nn.Module, optimizer: ErrorFeedbackOptimizer) -> Exchange[None]:
    groups = optimizer.settled_groups
    yield from broadcast_parameters(groups, optimizer._method, 0)
    known = {parameter for group in groups for parameter in group["params"]}
    others = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not (parameter in known and parameter.requires_grad) and not is_lazy(parameter)
    }
    kinds = {name: f"{list(p.shape)}, {p.dtype}" for name, p in others.items()}
    lines = [f"{name}, not in the optimizer, {kind}" for name, kind in kinds.items()]
    yield from compare(lines, device_of(groups))
    yield from broadcast_values(list(others.values()), 0)
    yield from buffer_exchange(model, averages=False)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, within what compiles or wraps it."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        is_compiled = hasattr(model, "_orig_mod")
        model = model._orig_mod if is_compiled else model.module  # type: ignore[assignment]
    return model
