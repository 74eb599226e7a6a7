"""What do the messages of a worker give away?"""

from efsgd.audit.analytic import label_of, linear_inputs, mean_gradients, singular_inputs
from efsgd.audit.observed import Message, Observed
from efsgd.audit.recording import Recording, observe

__all__ = [
    "Message",
    "Observed",
    "Recording",
    "label_of",
    "linear_inputs",
    "mean_gradients",
    "observe",
    "singular_inputs",
]
