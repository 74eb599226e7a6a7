"""What do the messages of a worker give away?"""

from efsgd.audit.observed import Message, Observed
from efsgd.audit.recording import Recording, observe

__all__ = ["Message", "Observed", "Recording", "observe"]
