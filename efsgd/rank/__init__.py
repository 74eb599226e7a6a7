"""Ranks, densities and bits that change during training, for each parameter by itself."""

from efsgd.rank.allocation import Candidate, allocate, allocate_within
from efsgd.rank.base import RankPolicy
from efsgd.rank.costs.network import Network
from efsgd.rank.costs.objectives import Costs, StepTime
from efsgd.rank.layers import Layer, Value
from efsgd.rank.policies.accordion import Accordion, is_critical
from efsgd.rank.policies.communication_budget import CommunicationBudget
from efsgd.rank.policies.l_greco import LGreCo
from efsgd.rank.policies.uniform import Uniform
from efsgd.rank.scheduler import RankScheduler

__all__ = [
    "Accordion",
    "Candidate",
    "CommunicationBudget",
    "Costs",
    "LGreCo",
    "Layer",
    "Network",
    "RankPolicy",
    "RankScheduler",
    "StepTime",
    "Uniform",
    "Value",
    "allocate",
    "allocate_within",
    "is_critical",
]
