"""The peers, used as their documentation says."""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.contract.adapters import Adapter, Efsgd, Loop, Sgd
from benchmarks.contract.questions import Missed, NotApplicable, NotProbed

# From the third step on DDP does not rebuild its buckets any more, and the hook may compress.
HOOK_STARTS_AT = 2
NEVER = 10**9
# The hook's documentation recommends it where a column of a matrix may be zero.
HOOK_EPSILON = 1e-8


def wait_where_started() -> None:
    """Has the callbacks of all-reduces run in order, in the thread that has started them.

    The hook starts collectives in such callbacks. gloo runs them in threads of its own, where the
    hook stands still if there are several buckets, and where its collectives mix with those that
    find_unused_parameters needs. So that this is not what the probes find, all-reduces are
    waited for where they are started.
    """
    if getattr(dist.all_reduce, "waits", False):
        return
    original = dist.all_reduce

    def all_reduce(*args: Any, **options: Any) -> Any:
        work = original(*args, **options)
        if work is not None:
            work.wait()
        return work

    all_reduce.waits = True
    dist.all_reduce = all_reduce


class _HookLoop(Loop):
    takes_gradients = False  # the hook averages them in the backward pass

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        state: powerSGD_hook.PowerSGDState,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer)
        self.options = options
        self.attach(state)

    def attach(self, state: powerSGD_hook.PowerSGDState) -> None:
        """A hook can be registered once in the life of a DistributedDataParallel."""
        wait_where_started()
        self.state = state
        ddp = DistributedDataParallel(self.model, **self.options)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self.wrapped = ddp

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        ddp: DistributedDataParallel = self.wrapped
        return ddp.no_sync()

    def checkpoint(self) -> dict[str, Any]:
        return {**super().checkpoint(), "state": self.state}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        super().restore(checkpoint)
        self.attach(checkpoint["state"])

    def parts(self) -> tuple[Any, ...]:
        return (self.optimizer, self.state)


class Hook(Adapter):
    """PyTorch's powerSGD_hook under DistributedDataParallel, with torch.optim.SGD."""

    name = "hook"
    title = "PyTorch's `powerSGD_hook`"
    needs_group = True

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
        """See `Adapter.loop`."""
        listed = model.parameters() if params is None else params
        state = powerSGD_hook.PowerSGDState(
            process_group=group,
            matrix_approximation_rank=rank or 1,
            start_powerSGD_iter=NEVER if rank is None else HOOK_STARTS_AT,
            min_compression_rate=rate,
            orthogonalization_epsilon=HOOK_EPSILON,
        )
        optimizer = self.optimizer(listed, factory, **settings)
        options = {"process_group": group, "find_unused_parameters": unused}
        return _HookLoop(model, optimizer, state, **options)

    def revive(self, model: nn.Module, parts: tuple[Any, ...]) -> Loop:
        """See `Adapter.revive`."""
        return _HookLoop(model, *parts)

    def in_backward(self, model: nn.Module, apply: Callable[..., None]) -> nn.Module:
        """See `Adapter.in_backward`."""
        super().in_backward(model, apply)
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=HOOK_STARTS_AT)
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return ddp


class _EpfmlLoop(Loop):
    def __init__(self, model: nn.Module, optimizer: Optimizer, aggregator: Any) -> None:
        super().__init__(model, optimizer)
        self.aggregator = aggregator

    def zero_grad(self) -> None:
        """Nothing: `p.grad` holds the errors between steps, and the README removes the call."""

    def step(self, *args: Any) -> Any:
        powersgd = importlib.import_module("powersgd")
        return powersgd.optimizer_step(self.optimizer, self.aggregator, *args)

    def scaled_step(self, scaler: torch.amp.GradScaler) -> None:
        # The scaler would call the optimizer's own step, past the aggregator.
        scaler.unscale_(self.optimizer)
        self.step()

    def parts(self) -> tuple[Any, ...]:
        return (self.optimizer, self.aggregator)


class Epfml(Adapter):
    """The package of the paper's authors, with torch.optim.SGD."""

    name = "epfml"
    title = "epfml/powersgd"

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
        """See `Adapter.loop`."""
        if group is not None:
            raise Missed("there is no argument for a process group: the default group is used")
        optimizer = self.optimizer(
            model.parameters() if params is None else params, factory, **settings
        )
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        return _EpfmlLoop(model, optimizer, self._aggregator(listed, rank, rate))

    def _aggregator(self, params: list[Tensor], rank: int | None, rate: float = 1.0) -> Any:
        powersgd = importlib.import_module("powersgd")
        config = powersgd.Config(
            rank=rank or 1,
            min_compression_rate=rate,
            num_iters_per_step=2,
            start_compressing_after_num_steps=NEVER if rank is None else 0,
        )
        return powersgd.PowerSGD(params, config=config)

    def revive(self, model: nn.Module, parts: tuple[Any, ...]) -> Loop:
        """See `Adapter.revive`."""
        return _EpfmlLoop(model, *parts)

    def in_backward(self, model: nn.Module, apply: Callable[..., None]) -> nn.Module:
        """See `Adapter.in_backward`."""
        raise NotApplicable("its step is a function that is called after the backward pass")

    def step_of(self, optimizer: Optimizer, params: list[Tensor]) -> Callable[[], Any]:
        """See `Adapter.step_of`."""
        powersgd = importlib.import_module("powersgd")
        aggregator = self._aggregator(params, None)
        return lambda: powersgd.optimizer_step(optimizer, aggregator)


class _DionLoop(Loop):
    def __init__(self, model: nn.Module, optimizer: Optimizer, wrapped: nn.Module) -> None:
        super().__init__(model, optimizer)
        self.wrapped = wrapped

    def backward(self, gradients: list[Tensor | None], scale: float = 1.0) -> Tensor:
        if not isinstance(self.wrapped, DistributedDataParallel):
            return super().backward(gradients, scale)
        with self.wrapped.no_sync():  # always: the optimizer synchronizes
            return super().backward(gradients, scale)

    def checkpoint(self) -> dict[str, Any]:
        self.optimizer.synchronize_for_checkpoint()
        return super().checkpoint()


class Dion(Adapter):
    """The class `Dion` of microsoft/dion, with its compressed synchronization of gradients."""

    name = "dion"
    title = "Dion"
    is_sgd = False

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """Imported where it is needed: a clone has to be there."""
        found: type[Optimizer] = importlib.import_module("dion").Dion
        return found

    def optimizer(
        self, params: Any, factory: Callable[..., Optimizer] | None = None, **settings: Any
    ) -> Optimizer:
        """See `Adapter.optimizer`."""
        torch.compiler.set_stance("force_eager")
        own = {"mu": settings.pop("momentum")} if "momentum" in settings else {}
        known = {"lr", "weight_decay", "replicate_mesh", "outer_shard_mesh", "rank_fraction"}
        if foreign := settings.keys() - known:
            raise NotApplicable(f"it has no argument {', '.join(sorted(foreign))}")
        return super().optimizer(params, factory, **{"weight_decay": 0.0, **own, **settings})

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
        """See `Adapter.loop`; matrices are compressed to a quarter of their rank."""
        settings["rank_fraction"] = 1.0 if rank is None else 0.25
        wrapped = model
        if dist.is_initialized():
            ddp = wrapped = DistributedDataParallel(model, process_group=group)
            settings["replicate_mesh"] = ddp.process_group
        listed = self.grouped(model) if params is None else params
        return _DionLoop(model, self.optimizer(listed, factory, **settings), wrapped)

    def grouped(self, model: nn.Module) -> list[dict[str, Any]]:
        """Matrices for Dion, all else for AdamW, as the README wants it."""
        listed = list(model.parameters())
        others = [p for p in listed if p.ndim != 2]
        groups = [{"params": [p for p in listed if p.ndim == 2]}]
        return [*groups, *([{"params": others, "algorithm": "adamw"}] if others else [])]

    def revive(self, model: nn.Module, parts: tuple[Any, ...]) -> Loop:
        """See `Adapter.revive`."""
        wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
        return _DionLoop(model, parts[0], wrapped)

    def sharded(self, model: nn.Module, mesh: Any) -> Loop:
        """See `Adapter.sharded`."""
        del model, mesh
        raise NotProbed("its Q is a random DTensor, which torch makes on accelerators only")


#: All candidates, by name, in the order of the table; SGD is there to test the probes.
CANDIDATES: dict[str, Adapter] = {
    adapter.name: adapter for adapter in (Sgd(), Hook(), Epfml(), Dion(), Efsgd())
}
