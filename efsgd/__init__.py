"""efsgd: error-feedback compressed SGD for PyTorch.

`PowerSGDOptimizer` takes the place of torch.optim.SGD in data-parallel training and sends rank-r
gradients in place of full ones. See https://arxiv.org/abs/1905.13727.
"""

from efsgd.averager import GradientAverager
from efsgd.buffers import average_buffers
from efsgd.compressors import PowerSGD, TensorCompressor
from efsgd.errors import CollectiveError, NonFiniteGradientError, WorkerMismatchError
from efsgd.optimizer import ErrorFeedbackSGD, PowerSGDOptimizer
from efsgd.payload import Field

__all__ = [
    "CollectiveError",
    "ErrorFeedbackSGD",
    "Field",
    "GradientAverager",
    "NonFiniteGradientError",
    "PowerSGD",
    "PowerSGDOptimizer",
    "TensorCompressor",
    "WorkerMismatchError",
    "__version__",
    "average_buffers",
]

__version__ = "0.1.0"
