"""Noise between gradients and compression: the optimizer that private training steps."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efsgd.checks import plain
from efsgd.engine.parameters import device_of, list_parameters
from efsgd.optimizers.averager import GradientAverager
from efsgd.privacy import requirements
from efsgd.privacy.accounting import Ledger, guarantees
from efsgd.privacy.clipping import Records
from efsgd.privacy.noise import NoiseSource, require_different
from efsgd.privacy.protection import Protection
from efsgd.privacy.requirements import SETTINGS
from efsgd.privacy.wrapper import Wrapper
from efsgd.wire.collectives import Broadcast, Exchange
from efsgd.wire.compare import compare


class PrivateOptimizer(Wrapper):
    """DP-SGD whose gradients are compressed between workers, with a guarantee for each observer.

    Wraps an optimizer of this package, or any other beside a `GradientAverager`. In each step every
    worker clips the gradients that Opacus has computed for its records to C, sums them, adds noise
    of its own, N(0, σ²C²), and divides by B/W. What follows (error feedback, compression, messages,
    update) sees nothing else, and costs no more privacy. From then on no step of the wrapped
    optimizer is without noise, whoever calls it.

    Args:
        optimizer: `PowerSGDOptimizer`, `ErrorFeedbackSGD` or `Signum`; or any other optimizer, with
            `averager`. One that has taken no step yet.
        noise_multiplier: σ of the guarantee against `observer`, at least 0.
        max_grad_norm: C, to which the gradient of each record is clipped; over all tensors
            together. (That of the wrapped optimizer clips means, and protects nobody.)
        expected_batch_size: B, the expected number of records in a step of all workers together:
            the sampling rate times the number of all records. Not rounded.
        observer: whom the noise is made for. "messages": whoever sees all that a worker sends;
            each worker adds σ. "sum": whoever sees only sums over the workers, as by secure
            aggregation (an all-reduce is none); each worker adds σ/√W, and only compressors that
            average are allowed.
        sample_rate: the probability q with which a record takes part in a step, for `guarantees`.
            None counts on no sampling: as if every record took part in every step.
        averager: exchanges gradients for an optimizer that does not.
        module: the `GradSampleModule` whose gradients are read. It is checked; with ghost clipping
            it is needed.
        generator: of this worker's noise, on the device of the parameters, for tests; never the
            same on two workers. It protects less: the state of torch's generators can be computed
            from noise that is sent where gradients are zero, and seeds can be tried. None, the
            default, draws from a cryptographic generator that the operating system seeds.

    Raises:
        TypeError: of `optimizer`, `averager` or `module`, one cannot be protected: says what can.
        ValueError: a setting is out of range, or the optimizer has sent gradients without noise.

    Example:
        >>> from opacus import GradSampleModule
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.privacy import PrivateOptimizer
        >>> model = GradSampleModule(torch.nn.Linear(64, 32))
        >>> optimizer = PrivateOptimizer(
        ...     PowerSGDOptimizer(model.parameters(), lr=0.1, momentum_form="sgd", rank=2),
        ...     noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8, sample_rate=0.01,
        ... )
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> round(optimizer.guarantees(delta=1e-5)["messages"]["rdp"], 3)
        0.956

    Source: Abadi et al., CCS 2016, arXiv 1607.00133, Algorithm 1; with compression: Lin, arXiv
    2211.00734.
    """

    # A GradScaler then says that it is there, and is refused.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        observer: Literal["messages", "sum"] = "messages",
        sample_rate: float | None = None,
        averager: GradientAverager | None = None,
        module: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(optimizer, requirements.exchanger_of(optimizer, averager))
        self.averager = averager
        self.noise_multiplier, self.max_grad_norm = plain(noise_multiplier), plain(max_grad_norm)
        self.expected_batch_size, self.observer = plain(expected_batch_size), observer
        self.sample_rate: float | None = plain(sample_rate)
        self._module = module
        self._validate()
        is_ghost = requirements.require_module(module)
        self.loss_reduction = getattr(module, "loss_reduction", "mean")
        self._records, self._noise = Records(is_ghost), NoiseSource(generator)
        self._ledger = Ledger()
        self._failure: Exception | None = None
        self._skips: list[bool] = []
        self.is_skipped = False
        self._exchanger.engine.preparations.append(self)
        self._protection = Protection(optimizer, self._exchanger, self._ledger)

    # ---- a step ---------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips, sums, adds noise, and takes the wrapped optimizer's step.

        Every worker must call it the same number of times, with an empty batch as well. The batch,
        one backward pass, is used up, whether the step succeeds or not.

        Args:
            closure: computes the loss and gradients of records; called once, before anything else.

        Returns:
            What `closure` returns.

        Raises:
            ValueError: there are no gradients of records, or they cannot be used; nothing has
                changed.
            RuntimeError: a GradScaler steps it.
            CollectiveError: a worker could not take part; parameters and state are as they were.
        """
        with self._used_up():
            if getattr(self, "grad_scale", None) is not None:
                raise RuntimeError(
                    "A GradScaler multiplies losses, and gradients would be clipped with its "
                    "factor in them. Train in float32 or bfloat16, without a scaler."
                )
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self.is_skipped = bool(self._skips) and self._skips.pop(0)
            if self.is_skipped:
                self._collect_part()
            elif self.averager is None or self.averager.average_():
                with self._protection.stepping():
                    self.original_optimizer.step()
        return loss

    def exchange(self, world_size: int = 1, worker: int = 0) -> Exchange[bool]:
        """The step as an exchange; see `ErrorFeedbackSGD.exchange`."""
        with self._used_up():
            applied = yield from self._exchanger.exchange(world_size, worker)
            if applied and self.averager is not None:
                with self._protection.stepping():
                    self.original_optimizer.step()
        return applied

    @contextlib.contextmanager
    def _used_up(self) -> Iterator[None]:
        """Where a step fails nothing of its batch is left that a later one would add to."""
        try:
            yield
        except BaseException:
            self._records.drop(self._parameters())
            self._failure = None
            raise

    def _collect_part(self) -> None:
        """A step that is skipped; the other workers learn of an error in the one that follows."""
        try:
            with self._used_up():
                self._collect()
        except Exception as error:
            self._failure = error

    def prepare(self, world_size: int, worker: int) -> None:
        """Sets `p.grad` to the noisy mean over this worker's records. Part of every step."""
        with self._used_up():
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            self._validate()
            # All workers must change them before the same step, which then begins with `agree`.
            self._exchanger.engine.plan.prepared_with = tuple(self._settings().items())
            self._collect()
            self._make_gradients(world_size)

    def _make_gradients(self, world_size: int) -> None:
        expected = self.expected_batch_size / world_size
        most = min(2 * expected, self.expected_batch_size)
        self._records.end_batch(most)
        share = 1.0 if self.observer == "messages" else world_size**-0.5
        noise, rate = self.noise_multiplier * share, self.sample_rate or 1.0
        averages = self._exchanger.compressor.claims().averages
        # Before anything is sent: messages of a step that fails have been seen, too.
        self._ledger.record(noise, world_size, rate, averages)
        for parameter in self._trained():
            total = self._records.take(parameter)
            self._noise.add_(total, noise * self.max_grad_norm)
            self._records.written[parameter] = gradient = total.div_(expected).to(parameter.dtype)
            parameter.grad = gradient

    def agree(self, world_size: int, worker: int) -> Exchange[None]:
        """Workers compare settings, which must be equal, and noise, which must not be."""
        device = device_of(self._exchanger.param_groups)
        yield from compare([f"{name}={value}" for name, value in self._settings().items()], device)
        if self.noise_multiplier > 0:
            yield from require_different(self._noise.digests(), device)
        lineage = torch.tensor([self._ledger.lineage], dtype=torch.int64, device=device)
        self._ledger.join(int((yield Broadcast(lineage, "whose steps these are", 0))))

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    def _validate(self) -> None:
        """Checks everything before a step: users and schedulers change settings."""
        requirements.require_settings(self._settings())
        requirements.require_averaging(self.observer, self._exchanger)
        requirements.require_dtypes(self._exchanger.param_groups)
        requirements.require_same_norm(self._module, self.max_grad_norm)
        if self.averager is not None:
            requirements.require_all_averaged(self.original_optimizer, self.averager)

    def _parameters(self) -> list[Tensor]:
        return [info.parameter for info in list_parameters(self._exchanger.param_groups)]

    def _trained(self) -> dict[Tensor, str]:
        infos = list_parameters(self._exchanger.param_groups)
        return {info.parameter: info.name for info in infos if info.is_trained}

    def _collect(self) -> None:
        self._records.collect(self._trained(), self.max_grad_norm)

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Says whether the next `step()` only adds records; after that `is_skipped` tells."""
        self._skips.append(do_skip)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients and gradients of records, but not what skipped steps have collected.

        Args:
            set_to_none: makes no difference: they become None.
        """
        self._records.zero_grad(self._parameters())
        if not self.is_skipped:
            self._records.clear()
        self.original_optimizer.zero_grad(set_to_none=True)

    # ---- guarantees -----------------------------------------------------------------------------

    def guarantees(self, delta: float) -> dict[str, dict[str, float]]:
        """The ε of all steps taken so far, by observer and accountant.

        For neighbouring data sets that differ by one record, whose worker is fixed. Observers are:

        * "messages": sees all that workers send, or the model alone.
        * "sum": sees sums of messages, and the model. Where the compressor gathers it is left out:
          every worker gets every message.
        * "sum_to_worker": sees the same and is a worker, which knows its own noise. Left out as
          well with a single worker.

        Args:
            delta: δ, far less than one over the number of records.

        Returns:
            For each observer the ε by "prv" and by "rdp", the accountants of Opacus; see
            `efsgd.privacy.epsilon`. Steps count from the moment in which something may have been
            sent, also where they failed.
        """
        averages = self._exchanger.compressor.claims().averages
        return guarantees(self._ledger.steps, delta, averages=averages)

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer, and under "privacy" what has been released so far.

        The state of the noise is not in it: noise that is drawn again for other records cancels in
        the difference. An averager's is saved by itself, and has "privacy" as well.
        """
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` or `efsgd.checkpoint.consolidated_state_dict` has returned.

        What was released before it was saved is counted: once, where this very optimizer has
        released it, or has loaded it before. Steps that a process took after its last checkpoint
        are not known to another one.

        Raises:
            ValueError: it is of an optimizer whose errors hold gradients without noise.
        """
        self.original_optimizer.load_state_dict(dict(state_dict))

    def __repr__(self) -> str:
        settings = f"noise_multiplier={self.noise_multiplier}, max_grad_norm={self.max_grad_norm}"
        return (
            f"PrivateOptimizer({settings}, observer={self.observer!r})\n{self.original_optimizer}"
        )
