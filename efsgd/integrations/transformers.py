"""The Trainer of transformers: one callback; "pip install efsgd[frameworks]"."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from efsgd.algorithms.interfaces import Compressor
from efsgd.errors import warn_user
from efsgd.integrations.attach import attach
from efsgd.integrations.attached import KEY, Attached

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "efsgd.integrations.transformers is a callback of transformers, which is not installed. "
        "Install it with: pip install 'transformers[torch]'"
    ) from error

__all__ = ["GradientCompression"]


class GradientCompression(TrainerCallback):
    """Compresses the gradients of a `transformers.Trainer`: `efsgd.attach` for its optimizer.

    Gradients are averaged during the backward pass, as without compression, so that the Trainer
    clips averaged ones. Checkpoints have what compression remembers, the mean over all workers, and
    so can be resumed on any number of them. `Attached.metrics` are logged whenever the loss is.

    Args:
        trainer: the Trainer, or one of its subclasses. It makes its optimizer now, unless it has
            one, so that a checkpoint can be loaded.
        compressor: what is sent; None is `PowerSGD(rank=4)`.
        options: those of `efsgd.attach`, but for the scaler, which is the Trainer's.

    Attributes:
        attached: what `efsgd.attach` has returned; None before training begins.

    Raises:
        NotImplementedError: the Trainer shards models or optimizers (FSDP, DeepSpeed).
        ValueError: when training begins: an option is out of range.
        TypeError: when training begins: the optimizer exchanges gradients by itself, or is none of
            torch's.

    Example::

        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.add_callback(GradientCompression(trainer, PowerSGD(rank=4)))
        trainer.train()
    """

    def __init__(self, trainer: Any, compressor: Compressor | None = None, **options: Any) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise NotImplementedError(
                "The Trainer is set up for FSDP or DeepSpeed. Compression is for workers that hold "
                "whole models: use its data-parallel training, by torchrun without either."
            )
        self.attached: Attached | None = None
        self._trainer, self._compressor, self._options = trainer, compressor, options
        self._wrapped: object = None
        # The Trainer loads its optimizer before training begins, and before there is a callback.
        self._loaded: Mapping[str, Any] | None = None
        trainer.create_optimizer().register_load_state_dict_pre_hook(self._note_loaded)

    def _note_loaded(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        if KEY in state_dict:  # and not where Accelerate moves a state to its device
            self._loaded = state_dict

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches: the model is wrapped by now. Loads what a checkpoint has of compression."""
        model, optimizer = self._trainer.model_wrapped, self._trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # within that of Accelerate
            optimizer = optimizer.optimizer
        loaded, self._loaded = self._loaded, None
        if self.attached is not None and model is self._wrapped:
            return
        if self.attached is not None:
            self.attached.detach()
        if loaded is not None:
            optimizer.state.clear()  # it is loaded once more, with what compression remembers
        scaler = self._trainer.accelerator.scaler
        self.attached = attach(model, optimizer, self._compressor, scaler=scaler, **self._options)
        self._wrapped = model
        self.attached.metrics()  # has what is logged measured from now on
        if loaded is not None:
            optimizer.load_state_dict(loaded)
        elif state.global_step > 0:
            warn_user(
                "The checkpoint was saved without GradientCompression, or the Trainer has made "
                "another optimizer since that was made, as with model_init. Compression begins "
                "anew, without errors."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Has worker 0 save what concerns all, in a moment."""
        if control.should_save and self.attached is not None:
            self.attached.consolidate()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same, where it is decided after the evaluation whether to save."""
        if args.save_strategy == "best" and self.attached is not None:
            self.attached.consolidate()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Logs beside the loss. Other callbacks have had `logs` by now: this makes its own."""
        if self.attached is not None and "loss" in (logs or {}):
            self._trainer.log(self.attached.metrics())
