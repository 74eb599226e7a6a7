"""Steps that autograd can go through: of one worker that compresses nothing."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd_

from efsgd.algorithms.interfaces import Compressor
from efsgd.checks import plain
from efsgd.engine.parameters import list_parameters
from efsgd.engine.state import State


def require_differentiable(groups: Sequence[dict[str, Any]], compressor: Compressor) -> None:
    """Raises NotImplementedError where a step of these groups would compress something."""
    for info in list_parameters(groups):
        if info.entry(compressor).level is not None:
            raise NotImplementedError(
                f"differentiable=True, but {info.name}, shape {list(info.parameter.shape)}, is "
                f"compressed: a step cannot be differentiated through compression. Use "
                f"min_compression_rate=math.inf, or torch.optim.SGD."
            )


@torch.enable_grad()
def step_differentiably_(
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, State],
    weight: float = 1.0,
) -> None:
    """One step of one worker in operations that autograd records, in either momentum form."""
    present = [p for group in groups for p in group["params"] if p.grad is not None]
    scale: float | Tensor = weight
    needs_scale = weight != 1.0 or groups[0]["max_grad_norm"] is not None
    if groups[0]["max_grad_norm"] is not None and present:
        norms = torch.stack([torch.linalg.vector_norm(p.grad) for p in present])
        norm = torch.linalg.vector_norm(norms) * weight
        scale = weight * (plain(groups[0]["max_grad_norm"]) / (norm + 1e-6)).clamp(max=1.0)
    for group in groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad * scale if needs_scale else p.grad.clone() for p in parameters]
        buffers = [_momentum(state[p]) for p in parameters]
        update_ = _descend_ if group["momentum_form"] == "paper" else _torch_step_
        update_(group, parameters, gradients, buffers)
        for parameter, buffer in zip(parameters, buffers, strict=True):
            if buffer is not None:
                state[parameter]["momentum_buffer"] = buffer
                state[parameter]["momentum_started"] = torch.tensor(True, device="cpu")


def _momentum(state: Mapping[str, Tensor]) -> Tensor | None:
    """The momentum, or None before it has begun."""
    buffer = state.get("momentum_buffer")
    if buffer is None or not (state["momentum_started"] or bool(buffer.any())):
        return None
    return buffer


def _torch_step_(
    group: Mapping[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor | None],
) -> None:
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    options = {name: group[name] for name in names}
    torch_sgd_(parameters, gradients, buffers, foreach=False, fused=False, **options)


def _descend_(
    group: Mapping[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor | None],
) -> None:
    """Algorithm 2, lines 12 and 13; see `efsgd.algorithms.error_feedback.descend_`."""
    for position, (x, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        update = -gradient if group["maximize"] else gradient
        update = update + group["weight_decay"] * x.clone()
        m = buffers[position]
        m = update.clone() if m is None else m.mul_(group["momentum"]).add_(update)
        if group["momentum"] != 0:
            buffers[position] = m
        x.sub_(group["lr"] * (update + m))
