"""Every compressor of the package keeps the laws, in lockstep and in processes of its own."""

from typing import Any

import pytest

from efsgd import (
    LQSGD,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    SpectralAtomo,
    SymmetricQuantized,
    TopK,
    UniformQuantized,
)
from efsgd.testing import check_compressor, check_in_processes

#: All of them, with settings that differ in what is done.
EVERY_COMPRESSOR: list[Any] = [
    Identity(),
    PowerSGD(rank=1),
    PowerSGD(rank=2, min_compression_rate=0.0),
    PowerSGD(rank=2, warm_start=False),
    PowerSGD(rank=2, alternating=True),
    PowerSGDPlus(rank=2, refresh_every=3),
    PowerSGDPlus(rank=2, refresh_every=3, svd="randomized"),
    PowerSGDPlus(rank=1, refresh_every=2, svd="randomized", refresh_update="exact"),
    LQSGD(rank=2),
    LQSGD(rank=2, bits=4, aggregation="scatter"),
    LQSGD(rank=1, bits=13, min_compression_rate=0.0, aggregation="scatter"),
    LQSGD(rank=2, bits=2),
    TopK(density=0.1),
    TopK(rank=1),
    TopK(density=0.1, scope="model"),
    RandomK(density=0.2),
    RandomK(rank=1),
    RandomBlock(density=0.2),
    RandomBlock(rank=1),
    SignNorm(),
    UniformQuantized(bits=8),
    UniformQuantized(bits=3, stochastic=True),
    SymmetricQuantized(bits=4),
    SpectralAtomo(rank=2),
    SpectralAtomo(rank=1, sampling="rejection"),
]
#: Those that are used without error feedback, too.
WITHOUT_ERROR_FEEDBACK: list[Any] = [
    PowerSGD(rank=2),
    TopK(density=0.1),
    UniformQuantized(bits=3, stochastic=True),
    SpectralAtomo(rank=2),
]


@pytest.mark.parametrize("compressor", EVERY_COMPRESSOR, ids=repr)
def test_the_laws_hold(compressor: Any) -> None:
    first = next(each for each in EVERY_COMPRESSOR if type(each) is type(compressor))
    options: dict[str, Any] = {}
    if compressor is not first:
        # What depends on the number of workers, or of steps, does so for all settings of a class.
        steps = max(3, getattr(compressor, "refresh_every", 0) + 1)
        options = {"world_sizes": (1, 3), "steps": steps}
    check_compressor(compressor, processes=0, **options)


@pytest.mark.parametrize("compressor", WITHOUT_ERROR_FEEDBACK, ids=repr)
def test_the_laws_hold_without_error_feedback(compressor: Any) -> None:
    check_compressor(compressor, processes=0, error_feedback=False)


@pytest.mark.xdist_group("processes")
def test_worker_processes_compute_what_lockstep_computes() -> None:
    check_in_processes(EVERY_COMPRESSOR, processes=3)
