"""Differential privacy and compression together: needs Opacus, "pip install efsgd[privacy]".

Each worker clips the gradients of its records one by one, adds noise of its own to their sum, and
only then do error feedback and compressor see it. Whatever follows, messages, errors and
parameters, is computed from what is private already. See `PrivateOptimizer`.
"""

try:
    import opacus  # noqa: F401
except ImportError as error:
    raise ImportError(
        "efsgd.privacy takes per-sample gradients and accountants from Opacus 1.6 or newer, which "
        "is not installed. Install it with: pip install 'efsgd[privacy]'"
    ) from error

from efsgd.privacy.accounting import epsilon, noise_multiplier
from efsgd.privacy.optimizer import PrivateOptimizer
from efsgd.privacy.sampling import poisson_batches

__all__ = ["PrivateOptimizer", "epsilon", "noise_multiplier", "poisson_batches"]
