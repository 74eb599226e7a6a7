"""The laws that hold for every compressor, and its claims: a function each."""

from efsgd.testing.laws.aggregators import (
    averages_what_is_sent,
    decompresses_alike,
    draws_as_claimed,
    leaves_deltas_alone,
    travels_as_claimed,
)
from efsgd.testing.laws.claims import contracts_as_claimed, is_unbiased_as_claimed
from efsgd.testing.laws.runs import (
    agrees_when_alone,
    refuses_without_a_trace,
    repeats_to_the_bit,
    resumes_to_the_bit,
)
from efsgd.testing.laws.sending import has_one_schedule, sends_what_it_announces
from efsgd.testing.laws.values import (
    keeps_shapes_and_dtypes,
    keeps_workers_equal,
    knows_the_norm,
    loses_nothing,
    survives_scales,
    survives_zeros,
)

__all__ = [
    "agrees_when_alone",
    "averages_what_is_sent",
    "contracts_as_claimed",
    "decompresses_alike",
    "draws_as_claimed",
    "has_one_schedule",
    "is_unbiased_as_claimed",
    "keeps_shapes_and_dtypes",
    "keeps_workers_equal",
    "knows_the_norm",
    "leaves_deltas_alone",
    "loses_nothing",
    "refuses_without_a_trace",
    "repeats_to_the_bit",
    "resumes_to_the_bit",
    "sends_what_it_announces",
    "survives_scales",
    "survives_zeros",
    "travels_as_claimed",
]
