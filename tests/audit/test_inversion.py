"""Where a message says everything, the attacks find everything."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efsgd.audit import (
    DLG,
    INVERTING_GRADIENTS,
    Attack,
    Message,
    best_match,
    invert,
    label_recovery,
    psnr,
)
from tests.audit.messages import clear, entries, gradients_of, low_rank, message, mlp, signs

#: As near as L-BFGS comes in float64 without a term that keeps it away.
EXACT = replace(DLG, adaptive=True, iterations=150)
FOUND = 60.0  # decibels


@pytest.fixture
def model() -> nn.Module:
    return mlp()


def sample(count: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.rand(count, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.arange(count) % 4


def everything(model: nn.Module, inputs: Tensor, labels: Tensor) -> Message:
    gradients = gradients_of(model, inputs, labels)
    return message([clear(index, each) for index, each in enumerate(gradients)])


def through_rank(rank: int, model: nn.Module, inputs: Tensor, labels: Tensor) -> Message:
    generator = torch.Generator().manual_seed(7)
    return message(
        [
            low_rank(i, g, torch.randn(g[0].numel(), rank, generator=generator, dtype=g.dtype))
            for i, g in enumerate(gradients_of(model, inputs, labels))
        ]
    )


@pytest.mark.parametrize("adaptive", [False, True], ids=["naive", "adaptive"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_clear_gradient_gives_its_batch_away(
    model: nn.Module, count: int, adaptive: bool
) -> None:
    inputs, labels = sample(count)
    attack = replace(EXACT, adaptive=adaptive)
    found = invert(everything(model, inputs, labels), model, inputs.shape, labels, attack=attack)
    matched = found.inputs[best_match(inputs, found.inputs)]
    assert psnr(inputs, matched).min() > FOUND
    assert found.distance < 1e-8 and found.is_complete


def test_the_other_attack_finds_it_as_well(model: nn.Module) -> None:
    inputs, labels = sample()
    attack = replace(INVERTING_GRADIENTS, iterations=160, restarts=1)
    found = invert(everything(model, inputs, labels), model, inputs.shape, labels, attack=attack)
    # Its steps are as large as the learning rate, which ends at 1e-4.
    assert psnr(inputs, found.inputs) > 40
    assert found.iterations == 160


def test_an_adaptive_attacker_finds_what_the_naive_one_does_not(model: nn.Module) -> None:
    inputs, labels = sample()
    # Six of 48 entries of the first layer; the whole of everything else.
    gradients = gradients_of(model, inputs, labels)
    seen = [entries(0, gradients[0], 6), *(clear(i, g) for i, g in enumerate(gradients) if i)]
    naive, adaptive = (
        invert(
            message(seen), model, inputs.shape, labels, attack=replace(EXACT, adaptive=is_adaptive)
        )
        for is_adaptive in (False, True)
    )
    assert psnr(inputs, naive.inputs) < 20 < FOUND < psnr(inputs, adaptive.inputs)


def test_rank_one_gives_a_single_sample_away_through_any_layer() -> None:
    torch.manual_seed(0)
    convolution = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(27, 4)
    ).double()
    inputs, labels = torch.rand(1, 1, 5, 5, dtype=torch.float64), torch.tensor([2])
    seen = through_rank(1, convolution, inputs, labels)
    found = invert(seen, convolution, inputs.shape, labels, attack=replace(EXACT, restarts=1))
    assert psnr(inputs, found.inputs) > 40  # and higher with more iterations


def agreement(gradients: list[Tensor], others: list[Tensor]) -> float:
    """The part of all entries with the same sign."""
    pairs = [torch.cat([each.flatten() for each in found]) for found in (gradients, others)]
    return (pairs[0].sign() == pairs[1].sign()).double().mean().item()


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_signs_are_compared_by_what_has_a_derivative(model: nn.Module, distance: str) -> None:
    inputs, labels = sample(
        4
    )  # of a single one with positive entries hardly any sign depends on it
    gradients = gradients_of(model, inputs, labels)
    seen = message([signs(index, each) for index, each in enumerate(gradients)])
    attack = replace(EXACT, distance=distance, restarts=1, iterations=50)
    found = invert(seen, model, inputs.shape, labels, attack=attack)
    start = torch.full_like(inputs, 0.5)
    before = agreement(gradients_of(model, start, labels), gradients)
    after = agreement(gradients_of(model, found.inputs, labels), gradients)
    assert before < 0.98 < after


def test_labels_are_inferred_from_biases(model: nn.Module) -> None:
    for label in range(4):
        inputs, labels = sample()[0], torch.tensor([label])
        found = invert(everything(model, inputs, labels), model, inputs.shape, attack=EXACT)
        assert found.labels.tolist() == [label] and psnr(inputs, found.inputs) > FOUND
    inputs = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for labels in torch.tensor([[0, 1, 2, 3], [0, 0, 3, 3], [2, 2, 2, 1]]):
        found = invert(
            everything(model, inputs, labels), model, inputs.shape,
            attack=replace(EXACT, iterations=1, restarts=1),
        )  # fmt: skip
        assert label_recovery(labels, found.labels) == 1.0


def test_without_biases_labels_are_found_along_with_the_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False)).double()
    inputs, labels = sample()[0], torch.tensor([2])
    attack = replace(EXACT, restarts=1)
    found = invert(everything(model, inputs, labels), model, inputs.shape, attack=attack)
    assert found.labels.tolist() == [2] and psnr(inputs, found.inputs) > FOUND


def test_the_same_seed_finds_the_same_and_nothing_of_the_model_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()
    inputs, labels = sample(3)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    seen = message([clear(i, g) for i, g in enumerate(gradients_of(model, inputs, labels))])
    model.load_state_dict(before)
    attack = replace(EXACT, iterations=10)
    first, second, other = (
        invert(seen, model, inputs.shape, labels, attack=attack, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.inputs, second.inputs) and first.distances == second.distances
    assert not torch.equal(first.inputs, other.inputs)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())


def test_the_best_of_the_starts_is_taken(model: nn.Module) -> None:
    inputs, labels = sample(2)
    attack = Attack(iterations=3, restarts=4)
    found = invert(everything(model, inputs, labels), model, inputs.shape, labels, attack=attack)
    assert len(found.distances) == 4 and found.distance == min(found.distances)
    assert len(set(found.distances)) == 4 and found.iterations == 12


def test_a_time_limit_ends_the_search_with_what_there_is(model: nn.Module) -> None:
    inputs, labels = sample()
    attack = Attack(iterations=10**6, search="adam", lr=0.01)
    found = invert(
        everything(model, inputs, labels), model, inputs.shape, labels, attack=attack, seconds=0.05
    )
    assert not found.is_complete and found.inputs.shape == inputs.shape
    assert found.iterations < 10**6


def test_parameters_may_be_in_the_order_of_another_optimizer(model: nn.Module) -> None:
    inputs, labels = sample()
    parameters = list(model.parameters())[::-1]
    loss = cross_entropy(model(inputs), labels)
    gradients = torch.autograd.grad(loss, parameters)
    seen = message([clear(index, each) for index, each in enumerate(gradients)])
    with pytest.raises(ValueError, match="give them as `parameters`"):
        invert(seen, model, inputs.shape, labels, attack=EXACT)
    found = invert(seen, model, inputs.shape, labels, attack=EXACT, parameters=parameters)
    assert psnr(inputs, found.inputs) > FOUND


def test_what_cannot_be_is_refused(model: nn.Module) -> None:
    inputs, labels = sample()
    seen = everything(model, inputs, labels)
    with pytest.raises(ValueError, match="a label for each sample"):
        invert(seen, model, (2, 6), labels)
    with pytest.raises(ValueError, match="not all of them are the model's"):
        invert(seen, model, inputs.shape, labels, parameters=[torch.zeros(1)])
    with pytest.raises(ValueError, match="Invalid search"):
        Attack(search="sgd")  # type: ignore[arg-type]
