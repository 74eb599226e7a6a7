"""Workers begin with the same model, as DistributedDataParallel sees to it."""

from torch import nn
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
    yield from broadcast_parameters(groups, optimizer.method, 0)
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


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where it is within what torch.compile returned."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model
