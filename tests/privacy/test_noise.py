"""Noise: how much of it there is, whose it is, and that it is sent whatever the batch."""

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import TensorDataset

from efsgd import PowerSGDOptimizer
from efsgd.privacy import PrivateOptimizer, poisson_batches
from efsgd.privacy import noise as noise_module
from efsgd.privacy.noise import NoiseSource, secret_normals, secret_uniforms
from efsgd.testing import Traced
from tests.privacy.teams import (
    ERROR_RATE,
    FAMILY,
    SHAPES,
    Make,
    adamw,
    assert_chi_square,
    assert_variance,
    empty_records,
    flat,
    give,
    gradients_of,
    made_records,
    power_sgd,
    private_team,
    seeded,
    start_of,
    step_watched,
    step_with,
    take_step,
)
from tests.simulation import bits, parameters_of, replicated

SIGMA, CLIP, BATCH = 0.7, 3.0, 20.0
OPTIONS: dict[str, Any] = {
    "noise_multiplier": SIGMA,
    "max_grad_norm": CLIP,
    "expected_batch_size": BATCH,
}
#: Elements whose variance is measured: within 9 % at the error rate of the tests.
LARGE = [(100, 90), (1000,)]


def made_by(team: list[PrivateOptimizer], worker: int = 0) -> Tensor:
    return flat(gradients_of(team[worker]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("observer", ["messages", "sum"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_standard_deviation_of_updates(
    world_size: int, observer: str, dtype: torch.dtype
) -> None:
    """Of B Δ' / (σC): √W where each message is protected, 1 where their sum is."""
    start = [torch.zeros(shape, dtype=dtype) for shape in LARGE]
    team = private_team(world_size, start=start, observer=observer, **OPTIONS)
    step_with(team, empty_records(team))
    updates = -flat(parameters_of(team[0]))
    expected = world_size if observer == "messages" else 1
    assert_variance(BATCH / (SIGMA * CLIP) * updates, expected)


@pytest.mark.parametrize(
    ("make", "observer"),
    [
        *((make, "messages") for make in FAMILY.values()),
        *((make, "sum") for make in (power_sgd, adamw)),
    ],
)
def test_the_standard_deviation_before_compression(make: Make, observer: str) -> None:
    start = [torch.zeros(shape) for shape in LARGE]
    team = private_team(3, make, start, observer=observer, **OPTIONS)
    share = 1.0 if observer == "messages" else 1 / 3
    for noise in step_watched(team, empty_records(team))[1]:
        assert_variance(flat(noise) * BATCH / 3 / (SIGMA * CLIP), share)


@pytest.mark.parametrize("is_seeded", [False, True])
def test_noise_of_workers_and_steps_is_independent(is_seeded: bool) -> None:
    start = [torch.zeros(shape) for shape in LARGE]
    team = private_team(3, start=start, generators=seeded(1, 2, 3) if is_seeded else None)
    found = []
    for _ in range(2):
        step_with(team, empty_records(team))
        found += [made_by(team, worker) for worker in range(3)]
    for one, other in itertools.combinations(found, 2):
        correlation = float(one @ other / (one.norm() * other.norm()))
        # Its standard deviation is 1/√n; 6.2 of them are exceeded in less than one of 1e9 runs.
        assert math.erfc(6.2 / math.sqrt(2)) < ERROR_RATE
        assert abs(correlation) < 6.2 / math.sqrt(one.numel())


def test_noise_does_not_depend_on_the_seed_of_the_compressor() -> None:
    found = []
    for seed in (0, 0, 1):
        make: Make = lambda p, seed=seed: power_sgd(p, seed=seed)  # noqa: E731
        team = private_team(2, make, generators=seeded(5, 6))
        step_with(team, empty_records(team))
        found.append((made_by(team), bits(parameters_of(team[0]))))
    assert torch.equal(found[0][0], found[2][0])
    assert found[0][1] == found[1][1] != found[2][1]
    secret = private_team(2, power_sgd), private_team(2, power_sgd)  # of the same seed
    for team in secret:
        step_with(team, empty_records(team))
    assert not (made_by(secret[0]) == made_by(secret[1])).any()


@pytest.mark.parametrize("count", [1, 2, 3, 200_001])
def test_secret_values_are_normal(count: int) -> None:
    """By the distance from the distribution, which 20 % of another variance would show."""
    found = [secret_normals(count) for _ in range(2)]
    assert not bool((found[0] == found[1]).any())
    for drawn in found:
        assert drawn.shape == (count,)
        assert drawn.dtype == torch.float64
        assert stats.kstest(drawn.numpy(), "norm").pvalue > ERROR_RATE
    if count > 3:  # the values of a pair are independent, and so are their squares
        for one, other in (found[0][:-1].chunk(2), found[0][:-1].square().sub(1).chunk(2)):
            correlation = float(one @ other / (one.norm() * other.norm()))
            assert abs(correlation) < 6.2 / math.sqrt(one.numel())


def test_secret_values_end_where_their_bits_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of 2⁵³ uniform values is not 0, whose logarithm would be infinite."""
    for byte, value in ((b"\0", 2.0**-53), (b"\xff", 1.0)):
        monkeypatch.setattr(noise_module.ssl, "RAND_bytes", lambda size, byte=byte: byte * size)
        assert set(secret_uniforms(4).tolist()) == {value}
        assert float(secret_normals(4).abs().max()) < 8.6


@pytest.mark.parametrize(
    "shape", [(), (0, 3), (1,), (3, 1, 5), (noise_module._PIECE + 3,)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_secret_noise_of_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.full(shape, 5.0, dtype=dtype)
    NoiseSource(None).add_(tensor, 0.5)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert bool((tensor != 5.0).all())
    assert bool(((tensor - 5.0).abs() < 0.5 * 8.6).all())


def test_no_generator_of_torch_is_behind_secret_noise_and_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them can be computed from some of what they draw, or have a seed that can be tried."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a generator of torch")

    team = private_team(2)
    shard = TensorDataset(torch.arange(50.0))
    for name in ("randn", "rand", "randint", "normal", "Generator"):
        monkeypatch.setattr(torch, name, refuse)
    step_with(team, empty_records(team))
    assert bool((made_by(team) != 0).all())
    sampler = poisson_batches(shard, 0.5, 3).batch_sampler
    assert sampler is not None
    assert len(set(map(tuple, sampler))) == 3


def test_a_message_says_nothing_of_other_noise() -> None:
    """Of the top bits of uniform values behind normal ones, given the twin of torch's generator."""
    generator = torch.Generator().manual_seed(7)
    team = private_team(1, start=[torch.zeros(2048)], generators=[generator], **OPTIONS)
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    step_with(team, empty_records(team))
    sent = -parameters_of(team[0])[0].detach().double() * BATCH / (SIGMA * CLIP)
    one, other = sent.view(-1, 2, 8).unbind(1)
    angles = (torch.atan2(other, one) / (2 * math.pi)) % 1
    true = torch.rand(2048, generator=twin).double().view(-1, 2, 8)[:, 1]
    agreeing = float(((angles * 2**16).floor() == (true * 2**16).floor()).double().mean())
    assert agreeing > 0.9  # which is why a given generator protects less


# ---- empty batches ------------------------------------------------------------------------------


def traces(make: Make, counts: list[list[int]], **settings: Any) -> list[list[Traced]]:
    team = private_team(3, make, **settings)
    found = []
    for step, own in enumerate(counts):
        give(team, made_records(SHAPES, own, step))
        found.append(take_step(team)[0])
        first = replicated_values(team[0])
        assert all(replicated_values(other) == first for other in team[1:])
    return found


def replicated_values(optimizer: PrivateOptimizer) -> Any:
    if optimizer.averager is not None:
        return bits([parameters_of(optimizer), replicated(optimizer.averager)])
    return replicated(optimizer.original_optimizer)


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_empty_batches_take_part(make: Make) -> None:
    """The same collectives of the same bytes; workers stay bitwise equal."""
    full = traces(make, [[4, 4, 4]] * 3)
    assert traces(make, [[4, 0, 2], [0, 0, 0], [0, 9, 0]]) == full
    assert traces(make, [[0, 0, 0]] * 3) == full


def test_workers_without_records_send_noise() -> None:
    team = private_team(3, **OPTIONS)
    messages = step_with(team, made_records(SHAPES, [4, 0, 0]))
    for own in messages:
        # Behind the control words.
        assert bool((flat(own)[-flat(start_of(SHAPES)).numel() :] != 0).all())
    # Without a backward pass as well, before the first step and after zero_grad.
    for optimizer in team:
        optimizer.zero_grad()
    messages = take_step(team)[1]
    assert all(flat(own).norm() > 0.1 for own in messages)


def test_parameters_without_gradients_of_records_get_noise() -> None:
    team = private_team(2)
    records = made_records(SHAPES, [3, 3])
    give(team, records)
    for optimizer in team:
        parameters_of(optimizer)[1].grad_sample = None
    take_step(team)
    assert all(bool((gradients_of(optimizer)[1] != 0).all()) for optimizer in team)


# ---- compression --------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_powersgd_keeps_as_much_of_pure_noise_as_its_rank_says(rank: int, world_size: int) -> None:
    """r(n+m-r) of nm: what P̂ᵀM finds beside MQ is independent of it, so it is a chi-square."""
    n, m, steps = 24, 16, 40
    make: Make = lambda p: (  # noqa: E731
        PowerSGDOptimizer(p, lr=1.0, momentum_form="sgd", rank=rank, error_feedback=False), None
    )  # fmt: skip
    team = private_team(world_size, make, [torch.zeros(n, m, dtype=torch.float64)], **OPTIONS)
    total, parameter = 0.0, parameters_of(team[0])[0]
    for _ in range(steps):
        before = parameter.detach().clone()
        step_with(team, empty_records(team))
        total += float((before - parameter.detach()).square().sum())
    variance = world_size * (SIGMA * CLIP / BATCH) ** 2
    assert_chi_square(total / variance, steps * rank * (n + m - rank))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_with_error_feedback_all_noise_comes_out_in_the_end(world_size: int) -> None:
    make: Make = lambda p: power_sgd(p, lr=1.0, momentum=0.0, momentum_form="sgd")  # noqa: E731
    team = private_team(world_size, make)
    start = flat(parameters_of(team[0]))
    received = torch.zeros_like(start)
    for step in range(6):
        if step == 5:  # what was left is sent once compression ends
            for optimizer in team:
                optimizer.param_groups[0]["min_compression_rate"] = math.inf
        step_with(team, made_records(SHAPES, [step % 3] * world_size, step))
        received += sum(made_by(team, worker) for worker in range(world_size)) / world_size
        applied = start - flat(parameters_of(team[0]))
        lost = (applied - received).abs().max()
        # float64 rounding of a dozen sums, relative to noise of some 4 / 16 per element and step.
        assert lost < 1e-12 if step == 5 else lost > 0.01


def test_a_batch_without_noise_is_the_one_with_noise_less_the_noise() -> None:
    """Noise is added to the sum, once: what a known generator draws, in the order of parameters."""
    records = made_records(SHAPES, [5])
    noisy = private_team(1, generators=seeded(3), **OPTIONS)
    plain = private_team(1, **{**OPTIONS, "noise_multiplier": 0.0})
    for team in (noisy, plain):
        step_with(team, records)
    twin = seeded(3)[0]
    drawn = [torch.randn(s, generator=twin, dtype=torch.float64) for s in SHAPES]
    expected = made_by(plain) + SIGMA * CLIP / BATCH * flat(drawn)
    assert (made_by(noisy) - expected).abs().max() < 1e-14  # rounding of values of about 0.1
