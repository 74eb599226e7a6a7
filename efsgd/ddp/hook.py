"""The communication hook: which gradients arrive, what is made of them, and what DDP gets."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim.optimizer import ParamsT

from efsgd.algorithms.interfaces import Compressor
from efsgd.ddp.backward import Pass, Worker
from efsgd.ddp.groups import end_own_group, own_group
from efsgd.ddp.stand_ins import StandIns
from efsgd.optimizers.averager import GradientAverager
from efsgd.wire.collectives import leave_modes

#: As much as a bucket of DistributedDataParallel has.
BUCKET_BYTES = 25 * 2**20


def compress(
    state: "CompressionState",
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP looks at this annotation
) -> torch.futures.Future[torch.Tensor]:
    """Averages gradients, compressed, with error feedback, while the backward pass goes on.

    To be registered with a state of its own for each model, after which DistributedDataParallel
    leaves the mean Δ' in `p.grad`, the same on every worker: what `GradientAverager` writes there.
    What it raises comes out of `backward()`, as the same error of this package, on every worker.

    Example:
        >>> import torch.distributed as dist
        >>> from efsgd.ddp import CompressionState, compress
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 32))
        >>> state = CompressionState(ddp, efsgd.PowerSGD(rank=4))
        >>> ddp.register_comm_hook(state, compress)
        >>> ddp(torch.ones(8, 64)).square().mean().backward()
        >>> state.communication_stats()["steps"]
        1
        >>> dist.destroy_process_group()

    Source: PowerSGD, arXiv 1905.13727, Algorithm 2, lines 7 to 11.
    """
    return state.receive(bucket)


class CompressionState:
    """What `compress` keeps for a model: error memory, factors, and who averages with whom.

    All buckets of a backward pass are applied together, or none on any worker. State is kept by
    parameter: buckets of DistributedDataParallel may change. On CPUs one thread exchanges gradients
    while others are still computed; on accelerators they are exchanged when all are there.

    Every worker makes it, at the same point of the program: it makes a process group of its own.
    The other arguments are those of `GradientAverager`.

    Args:
        model_or_parameters: the model, wrapped or not; or parameters, (name, parameter) pairs or
            parameter groups, such as `optimizer.param_groups`, which may differ in `rank`.
        compressor: what is sent; None is `PowerSGD()`.
        scaler: of the loss, in mixed precision: errors are kept in units of the loss, and where any
            worker's gradients have overflowed all workers' become infinite, so that each worker's
            scaler skips its step.
        nonfinite: what happens where some worker's gradient is NaN or infinite: "raise" a
            `NonFiniteGradientError` from `backward()`, or "skip": gradients are zero on all
            workers, and `check()` is False.
        bucket_bytes: gradients of about so many bytes are exchanged together.
        process_group: that of the model; None is the default group.
        model: where parameters are given, the model that they belong to. Gradients are exchanged in
            the order in which it has them, whatever the groups.

    Attributes:
        averager: exchanges gradients: a `GradientAverager`, whose parameters share the memory of
            the model's, in the order in which these were given.
        passes: how many backward passes have exchanged gradients.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model_or_parameters: nn.Module | ParamsT,
        compressor: Compressor | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        error_feedback: bool = True,
        start_compressing_at: int = 0,
        nonfinite: str = "raise",
        max_grad_norm: float | None = None,
        check_every: int = 0,
        bucket_bytes: int | None = BUCKET_BYTES,
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self._given_group, self._own_group = process_group, own_group(process_group)
        self._stand_ins = StandIns()
        self.averager = GradientAverager(
            self._stand_ins.of(model_or_parameters),
            compressor,
            error_feedback=error_feedback,
            start_compressing_at=start_compressing_at,
            nonfinite=nonfinite,
            max_grad_norm=max_grad_norm,
            check_every=check_every,
            bucket_bytes=bucket_bytes,
            process_group=process_group if self._own_group is None else self._own_group,
        )
        if model is not None:
            self.averager.engine.plan.order = self._stand_ins.places_in(model)
        self.scaler = scaler
        self.passes = 0
        self._pass: Pass | None = None
        self._worker = Worker()
        self._is_detached = False

    def receive(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Takes a bucket of gradients; the answer is the same bucket, averaged with all others."""
        if self._is_detached:
            return allreduce_hook(cast(Any, self.averager.process_group), bucket)
        buffer = bucket.buffer()
        devices = [] if buffer.device.type == "cpu" else [buffer.device]
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        current = self._pass
        if bucket.index() == 0 or current is None:
            current = self._begin()
        views: dict[Tensor, Tensor] = {}
        try:
            views = self._show(bucket)
        except Exception as error:  # DDP would hide it
            current.break_off(error)
        current.add(views, (future, buffer), last=bucket.is_last())
        if bucket.is_last():
            if not self._is_threaded:
                self._average(current)
            with contextlib.suppress(RuntimeError):  # in no backward pass: a worker has joined
                # DDP's own callback comes between the two, and must not be left out.
                _at_the_end(lambda: _at_the_end(self.check))
        return future

    def check(self) -> bool:
        """Waits for the last backward pass, and raises what it could not: see `compress`.

        Returns:
            Whether its gradients were averaged; if not (see `nonfinite`, `scaler`), on no worker.

        Raises:
            RuntimeError: it ended before all gradients were there, with an error of its own.
        """
        current = self._pass
        if current is None:
            return True
        self._settle()
        error, current.error = current.error, None
        if error is not None:
            raise error
        return bool(current.is_averaged)

    def stand_in_of(self, parameter: Tensor) -> Tensor | None:
        """What the averager has in place of a parameter; None for one that it does not know."""
        return self._stand_ins.by_parameter.get(parameter)

    def state_dict(self) -> dict[str, Any]:
        """That of the averager: this worker's errors, and the factors that all have in common."""
        self._wait()
        return self.averager.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what any worker's `state_dict`, or that of a `GradientAverager`, returned.

        Every worker loads. See `efsgd.checkpoint` for other numbers of workers.
        """
        self._wait()
        self.averager.load_state_dict(dict(state_dict))

    def communication_stats(self) -> dict[str, Any]:
        """See `GradientAverager.communication_stats`."""
        self._wait()
        return self.averager.communication_stats()

    def detach(self) -> None:
        """Ends compression: from now on gradients are averaged as if there were no hook."""
        self._wait()
        if self._own_group is not None and not self._is_detached:
            self.averager.process_group = self._given_group
            end_own_group(self._own_group, self._given_group)
        self._is_detached = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pass": None, "_given_group": None, "_own_group": None}

    def _wait(self) -> None:
        """Waits for an exchange that goes on."""
        if self._pass is not None and self._pass.is_whole:
            self._pass.join()

    def _settle(self) -> None:
        """Waits for the end of the last backward pass; one that is not whole is broken off."""
        current = self._pass
        if current is not None and not current.is_over:
            if not current.is_whole:
                current.break_off(_broken_off())
                if not self._is_threaded:
                    self._average(current)  # which tells the others
            current.join()

    @property
    def _is_threaded(self) -> bool:
        """Whether gradients are exchanged while others are computed; else, once all are there."""
        return self._own_group is not None and self.averager.join_device.type == "cpu"

    def _begin(self) -> Pass:
        self._settle()
        self.passes += 1
        unasked = None if self._pass is None else self._pass.error
        current = self._pass = Pass(error=unasked)
        if self._is_threaded:
            self._worker.give(functools.partial(self._average, current))
        return current

    def _show(self, bucket: Any) -> dict[Tensor, Tensor]:
        """Gives the averager the gradients of a bucket. Returns where each mean is written."""
        if bucket.buffer().layout != torch.strided:
            raise NotImplementedError(
                "DistributedDataParallel has a sparse gradient, which its hooks cannot average. "
                "Use dense ones, such as those of nn.Embedding(..., sparse=False), or a model "
                "without DistributedDataParallel and a GradientAverager."
            )
        views: dict[Tensor, Tensor] = {}
        for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            stand_in = self.stand_in_of(parameter)
            if stand_in is None:
                raise ValueError(
                    f"DistributedDataParallel has a gradient for a parameter of shape "
                    f"{list(parameter.shape)} that this CompressionState does not know. Make it "
                    f"from the model, or from all of its parameters that are trained."
                )
            views[stand_in] = view
            with leave_modes():
                is_absent = parameter.grad is None or _is_zero(view)
                stand_in.grad = None if is_absent else view.to(stand_in.dtype)
        return views

    def _average(self, current: Pass) -> None:
        """Averages the gradients of a pass, and gives DDP its answers, whatever happens."""
        try:
            self._stand_ins.follow()
            self.averager.engine.plan.arrivals = current.wait_for
            current.is_averaged = self.averager.average_(self.scaler)
            with leave_modes():
                self._write(current)
        except BaseException as error:  # is raised by `check`, in the thread of the program
            current.error, current.is_averaged = error, False
        finally:
            self.averager.engine.plan.arrivals = None
            for stand_in in self._stand_ins.by_parameter.values():
                stand_in.grad = None
            current.end()

    def _write(self, current: Pass) -> None:
        is_scaled = self.scaler is not None and self.scaler.is_enabled()
        for stand_in, view in current.views.items():
            if not current.is_averaged:
                view.fill_(torch.inf if is_scaled else 0)
            elif stand_in.grad is not None and stand_in.grad.data_ptr() != view.data_ptr():
                view.copy_(stand_in.grad)


def _is_zero(gradient: Tensor) -> bool:
    """Whether all elements are zero: what was not used has such a gradient in DDP's bucket."""
    if gradient.numel() and gradient[(0,) * gradient.dim()] != 0:
        return False  # the usual case, without reading all of it
    return not gradient.any()


def _at_the_end(function: Any) -> None:
    """Has a function called at the end of this backward pass; what it raises comes out of it."""
    cast(Any, torch.autograd.Variable)._execution_engine.queue_callback(function)


def _broken_off() -> RuntimeError:
    return RuntimeError(
        "The backward pass ended before all gradients were there. Nothing has changed on any "
        "worker. Find what it has raised; no step of the optimizer should follow."
    )
