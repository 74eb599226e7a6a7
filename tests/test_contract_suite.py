"""Every compressor of the package keeps the laws, in lockstep and in processes of its own."""

from typing import Any

import pytest

from efsgd import PowerSGD
from efsgd.testing import check_compressor, check_in_processes

#: All of them, with settings that differ in what is done.
EVERY_COMPRESSOR: list[Any] = [
    PowerSGD(rank=1),
    PowerSGD(rank=2, min_compression_rate=0.0),
    PowerSGD(rank=2, warm_start=False),
]
#: Those that are used without error feedback, too.
WITHOUT_ERROR_FEEDBACK: list[Any] = [PowerSGD(rank=2)]


@pytest.mark.parametrize("compressor", EVERY_COMPRESSOR, ids=repr)
def test_the_laws_hold(compressor: Any) -> None:
    check_compressor(compressor, processes=0)


@pytest.mark.parametrize("compressor", WITHOUT_ERROR_FEEDBACK, ids=repr)
def test_the_laws_hold_without_error_feedback(compressor: Any) -> None:
    check_compressor(compressor, processes=0, error_feedback=False)


@pytest.mark.xdist_group("processes")
def test_worker_processes_compute_what_lockstep_computes() -> None:
    check_in_processes(EVERY_COMPRESSOR)
