"""What do the messages of a worker give away?"""

from efsgd.audit.observed import Message, Observed

__all__ = ["Message", "Observed"]
