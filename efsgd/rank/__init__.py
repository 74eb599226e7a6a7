"""Ranks, densities and bits that change as training goes on, each parameter's by itself."""

from efsgd.rank.accordion import Accordion, is_critical
from efsgd.rank.base import Layer, RankPolicy, Value
from efsgd.rank.communication_budget import CommunicationBudget
from efsgd.rank.scheduler import RankScheduler

__all__ = [
    "Accordion",
    "CommunicationBudget",
    "Layer",
    "RankPolicy",
    "RankScheduler",
    "Value",
    "is_critical",
]
