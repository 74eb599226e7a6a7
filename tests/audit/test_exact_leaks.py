"""What needs no search: the exact leaks of single messages and of many, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    Identity,
    PowerSGD,
    PowerSGDOptimizer,
    RandomK,
    SignNorm,
    TopK,
)
from efsgd.audit import (
    Message,
    Recording,
    combine,
    label_of,
    linear_inputs,
    observe,
    singular_inputs,
)
from efsgd.testing import step_together

INPUTS, HIDDEN, CLASSES = 64, 32, 10
# Of the parameters of `mlp`.
FIRST_WEIGHT, FIRST_BIAS, LAST_WEIGHT, LAST_BIAS = range(4)
EPS = torch.finfo(torch.float64).eps


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(INPUTS, HIDDEN), nn.Sigmoid(), nn.Linear(HIDDEN, CLASSES)]
    return nn.Sequential(*layers).double()


def images(count: int, seed: int = 0) -> Tensor:
    """Positive, as pixels are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, INPUTS, dtype=torch.float64, generator=generator)


def train(
    compressor: Any, x: Tensor, labels: Tensor, *, steps: int = 1, **options: Any
) -> tuple[Recording, list[Tensor]]:
    """What one worker sends in steps that change nothing, and its gradients."""
    model = mlp()
    own = {"lr": 0.0, "momentum_form": "sgd", "compressor": compressor, **options}
    optimizer = ErrorFeedbackSGD(model.parameters(), **own)
    cross_entropy(model(x), labels).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with observe(optimizer) as recording:
        for _ in range(steps):
            optimizer.step()
    return recording, gradients


def mean_of(recording: Recording) -> Tensor:
    """What the messages of all steps say of the first layer on average."""
    return combine(recording.messages()).parameter(FIRST_WEIGHT).decompressed


def message_of(compressor: Any, x: Tensor, labels: Tensor) -> Message:
    (message,) = train(compressor, x, labels)[0]
    return message


def test_of_top_k_every_column_with_an_entry_gives_its_input_away() -> None:
    x = images(1)
    message = message_of(TopK(density=0.5), x, torch.tensor([3]))
    weight, bias = (message.parameters[i].decompressed for i in (FIRST_WEIGHT, FIRST_BIAS))
    is_known = ((weight != 0) & (bias != 0)[:, None]).any(0)
    assert is_known.sum() > 0 and not (weight != 0).all()
    found = linear_inputs(message, FIRST_WEIGHT, FIRST_BIAS)
    expected = torch.where(is_known, x[0], 0.0)
    # Quotients of sums over at most 32 rows.
    torch.testing.assert_close(found, expected, rtol=32 * EPS, atol=0)


@pytest.mark.parametrize(
    "compressor", [PowerSGD(rank=1), PowerSGD(rank=4), PowerSGD(rank=1, alternating=True)]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_input_of_one_record_is_a_row_over_the_bias(compressor: Any, seed: int) -> None:
    """(P̂Qᵀ)_i / bias gradient_i = x, whatever the rank."""
    x = images(1, seed)
    message = message_of(compressor, x, torch.tensor([3]))
    found = linear_inputs(message, FIRST_WEIGHT, FIRST_BIAS)
    if compressor.alternating:  # M Q̂ Q̂ᵀ, of a Q̂ that knows nothing of M yet
        assert float((found - x[0]).norm()) > 0.5 * float(x.norm())
        return
    # A product of INPUTS sums, and a quotient.
    assert float((found - x[0]).abs().max()) <= 64 * EPS


@pytest.mark.parametrize("seed", range(3))
def test_factors_alone_give_the_direction_of_the_input(seed: int) -> None:
    """Q_w ∝ x: of the vectors nothing need be seen."""
    x = images(1, seed)
    message = message_of(PowerSGD(rank=1), x, torch.tensor([3]))
    _, Q = message.parameters[FIRST_WEIGHT].values
    assert Q.shape == (INPUTS, 1)
    assert abs(abs(float(cosine_similarity(Q[:, 0], x[0], dim=0))) - 1) <= 8 * EPS
    found = linear_inputs(message, FIRST_WEIGHT)
    torch.testing.assert_close(found, x[0] / x.norm(), rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("compressor", [PowerSGD(rank=1), RandomK(rank=1), Identity()], ids=repr)
@pytest.mark.parametrize("label", range(CLASSES))
def test_the_label_is_the_least_gradient_of_the_last_bias(compressor: Any, label: int) -> None:
    message = message_of(compressor, images(1, label), torch.tensor([label]))
    assert label_of(message, LAST_BIAS).tolist() == [label]


def test_labels_of_a_batch_are_there() -> None:
    for seed in range(20):
        labels = torch.randint(CLASSES, (4,), generator=torch.Generator().manual_seed(seed))
        message = message_of(PowerSGD(rank=1), images(4, seed), labels)
        found = label_of(message, LAST_BIAS, batch=4)
        assert 1 <= len(found) <= 4
        assert set(found.tolist()) <= set(labels.tolist())
        gradient = message.parameters[LAST_BIAS].decompressed
        assert found[0] == gradient.argmin()


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_a_rank_of_at_least_the_batch_sends_the_gradient(batch: int, rank: int) -> None:
    """The gradient of a linear layer has rank B at most: from r = B on it is sent as it is."""
    x, labels = images(batch), torch.arange(batch)
    recording, gradients = train(PowerSGD(rank=rank, min_compression_rate=0.0), x, labels)
    (message,) = recording
    G, sent = gradients[FIRST_WEIGHT], message.parameters[FIRST_WEIGHT]
    assert sent.kind == "low rank"
    error = float((sent.decompressed - G).norm() / G.norm())
    assert error <= 1e-13 if rank >= batch else error > 1e-3


@pytest.mark.parametrize(
    "compressor", [PowerSGD(rank=1), TopK(density=0.05), LQSGD(rank=1, bits=6)]
)
def test_error_feedback_gives_later_what_it_hid(compressor: Any) -> None:
    """Of a gradient that stays the same: ‖mean message - g‖ = ‖e_T‖ / T, which falls like 1 / T."""
    x, labels = images(8), torch.arange(8)
    found = {}
    for steps in (1, 8, 64):
        model = mlp()
        own: dict[str, Any] = {"lr": 0.0, "momentum_form": "sgd", "compressor": compressor}
        optimizer = ErrorFeedbackSGD(model.parameters(), **own)
        cross_entropy(model(x), labels).backward()
        with observe(optimizer) as recording:
            for _ in range(steps):
                optimizer.step()
        mean, weight = mean_of(recording), model[0].weight
        G, error = weight.grad, optimizer.state[weight]["error"]
        assert G is not None
        # Sums of so many numbers, the largest of which is the error memory.
        rounding = 4 * steps * EPS * float(error.norm() + G.norm())
        assert abs(float((mean - G).norm()) - float(error.norm()) / steps) <= rounding
        torch.testing.assert_close(G - mean, error / steps, rtol=0, atol=rounding)
        found[steps] = float((mean - G).norm() / G.norm())
    assert found[64] < 0.3 * found[8] < 0.3 * found[1]


def test_without_error_feedback_it_stays_hidden() -> None:
    x, labels, steps = images(8), torch.arange(8), 128
    recording, gradients = train(PowerSGD(rank=1), x, labels, steps=steps, error_feedback=False)
    G, mean = gradients[FIRST_WEIGHT], mean_of(recording)
    singular = torch.linalg.svdvals(G)
    floor = float(singular[1:].norm() / G.norm())  # of the best matrix of rank 1
    assert floor > 0.4
    # Power iteration has come to the leading singular vector, and learns nothing from then on.
    last = recording.messages(step=steps - 1)[0].parameters[FIRST_WEIGHT].decompressed
    assert float((last - G).norm() / G.norm()) == pytest.approx(floor, rel=1e-6)
    assert float((mean - G).norm() / G.norm()) == pytest.approx(floor, rel=0.01)
    with_feedback, _ = train(PowerSGD(rank=1), x, labels, steps=steps)
    mean = mean_of(with_feedback)
    assert float((mean - G).norm() / G.norm()) < 0.1 * floor


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_singular_vectors_survive_noise(noise: float) -> None:
    """Where the quotient is lost: noise on each element, as of differential privacy."""
    x = images(1)
    model = mlp()
    cross_entropy(model(x), torch.tensor([3])).backward()
    torch.manual_seed(5)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.add_(torch.randn_like(parameter), alpha=noise)
    optimizer = ErrorFeedbackSGD(
        model.parameters(), lr=0.0, momentum_form="sgd", compressor=Identity()
    )
    with observe(optimizer) as recording:
        optimizer.step()
    (message,) = recording
    (found,) = singular_inputs(message, FIRST_WEIGHT)
    assert float(found.norm()) == pytest.approx(1)
    assert float(found @ x[0] / x.norm()) > (0.95 if noise else 1 - 1e-12)
    two = singular_inputs(message, FIRST_WEIGHT, count=2)
    torch.testing.assert_close(two @ two.mT, torch.eye(2, dtype=torch.float64))
    assert torch.equal(two[0], found)


def test_averages_leak_the_same_of_a_single_worker_that_has_a_record() -> None:
    """Only sums are seen, but of W workers W - 1 have nothing to say."""
    x, workers = images(1), [mlp() for _ in range(2)]
    own: dict[str, Any] = {"lr": 0.0, "momentum_form": "sgd", "rank": 1}
    optimizers = [PowerSGDOptimizer(model.parameters(), **own) for model in workers]
    cross_entropy(workers[0](x), torch.tensor([3])).backward()
    with observe(optimizers) as recording:
        step_together(optimizers)
    (message,) = recording.averages()
    found = linear_inputs(message, FIRST_WEIGHT, FIRST_BIAS)
    assert float((found - x[0]).abs().max()) <= 64 * EPS
    assert label_of(message, LAST_BIAS).tolist() == [3]


@pytest.mark.parametrize("compressor", [PowerSGD(rank=1), PowerSGD(rank=2)])
def test_of_workers_together_each_gives_its_own_record_away(compressor: Any) -> None:
    """P̂ is that of the mean and holds no worker's gradient: P̂P̂ᵀδ xᵀ is sent, and δ in clear."""
    records, models = [images(1, seed) for seed in range(3)], [mlp() for _ in range(3)]
    own: dict[str, Any] = {"lr": 0.0, "momentum_form": "sgd", "compressor": compressor}
    optimizers = [ErrorFeedbackSGD(model.parameters(), **own) for model in models]
    for label, (model, x) in enumerate(zip(models, records, strict=True)):
        cross_entropy(model(x), torch.tensor([label])).backward()
    with observe(optimizers) as recording:
        step_together(optimizers)
    for message, model, x in zip(recording, models, records, strict=True):
        sent, weight = message.parameter(FIRST_WEIGHT).decompressed, model[0].weight
        assert weight.grad is not None
        assert float((sent - weight.grad).norm()) > 1e-3 * float(weight.grad.norm())
        found = linear_inputs(message, FIRST_WEIGHT, FIRST_BIAS)
        # P̂ᵀδ is small where P̂ is of others: it is divided by.
        torch.testing.assert_close(found, x[0], rtol=0, atol=1e4 * EPS)


# ---- what cannot be asked -----------------------------------------------------------------------


def test_questions_that_make_no_sense_are_refused() -> None:
    message = message_of(SignNorm(), images(1), torch.tensor([3]))
    with pytest.raises(KeyError, match=r"parameter 9.*0 \(parameter 0\)"):
        linear_inputs(message, 9)
    with pytest.raises(ValueError, match=r"weight \[out, in\]"):
        singular_inputs(message, FIRST_BIAS)
    with pytest.raises(ValueError, match=r"Must be the bias \[32\]"):
        linear_inputs(message, FIRST_WEIGHT, LAST_BIAS)
    with pytest.raises(ValueError, match="count"):
        singular_inputs(message, FIRST_WEIGHT, count=33)
    with pytest.raises(ValueError, match="batch"):
        label_of(message, LAST_BIAS, batch=0)
    nothing = message_of(Identity(), torch.zeros(0, INPUTS, dtype=torch.float64), torch.arange(0))
    with pytest.raises(ValueError, match="gradient of the bias is zero"):
        linear_inputs(nothing, FIRST_WEIGHT, FIRST_BIAS)
    assert label_of(nothing, LAST_BIAS).tolist() == []
