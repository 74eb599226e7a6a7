"""For tests: many workers in one thread, and the laws that every compressor must keep."""

from efsgd.testing.check import LAWS, check_compressor
from efsgd.testing.processes import check_in_processes
from efsgd.testing.violations import CompressorLawError
from efsgd.wire.lockstep import Lockstep, LockstepError, Traced, lockstep, step_together

__all__ = [
    "LAWS",
    "CompressorLawError",
    "Lockstep",
    "LockstepError",
    "Traced",
    "check_compressor",
    "check_in_processes",
    "lockstep",
    "step_together",
]
