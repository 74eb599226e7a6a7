"""A warning where compression hardly saves bytes: when it comes, from whom, and what it says."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    GradientAverager,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    Signum,
    SpectralAtomo,
    TopK,
    UniformQuantized,
)
from efsgd.algorithms.interfaces import Compressor
from efsgd.testing import Traced, step_together
from efsgd.testing.simulation import Simulation
from tests.simulation import bits, snapshot
from tests.strategies import gaussian

Make = Callable[[list[Tensor]], Any]
SMALL = [(4, 4), (3,)]
GOOD = [(64, 64), (3,)]


def sgd(compressor: Compressor, **options: Any) -> Make:
    return lambda p: ErrorFeedbackSGD(p, lr=0.1, compressor=compressor, **options)


def made(make: Make, shapes: Sequence[Sequence[int]], world_size: int, **kind: Any) -> list[Any]:
    return [
        make([torch.zeros(shape, **kind).requires_grad_() for shape in map(torch.Size, shapes)])
        for _ in range(world_size)
    ]


def trained(workers: Sequence[Any], step: int = 0) -> tuple[list[str], list[Traced]]:
    """One step: the warnings of savings that came in it, and its collectives."""
    for worker, optimizer in enumerate(workers):
        for group in optimizer.param_groups:
            for position, p in enumerate(group["params"]):
                seed = 1000 * step + 100 * worker + position
                p.grad = gaussian(p.shape, seed).to(p.dtype)
                if position in group.get("sparse", ()):
                    p.grad = p.grad.to_sparse()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = step_together(workers)
    texts = [str(each.message) for each in caught]
    return [text for text in texts if text.startswith("Compression saves little")], trace


def warned(workers: Sequence[Any], steps: int = 4) -> list[tuple[int, str]]:
    return [(step, text) for step in range(steps) for text in trained(workers, step)[0]]


OPTIMIZERS: dict[str, Make] = {
    "ErrorFeedbackSGD": sgd(PowerSGD(rank=4)),
    "GradientAverager": lambda p: GradientAverager(p, compressor=PowerSGD(rank=4)),
    "Signum": Signum,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_warns_once(name: str) -> None:
    shapes = [(1,), (1,)] if name == "Signum" else SMALL
    ((step, _),) = warned(made(OPTIMIZERS[name], shapes, 3))
    assert step == 0


@pytest.mark.parametrize("world_size", [2, 5])
def test_it_is_worker_0_who_warns(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    workers, told = made(sgd(PowerSGD(rank=4)), SMALL, world_size), []
    for worker, optimizer in enumerate(workers):
        savings = optimizer.engine._savings
        judge = savings.judge
        monkeypatch.setattr(savings, "judge", lambda *a, w=worker, f=judge: told.append(w) or f(*a))
    assert len(warned(workers)) == 1
    assert told == [0]


@pytest.mark.parametrize(
    ("make", "shapes", "world_size"),
    [
        (sgd(PowerSGD(rank=4)), GOOD, 3),
        (sgd(PowerSGD(rank=4)), SMALL, 1),
        (sgd(PowerSGD(rank=4, min_compression_rate=math.inf)), GOOD, 3),
        (sgd(PowerSGD(rank=4, min_compression_rate=math.inf)), SMALL, 3),
        (sgd(PowerSGD(rank=4, min_compression_rate=math.inf, batch_dims=1)), [(2, 64, 64)], 3),
        (sgd(Identity()), GOOD, 3),
        (sgd(Identity()), SMALL, 3),
        (sgd(PowerSGD(rank=4), start_compressing_at=4), SMALL, 3),
        (sgd(PowerSGDPlus(rank=4, refresh_every=3)), GOOD, 3),
        (sgd(PowerSGD(rank=40, alternating=True)), [(130, 130)], 3),
        (sgd(SignNorm()), GOOD, 3),
        (Signum, GOOD, 3),
    ],
)
def test_nobody_warns_where_it_pays_or_nothing_is_meant_to_be_compressed(
    make: Make, shapes: Sequence[Sequence[int]], world_size: int
) -> None:
    assert warned(made(make, shapes, world_size)) == []


def test_what_is_sent_uncompressed_by_choice_is_so_in_half_precision() -> None:
    """Sent as float32 it is twice the bytes, and still what was asked for."""
    make = sgd(PowerSGD(min_compression_rate=math.inf))
    assert warned(made(make, GOOD, 2, dtype=torch.bfloat16)) == []


@pytest.mark.parametrize(
    ("compressor", "shapes", "step"),
    [
        (PowerSGD(rank=4), [(2**10, 2), (2,)], 0),
        (PowerSGD(rank=4, alternating=True), SMALL, 0),
        (PowerSGDPlus(rank=4, refresh_every=100), [(4, 4), (900,), (16, 16)], 1),
        (PowerSGDPlus(rank=4, refresh_every=1), GOOD, 0),
        (LQSGD(rank=4), SMALL, 0),
        (TopK(density=0.5), GOOD, 0),
        (TopK(rank=4, scope="tensor"), SMALL, 0),
        (RandomK(rank=4), SMALL, 0),
        (RandomBlock(rank=4), SMALL, 0),
        (SpectralAtomo(), SMALL, 0),
        (UniformQuantized(), [(2,), (1,)], 0),
    ],
)
def test_every_compressor_may_save_little(
    compressor: Compressor, shapes: Sequence[Sequence[int]], step: int
) -> None:
    ((found, text),) = warned(made(sgd(compressor), shapes, 2))
    assert found == step or compressor.step_kind(0, {"alternating": True}) is not None
    assert f"step {found} has sent" in text


def test_it_waits_for_the_first_step_that_compresses() -> None:
    workers = made(sgd(PowerSGD(rank=4), start_compressing_at=2), SMALL, 2)
    assert [step for step, _ in warned(workers)] == [2]


def test_the_limit_is_a_fifth() -> None:
    """[n, n] sends 2n floats at rank 1; words are one for the matrix and each worker."""
    for n, saved in ((11, 0.8 * 121 - 22 - 3), (16, 0.8 * 256 - 32 - 3)):
        # A vector of that many floats makes up the rest: v + sent = 0.8 (n² + v).
        rest = math.floor((saved - 1) / 0.2)
        within = made(sgd(PowerSGD(rank=1)), [(n, n), (rest,)], 2)
        beyond = made(sgd(PowerSGD(rank=1)), [(n, n), (rest + 1,)], 2)
        stats = [trained(each)[0] for each in (within, beyond)]
        assert [len(texts) for texts in stats] == [0, 1]
        ratios = [each[0].communication_stats() for each in (within, beyond)]
        shares = [each["bytes_sent"] / each["bytes_uncompressed"] for each in ratios]
        assert shares[0] <= 0.8 < shares[1]


def numbers_in(text: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d|\d", text)]


@pytest.mark.parametrize(
    ("make", "shapes", "kind", "words"),
    [
        (PowerSGD(rank=4), [(8, 8)], {}, "256 are in matrices too small to be compressed (1, [8"),
        (PowerSGD(rank=4), [(4, 999), (4, 9)], {}, "as LoRA's are (1, [4, 999])"),
        (PowerSGD(rank=4), [(4, 999), (998, 4)], {}, "LoRA's are (2, the largest [4, 999])"),
        (PowerSGD(rank=4), [(9000,), (32, 32)], {}, "36,000 are in vectors, which are sent"),
        (PowerSGD(rank=4), [(9000,), (32, 32)], {}, "4,096 are in tensors that are compressed to"),
        (PowerSGD(rank=50), [(101, 101)], {}, "With rank=25 a step sends 20,212 bytes."),
        (PowerSGD(rank=4), [(3, 64, 64)], {}, "set batch_dims=1"),
        (PowerSGD(rank=4), [(2, 2)] * 9, {}, "each worker, add 44"),
        (PowerSGD(rank=8), [(32, 32)], {"dtype": torch.float16}, "of float16 are sent as float32"),
    ],
)
def test_it_says_why(
    make: Compressor, shapes: Sequence[Sequence[int]], kind: dict[str, Any], words: str
) -> None:
    workers = made(sgd(make), shapes, 2, **kind)
    ((_, text),) = warned(workers, 1)
    assert words in text
    stats = workers[0].communication_stats()
    assert numbers_in(text)[1:3] == [stats["bytes_sent"], stats["bytes_uncompressed"]]


def test_the_rank_that_it_names_sends_what_it_says() -> None:
    shapes = [(40, 60), (2, 30, 30), (7,), (5, 5)]
    ((_, text),) = warned(made(sgd(PowerSGD(rank=30)), shapes, 3), 1)
    found = re.search(r"With rank=(\d+) a step sends ([\d,]+) bytes", text)
    assert found is not None
    workers = made(sgd(PowerSGD(rank=int(found[1]))), shapes, 3)
    assert warned(workers) == []
    sent = workers[0].communication_stats()["bytes_sent"]
    assert sent == int(found[2].replace(",", ""))


def test_sparse_gradients_are_a_reason() -> None:
    workers = made(sgd(PowerSGD(rank=2)), [(500, 8), (16, 16)], 2)
    for optimizer in workers:
        optimizer.param_groups[0]["sparse"] = (0,)
    ((_, text),) = warned(workers)
    assert "16,000 are in tensors with sparse gradients" in text and "sparse=False" in text


def test_groups_that_are_not_compressed_are_a_reason_among_others() -> None:
    def make(parameters: list[Tensor]) -> Any:
        first = {"params": parameters[:1], "min_compression_rate": math.inf}
        return sgd(PowerSGD(rank=2))([first, {"params": parameters[1:]}])  # type: ignore[list-item]

    ((_, text),) = warned(made(make, [(64, 64), (16, 16)], 2))
    assert "16,384 are in tensors that their group has sent uncompressed" in text


def test_it_changes_no_bit_and_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    told, quiet = (made(sgd(PowerSGD(rank=4), momentum=0.9), SMALL, 3) for _ in range(2))
    for optimizer in quiet:
        optimizer.engine._savings.is_known = True
    for step in range(3):
        texts, trace = trained(told, step)
        silence, same = trained(quiet, step)
        assert len(texts) == (step == 0) and silence == []
        assert trace == same
        assert bits(snapshot(told)) == bits(snapshot(quiet))


def test_a_skipped_step_says_nothing() -> None:
    workers = made(sgd(PowerSGD(rank=4), nonfinite="skip"), SMALL, 2)
    for worker, optimizer in enumerate(workers):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, torch.nan if worker else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_together(workers)
    assert [step for step, _ in warned(workers)] == [0]


def test_as_an_error_it_comes_after_the_step() -> None:
    """So that other workers are not kept waiting."""
    workers = made(sgd(PowerSGD(rank=4)), SMALL, 2)
    trained(workers)
    expected = [p.detach().clone() for p in workers[0].param_groups[0]["params"]]
    again = made(sgd(PowerSGD(rank=4)), SMALL, 2)
    for one, other in zip(again, workers, strict=True):
        for p, q in zip(
            one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True
        ):
            p.grad = q.grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception, match=r"worker 0 raised UserWarning.*worker 1 returned True"):
            step_together(again)
    for optimizer in again:
        assert bits(optimizer.param_groups[0]["params"]) == bits(expected)
        assert optimizer.communication_stats()["steps"] == 1


def test_those_who_try_compressors_are_not_warned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Simulation(PowerSGD(rank=4), 2, SMALL).take(0)
