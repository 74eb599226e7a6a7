"""Whether compression pays: steps with and without it, predicted for a model and a network."""

from efsgd.planning.advice import advise, default_candidates
from efsgd.planning.alpha_beta import Link
from efsgd.planning.measuring import measure_link
from efsgd.planning.report import Plan, Row

__all__ = ["Link", "Plan", "Row", "advise", "default_candidates", "measure_link"]
