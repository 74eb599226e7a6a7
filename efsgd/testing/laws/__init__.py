"""The laws that hold for every compressor, and its claims: a function each."""

from efsgd.testing.laws.aggregators import (
    averages_what_is_sent,
    compresses_rows_alike,
    decompresses_alike,
    draws_as_claimed,
    leaves_deltas_alone,
    travels_as_claimed,
)
from efsgd.testing.laws.claims import contracts_as_claimed, is_unbiased_as_claimed
from efsgd.testing.laws.linearity import is_linear_as_claimed
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

#: In the order in which they are tried.
IN_THIS_THREAD = (
    sends_what_it_announces,
    has_one_schedule,
    decompresses_alike,
    compresses_rows_alike,
    leaves_deltas_alone,
    keeps_shapes_and_dtypes,
    survives_zeros,
    survives_scales,
    keeps_workers_equal,
    loses_nothing,
    knows_the_norm,
    averages_what_is_sent,
    travels_as_claimed,
    is_linear_as_claimed,
    contracts_as_claimed,
    is_unbiased_as_claimed,
    repeats_to_the_bit,
    refuses_without_a_trace,
    resumes_to_the_bit,
    draws_as_claimed,
    agrees_when_alone,
)

__all__ = tuple(law.__name__ for law in IN_THIS_THREAD)
