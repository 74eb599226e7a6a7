"""Lightning: one callback compresses, saves, resumes and logs; "pip install efsgd[frameworks]"."""

from typing import Any

from efsgd.algorithms.interfaces import Compressor
from efsgd.integrations.attach import attach
from efsgd.integrations.attached import Attached

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "efsgd.integrations.lightning is a callback of Lightning, which is not installed. "
            "Install it with: pip install lightning"
        ) from error

__all__ = ["GradientCompression"]


class GradientCompression(Callback):
    """Compresses the gradients of a `lightning.Trainer`: `efsgd.attach` for its optimizer.

    Gradients are averaged before Lightning clips them, during the backward pass if the strategy
    wraps the model in `DistributedDataParallel`. Checkpoints have what compression remembers, the
    mean over all workers, and so can be resumed on any number of them. `Attached.metrics` go to
    the trainer's loggers, every `log_every_n_steps` steps.

    Args:
        compressor: what is sent; None is `PowerSGD(rank=4)`.
        options: those of `efsgd.attach`, but for the scaler, which is that of the trainer.

    Attributes:
        attached: what `efsgd.attach` has returned; None before the first fit.

    Raises:
        ValueError: when fitting begins: an option is out of range, or the module has several
            optimizers.
        TypeError: when fitting begins: the optimizer exchanges gradients by itself, or is none of
            torch's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from efsgd import PowerSGD
        >>> from efsgd.integrations.lightning import GradientCompression
        >>> compression = GradientCompression(PowerSGD(rank=4), start_compressing_at=100)
        >>> trainer = Trainer(accelerator="cpu", callbacks=[compression], logger=False)
    """

    def __init__(self, compressor: Compressor | None = None, **options: Any) -> None:
        self.attached: Attached | None = None
        self._compressor, self._options = compressor, options
        self._logged_step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches: the model is wrapped by now, and its optimizer is yet to be loaded."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers, and "
                f"GradientCompression is for one. Call efsgd.attach for each of them in "
                f"on_fit_start, with a strategy that does not wrap the module in "
                f"DistributedDataParallel."
            )
        if self.attached is not None:
            self.attached.detach()
        (optimizer,) = trainer.optimizers
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        attached = attach(
            trainer.model, optimizer, self._compressor, scaler=scaler, **self._options
        )
        # Lightning calls state_dict() on all workers, and writes what worker 0 got.
        optimizer.register_state_dict_pre_hook(lambda _: attached.consolidate())
        self.attached = attached

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Notes where training begins, or goes on, and has what is logged measured from here."""
        self._logged_step = trainer.global_step
        if self.attached is not None and trainer.loggers:
            self.attached.metrics()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Averages, where the backward pass has not: gradients are clipped next."""
        if self.attached is not None:
            self.attached.average_()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, after a step."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if self.attached is None or step == self._logged_step or not every or step % every:
            return
        self._logged_step = step
        metrics = self.attached.metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
