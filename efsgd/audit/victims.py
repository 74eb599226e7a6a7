"""Steps of a user's own model and optimizer, with what they send."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efsgd.audit.objective import Loss
from efsgd.audit.observed import Message
from efsgd.audit.recording import observe
from efsgd.audit.several_steps import combine
from efsgd.wire.lockstep import step_together

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Victim:
    """A model as it was before steps that workers took together at these weights.

    Attributes:
        model: with these weights.
        parameters: the model's, in the order of the optimizer.
        message: what the first worker has sent, in all steps together.
        averages: of what all have sent; None where nothing is averaged.
        steps: how many.
    """

    model: nn.Module
    parameters: list[Tensor]
    message: Message
    averages: Message | None
    steps: int


def take_steps(
    model_factory: Callable[[], nn.Module],
    optimizer_factory: Callable[[nn.Module], Any],
    batches: Sequence[Batch],
    loss: Loss,
    steps: int,
    seed: int,
) -> Victim:
    """Takes steps of one worker for each batch, in this thread."""
    models = [_made(model_factory, seed) for _ in batches]
    before: Any = copy.deepcopy(models[0])
    if hasattr(before, "to_standard_module"):  # Opacus's, whose hooks an attacker has no use for
        before = before.to_standard_module()
    optimizers = [optimizer_factory(model) for model in models]
    with observe(optimizers) as recording:
        for _ in range(steps):
            for model, optimizer, (inputs, labels) in zip(models, optimizers, batches, strict=True):
                for own, start in zip(model.parameters(), before.parameters(), strict=True):
                    own.data.copy_(start)
                optimizer.zero_grad()
                loss(model(inputs), labels).backward()
            step_together(optimizers)
    groups = optimizers[0].param_groups
    pairs = zip(models[0].parameters(), before.parameters(), strict=True)
    copies = {id(own): of_victim for own, of_victim in pairs}
    parameters = [copies[id(each)] for group in groups for each in group["params"]]
    feeds_back = any(group.get("error_feedback", True) for group in groups)
    message = _together(recording.messages(worker=0), feeds_back)
    try:
        averages = _together(recording.averages(), feeds_back)
    except ValueError:  # payloads are gathered
        averages = None
    return Victim(before, parameters, message, averages, steps)


def _made(model_factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = model_factory()
    # A user's own model stays as it is. Opacus's hooks know parameters that a copy has not.
    return model if hasattr(model, "to_standard_module") else copy.deepcopy(model)


def _together(messages: Sequence[Message], error_feedback: bool) -> Message:
    return messages[0] if len(messages) == 1 else combine(messages, error_feedback=error_feedback)
