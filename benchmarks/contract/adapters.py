"""What the candidates have in common: an optimizer, and a training loop around it.

A candidate is used as its documentation says. What is not an optimizer by itself is used with the
torch.optim.SGD that its documentation uses, and has all that this SGD has.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.contract.questions import NotApplicable
from efsgd import PowerSGDOptimizer


class Loop:
    """A training loop of one worker.

    Args:
        model: as the program made it.
        optimizer: what schedulers and scalers are given.

    Attributes:
        wrapped: what is called: the model, or DistributedDataParallel around it.
    """

    #: Whether a gradient that is not finite on one worker makes all workers skip the step.
    skips_nonfinite = False
    #: Whether gradients can be assigned instead of computed by a backward pass.
    takes_gradients = True

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = self.wrapped = model
        self.optimizer = optimizer

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Where micro-batches before the last one are computed."""
        return contextlib.nullcontext()

    def backward(self, gradients: list[Tensor | None], scale: float = 1.0) -> Tensor:
        """A forward and a backward pass after which parameters have these gradients."""
        loss: Tensor = self.wrapped(gradients) * scale
        loss.backward()
        return loss

    def zero_grad(self) -> None:
        """What the documentation does with gradients before each backward pass."""
        self.optimizer.zero_grad()

    def step(self, *args: Any) -> Any:
        """Exchange and update, as far as they are not in the backward pass."""
        return self.optimizer.step(*args)

    def train(self, gradients: list[Tensor | None]) -> None:
        """One whole iteration."""
        self.zero_grad()
        self.backward(gradients)
        self.step()

    def scaled_step(self, scaler: torch.amp.GradScaler) -> None:
        """`step` under loss scaling."""
        scaler.step(self.optimizer)

    def make_workers_equal(self) -> None:
        """What the documentation says about initial parameters, if anything."""

    def weigh(self, weight: float) -> float:
        """Gives this worker a weight in the mean; returns what the loss has to be multiplied by."""
        return weight

    def checkpoint(self) -> dict[str, Any]:
        """What the documentation says to save, besides the model."""
        return {"optimizer": self.optimizer.state_dict()}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Loads a checkpoint into a loop that has been made anew."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def parts(self) -> tuple[Any, ...]:
        """The objects that a copy of the loop consists of, the optimizer first."""
        return (self.optimizer,)


class Adapter:
    """A candidate: makes optimizers and loops.

    Attributes:
        name: in results.
        title: in the table.
        optimizer_class: what takes the place of torch.optim.SGD.
        is_sgd: whether it promises SGD's update rule and arguments.
        needs_group: whether a single worker needs a process group, too.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    optimizer_class: ClassVar[type[Optimizer]] = SGD
    is_sgd: ClassVar[bool] = True
    needs_group: ClassVar[bool] = False

    def optimizer(
        self, params: Any, factory: Callable[..., Optimizer] | None = None, **settings: Any
    ) -> Optimizer:
        """The optimizer alone.

        Args:
            params: as of torch.optim.SGD.
            factory: made instead of `optimizer_class`, with the same arguments.
            settings: those of torch.optim.SGD; `lr` is 0.1 if not among them.
        """
        return (factory or self.optimizer_class)(params, **{"lr": 0.1, **settings})

    def loop(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        rank: int | None = 1,
        rate: float = 1.0,
        group: dist.ProcessGroup | None = None,
        unused: bool = False,
        factory: Callable[..., Optimizer] | None = None,
        **settings: Any,
    ) -> Loop:
        """A loop around a model.

        Args:
            model: to train.
            params: for the optimizer; None is all of the model's.
            rank: of the compression; None compresses nothing.
            rate: the least compression rate for which a matrix is compressed.
            group: the workers; None is the default group.
            unused: whether some parameters may be without gradients.
            factory: see `optimizer`.
            settings: those of torch.optim.SGD.
        """
        raise NotImplementedError

    def revive(self, model: nn.Module, parts: tuple[Any, ...]) -> Loop:
        """A loop around copies of a model and of `Loop.parts`."""
        raise NotImplementedError

    def step_of(self, optimizer: Optimizer, params: list[Tensor]) -> Callable[[], Any]:
        """The step of an optimizer of these parameters whose gradients are assigned."""
        del params
        return optimizer.step

    def in_backward(self, model: nn.Module, apply: Callable[..., None]) -> nn.Module:
        """Has each parameter stepped in the backward pass, and returns what is to be called."""
        apply(self.optimizer_class, model.parameters(), {"lr": 0.1})
        return model

    def sharded(self, model: nn.Module, mesh: Any) -> Loop:
        """A loop around a model whose parameters FSDP2 has sharded over the mesh."""
        del mesh
        return self.loop(model)

    def needs_sgd(self) -> None:
        """Ends a probe that makes sense only for what promises SGD's rule."""
        if not self.is_sgd:
            raise NotApplicable("it has an update rule and arguments of its own")


class Sgd(Adapter):
    """torch.optim.SGD itself, on one worker: what the probes ask for is what it does."""

    name = "sgd"
    title = "torch.optim.SGD"

    def loop(self, model: nn.Module, params: Any = None, **options: Any) -> Loop:
        """See `Adapter.loop`; there is nothing to compress."""
        for name in ("rank", "rate", "group", "unused"):
            options.pop(name, None)
        listed = model.parameters() if params is None else params
        return Loop(model, self.optimizer(listed, **options))

    def revive(self, model: nn.Module, parts: tuple[Any, ...]) -> Loop:
        """See `Adapter.revive`."""
        return Loop(model, parts[0])


class _EfsgdLoop(Loop):
    skips_nonfinite = True
    optimizer: PowerSGDOptimizer

    def make_workers_equal(self) -> None:
        self.optimizer.broadcast_parameters()

    def weigh(self, weight: float) -> float:
        if not hasattr(self.optimizer, "weight"):
            return weight
        self.optimizer.weight = weight
        return 1.0


class Efsgd(Adapter):
    """This package, with SGD's form of momentum."""

    name = "efsgd"
    title = "efsgd"
    optimizer_class = PowerSGDOptimizer

    def optimizer(
        self, params: Any, factory: Callable[..., Optimizer] | None = None, **settings: Any
    ) -> Optimizer:
        """See `Adapter.optimizer`."""
        return super().optimizer(params, factory, **{"momentum_form": "sgd", **settings})

    def loop(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        rank: int | None = 1,
        rate: float = 1.0,
        group: dist.ProcessGroup | None = None,
        unused: bool = False,
        factory: Callable[..., Optimizer] | None = None,
        **settings: Any,
    ) -> Loop:
        """See `Adapter.loop`."""
        settings |= {"nonfinite": "skip", "process_group": group}
        settings |= {"min_compression_rate": math.inf} if rank is None else {"rank": rank}
        if rank is not None:
            settings["min_compression_rate"] = rate
        listed = model.parameters() if params is None else params
        return _EfsgdLoop(model, self.optimizer(listed, factory, **settings))

    def revive(self, model: nn.Module, parts: tuple[Any, ...]) -> Loop:
        """See `Adapter.revive`."""
        return _EfsgdLoop(model, parts[0])

    def step_of(self, optimizer: Optimizer, params: list[Tensor]) -> Callable[[], Any]:
        """See `Adapter.step_of`."""
        return optimizer.step

    def in_backward(self, model: nn.Module, apply: Callable[..., None]) -> nn.Module:
        """See `Adapter.in_backward`."""
        apply(self.optimizer_class, model.parameters(), {"lr": 0.1, "momentum_form": "sgd"})
        return model
