"""Ranks, densities and bits that change as training goes on, each parameter's by itself."""

from efsgd.rank.accordion import Accordion, is_critical
from efsgd.rank.allocation import Candidate, allocate, allocate_within
from efsgd.rank.base import Layer, RankPolicy, Value
from efsgd.rank.communication_budget import CommunicationBudget
from efsgd.rank.constant import Uniform
from efsgd.rank.l_greco import Costs, LGreCo
from efsgd.rank.scheduler import RankScheduler

__all__ = [
    "Accordion",
    "Candidate",
    "CommunicationBudget",
    "Costs",
    "LGreCo",
    "Layer",
    "RankPolicy",
    "RankScheduler",
    "Uniform",
    "Value",
    "allocate",
    "allocate_within",
    "is_critical",
]
