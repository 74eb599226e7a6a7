"""Gradients of records as Opacus computes them, in each of its ways: the same sums."""

import math
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from efsgd import CollectiveError, PowerSGDOptimizer
from efsgd.privacy import PrivateOptimizer, poisson_batches
from tests.privacy.teams import (
    ERROR_RATE,
    SETTINGS,
    backward,
    batch,
    flat,
    gradients_of,
    hooked,
    model,
    seeded,
    take_step,
)
from tests.simulation import bits, parameters_of

CLIP = 0.5  # some records are clipped, and some are not
WAYS: dict[str, dict[str, Any]] = {
    "hooks": {},
    "functorch": {"force_functorch": True},
    "sum": {"loss_reduction": "sum"},
}


def private(of: nn.Module, **settings: Any) -> PrivateOptimizer:
    optimizer = PowerSGDOptimizer(of.parameters(), lr=0.1, rank=1)
    own = {**SETTINGS, "max_grad_norm": CLIP, "generator": seeded(1)[0], "module": of}
    return PrivateOptimizer(optimizer, **{**own, **settings})


def ghost(**options: Any) -> GradSampleModuleFastGradientClipping:
    return GradSampleModuleFastGradientClipping(model(), max_grad_norm=CLIP, **options)


def ghost_backward(module: nn.Module, optimizer: PrivateOptimizer, *data: Tensor) -> None:
    criterion: Any = nn.CrossEntropyLoss()
    backward(module, *data, DPLossFastGradientClipping(module, optimizer, criterion))


def expected_sum(count: int, plain: nn.Module | None = None) -> Tensor:
    """Of clipped gradients, by one backward pass for each record."""
    plain = model() if plain is None else plain
    total = torch.zeros_like(flat(list(plain.parameters())))
    for inputs, target in zip(*batch(count), strict=True):
        plain.zero_grad()
        nn.functional.cross_entropy(plain(inputs[None]), target[None]).backward()
        gradient = flat([p.grad for p in plain.parameters() if p.grad is not None])
        total += gradient * min(1.0, CLIP / (float(gradient.norm()) + 1e-6))
    return total


def made_sum(optimizer: PrivateOptimizer) -> Tensor:
    """What a step without noise has made, times the batch."""
    return flat(gradients_of(optimizer)) * SETTINGS["expected_batch_size"]


@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_records(way: str, count: int) -> None:
    module = hooked(**WAYS[way])
    optimizer = private(module, noise_multiplier=0)
    assert optimizer.loss_reduction == module.loss_reduction
    backward(module, *batch(count), nn.CrossEntropyLoss(reduction=module.loss_reduction))
    optimizer.step()
    assert (made_sum(optimizer) - expected_sum(count)).abs().max() < 1e-14  # float64 rounding


@pytest.mark.parametrize("count", [0, 1, 9])
def test_ghost_clipping(count: int) -> None:
    module = ghost()
    optimizer = private(module, noise_multiplier=0)
    ghost_backward(module, optimizer, *batch(count))
    optimizer.step()
    # Its norms come from products of products: some more rounding.
    assert (made_sum(optimizer) - expected_sum(count)).abs().max() < 1e-12


@pytest.mark.parametrize("is_ghost", [False, True], ids=["hooks", "ghost"])
def test_batches_in_parts(is_ghost: bool) -> None:
    """BatchMemoryManager splits batches; a step is taken at the end of each, empty ones too."""
    inputs, classes = batch(40)
    found = []
    for most in (None, 4):
        module = ghost() if is_ghost else hooked()
        optimizer = private(module)
        generator = torch.Generator().manual_seed(3)
        shard = TensorDataset(inputs, classes)
        batches: Any = poisson_batches(shard, 0.05, 12, generator=generator)
        if most is not None:
            manager = BatchMemoryManager(
                data_loader=batches, max_physical_batch_size=most, optimizer=optimizer
            )
            batches = manager.__enter__()
        sizes = []
        for own_inputs, own_classes in batches:
            optimizer.zero_grad()
            if is_ghost:
                ghost_backward(module, optimizer, own_inputs, own_classes)
            else:
                backward(module, own_inputs, own_classes)
            optimizer.step()
            sizes.append(len(own_inputs))
        assert optimizer.communication_stats()["steps"] == 12
        found.append((flat(parameters_of(optimizer)), sizes, optimizer.state_dict()["privacy"]))
    (whole, whole_sizes, whole_privacy), (parts, part_sizes, part_privacy) = found
    assert min(whole_sizes) == 0
    assert max(part_sizes) <= 4 < max(whole_sizes)
    assert sum(part_sizes) == sum(whole_sizes)
    assert (whole - parts).abs().max() < 1e-12  # sums in another order, twelve steps
    (released,), (part_released,) = whole_privacy["releases"], part_privacy["releases"]
    assert released[-1] == part_released[-1] == 12


class Tied(nn.Module):
    """Uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(inputs).tanh()).tanh())


@pytest.mark.parametrize("way", WAYS)
def test_parameters_that_are_used_twice(way: str) -> None:
    """That is one backward pass: what a record has in both uses is clipped together."""
    module = GradSampleModule(Tied().double(), **WAYS[way])
    optimizer = private(module, noise_multiplier=0)
    backward(module, *batch(5), nn.CrossEntropyLoss(reduction=module.loss_reduction))
    optimizer.step()
    expected = expected_sum(5, Tied().double())
    assert (made_sum(optimizer) - expected).abs().max() < 1e-14  # float64 rounding


def test_two_backward_passes_before_a_step_are_refused() -> None:
    module = hooked()
    optimizer = private(module)
    for _ in range(2):
        backward(module, *batch(3))
    with pytest.raises(ValueError, match=r"records from 2 backward passes.*BatchMemoryManager"):
        optimizer.step()
    backward(module, *batch(3))  # the batch is used up
    optimizer.step()


# ---- ghost clipping that does not clip ----------------------------------------------------------


def plain_backward(module: nn.Module, optimizer: PrivateOptimizer, *data: Tensor) -> None:
    backward(module, *data)


def cleared_and_again(module: nn.Module, optimizer: PrivateOptimizer, *data: Tensor) -> None:
    """As in a loop that goes on after the error: norms of the batch before are still there."""
    backward(module, *data)
    optimizer.zero_grad()
    backward(module, *data)


@pytest.mark.parametrize("way", [plain_backward, cleared_and_again])
def test_norms_alone_are_no_clipped_gradients(way: Any) -> None:
    module = ghost()
    optimizer = private(module)
    before = bits(parameters_of(optimizer))
    way(module, optimizer, *batch(5))
    with pytest.raises(ValueError, match=r"norms of gradients, but no clipped.*DPLossFastGradient"):
        optimizer.step()
    assert bits(parameters_of(optimizer)) == before
    assert optimizer.guarantees(1e-5)["messages"]["rdp"] == 0.0
    optimizer.zero_grad()
    ghost_backward(module, optimizer, *batch(5))
    optimizer.step()


def test_ghost_clipping_without_its_module_is_noticed() -> None:
    module = ghost()
    optimizer = private(module, module=None)
    ghost_backward(module, optimizer, *batch(5))
    with pytest.raises(ValueError, match=r"parameter 0 has norms of gradients.*Give module="):
        optimizer.step()


@pytest.mark.parametrize("of_model", [False, True])
def test_ghost_clipping_to_another_norm_between_steps(of_model: bool) -> None:
    """Noise of half the clipping norm would protect by half as much."""
    module = ghost()
    optimizer = private(module)
    ghost_backward(module, optimizer, *batch(5))
    (module if of_model else optimizer).max_grad_norm = CLIP / 2
    with pytest.raises(ValueError, match=r"The model clips to .*Give both the same"):
        optimizer.step()


@pytest.mark.parametrize("is_ghost", [False, True], ids=["hooks", "ghost"])
def test_a_record_of_enormous_gradients(is_ghost: bool) -> None:
    """It moves the sum by C at most, as by hand."""
    found = []
    for scale in (0.0, 1e18):
        module = (ghost() if is_ghost else hooked()).float()
        optimizer = private(module, noise_multiplier=0)
        inputs, classes = batch(6)
        inputs[0] *= scale
        if is_ghost:
            ghost_backward(module, optimizer, inputs.float(), classes)
        else:
            backward(module, inputs.float(), classes)
        optimizer.step()
        found.append(made_sum(optimizer))
    # The record is there in both, and adds up to C in each; rounding of float32.
    assert float((found[1] - found[0]).norm()) <= 2 * CLIP * (1 + 1e-5)
    assert math.isfinite(float(found[1].sum()))


# ---- sampling -----------------------------------------------------------------------------------


def test_poisson_batches() -> None:
    """Numbers of steps, shapes of empty batches, and who takes part how often."""
    count, rate, steps = 50, 0.03, 400
    shard = TensorDataset(torch.arange(count), torch.zeros(count, 3, 2))
    batches = poisson_batches(shard, rate, steps, num_workers=0)
    seen, sizes, number = torch.zeros(count), [], 0
    for numbers, rows in batches:
        number += 1
        sizes.append(len(numbers))
        assert rows.shape == (len(numbers), 3, 2)
        assert numbers.dtype == torch.int64
        assert len(set(numbers.tolist())) == len(numbers)
        seen[numbers] += 1
    assert number == len(batches) == steps
    assert min(sizes) == 0  # with a probability of 1 - 0.78^400
    binomial = stats.binom(count * steps, rate)
    assert binomial.ppf(ERROR_RATE / 2) <= sum(sizes) <= binomial.isf(ERROR_RATE / 2)
    each = stats.binom(steps, rate)  # for each record, and all of them
    assert bool((seen >= each.ppf(ERROR_RATE / 2 / count)).all())
    assert bool((seen <= each.isf(ERROR_RATE / 2 / count)).all())
    # Batches are independent: sizes vary as those of a binomial distribution.
    spread = sum((size - count * rate) ** 2 for size in sizes) / (count * rate * (1 - rate))
    assert 0.6 * steps < spread < 1.5 * steps  # standard deviation 0.07 steps


def test_sampling_is_secret_or_given() -> None:
    shard = TensorDataset(torch.arange(64))

    def drawn(**options: Any) -> list[list[int]]:
        return [each.tolist() for (each,) in poisson_batches(shard, 0.5, 4, **options)]

    assert drawn() != drawn()
    assert drawn(generator=seeded(1)[0]) == drawn(generator=seeded(1)[0])


def test_data_that_is_no_tuple() -> None:
    shard: Any = [{"x": torch.ones(3), "y": 1.0} for _ in range(5)]
    for each in poisson_batches(shard, 1e-9, 3):
        assert each["x"].shape == (0, 3)
        assert each["y"].shape == (0,)

    def stacked(records: Any) -> Tensor:
        return torch.stack([own["x"] for own in records])

    assert next(iter(poisson_batches(shard, 1.0, 1, collate_fn=stacked))).shape == (5, 3)


def test_what_a_skipped_step_finds_is_told_to_the_others() -> None:
    """The worker whose part of a batch cannot be used raises at the end of the batch, as all do."""
    modules = [hooked() for _ in range(2)]
    team = [private(m, generator=g) for m, g in zip(modules, seeded(1, 2), strict=True)]
    for module in modules:
        backward(module, *batch(3))
    take_step(team)
    for module, optimizer in zip(modules, team, strict=True):
        optimizer.zero_grad()
        backward(module, *batch(3))
    team[1].signal_skip_step()
    parameters_of(team[1])[0].grad_sample = None
    team[1].step()
    before = bits([parameters_of(o) for o in team])
    with pytest.raises(CollectiveError, match="worker 1") as caught:
        take_step(team)
    assert "none of single records" in caught.value.__notes__[0]
    assert bits([parameters_of(o) for o in team]) == before
    for module, optimizer in zip(modules, team, strict=True):
        optimizer.zero_grad()
        backward(module, *batch(3))
    take_step(team)
