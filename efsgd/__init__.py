"""efsgd: error-feedback compressed SGD for PyTorch.

`PowerSGDOptimizer` takes the place of torch.optim.SGD in data-parallel training and sends rank-r
gradients in place of full ones. See https://arxiv.org/abs/1905.13727. `ErrorFeedbackSGD` does so
with any compressor of the family.
"""

from efsgd.compressors import (
    LQSGD,
    Claims,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    SpectralAtomo,
    SymmetricQuantized,
    TensorCompressor,
    TopK,
    UniformQuantized,
)
from efsgd.errors import CollectiveError, NonFiniteGradientError, WorkerMismatchError
from efsgd.integrations.attach import attach
from efsgd.integrations.attached import Attached
from efsgd.integrations.model_buffers import average_buffers, broadcast_buffers
from efsgd.optimizers.averager import GradientAverager
from efsgd.optimizers.error_feedback_sgd import ErrorFeedbackSGD
from efsgd.optimizers.powersgd import PowerSGDOptimizer
from efsgd.optimizers.signum import Signum
from efsgd.wire.payload import Field

__all__ = [
    "LQSGD",
    "Attached",
    "Claims",
    "CollectiveError",
    "ErrorFeedbackSGD",
    "Field",
    "GradientAverager",
    "Identity",
    "NonFiniteGradientError",
    "PowerSGD",
    "PowerSGDOptimizer",
    "PowerSGDPlus",
    "RandomBlock",
    "RandomK",
    "SignNorm",
    "Signum",
    "SpectralAtomo",
    "SymmetricQuantized",
    "TensorCompressor",
    "TopK",
    "UniformQuantized",
    "WorkerMismatchError",
    "__version__",
    "attach",
    "average_buffers",
    "broadcast_buffers",
]

__version__ = "0.1.0"
