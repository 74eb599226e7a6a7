"""What torch's own suite asks of SGD, of every configuration of ours: B, C, D, F and G.

It asks less than equality with SGD, which holds where nothing is compressed: losses fall, ways to
say or to compute the same thing agree, states can be saved. So it holds for every compressor and
both momentum forms. Inputs come from torch; those with `differentiable=True` are left out where
something is compressed, or steps write to leaves.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from efsgd import ErrorFeedbackSGD, GradientAverager, Identity, PowerSGD, PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import IMPLEMENTATIONS, ROUNDING, UNCOMPRESSED, random_tensor
from tests.simulation import bits, copied, difference, parameters_of, snapshot

pytest.importorskip("expecttest", reason="torch's test material needs it: pip install .[test]")
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    optim_db,
)

INFO = next(info for info in optim_db if info.optim_cls is SGD)


class AveragedSGD(SGD):
    """torch's own, on gradients that were compressed and averaged."""

    def __init__(self, params: Any, *args: Any, **options: Any) -> None:
        super().__init__(params, *args, **options)
        compressor = PowerSGD(rank=1, min_compression_rate=0.0)
        self.averager = GradientAverager(self.param_groups, compressor=compressor)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Computes gradients, averages them, and applies them."""
        loss = None if closure is None else closure()
        self.averager.average_()
        super().step()
        return loss


#: Arguments of ours: what is compressed, and how far.
RANKS: dict[str, dict[str, Any]] = {
    "off": {"min_compression_rate": UNCOMPRESSED["min_compression_rate"]},
    "rank 1": {"min_compression_rate": 0.0, "rank": 1},
    "rank 2": {"min_compression_rate": 0.0, "rank": 2},
}
FORMS = [
    ("sgd", "off"),
    ("sgd", "rank 1"),
    ("sgd", "rank 2"),
    ("paper", "off"),
    ("paper", "rank 1"),
]
CONFIGURATIONS: dict[str, Callable[..., Optimizer]] = {
    **{
        f"{form}, {name}": partial(PowerSGDOptimizer, momentum_form=form, **RANKS[name])
        for form, name in FORMS
    },
    "identity": partial(ErrorFeedbackSGD, momentum_form="sgd", compressor=Identity()),
    "averager": AveragedSGD,
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
#: The averager is saved and copied beside SGD: tests/optimizers/test_averager.py.
every_optimizer = pytest.mark.parametrize("name", [n for n in CONFIGURATIONS if n != "averager"])


FLAGS: dict[str, dict[str, Any]] = {**IMPLEMENTATIONS, "differentiable": {"differentiable": True}}


def inputs(name: str, *implementations: str) -> Iterator[dict[str, Any]]:
    """SGD's arguments in torch's suite, as far as the configuration knows them."""
    for implementation in implementations:
        for each in INFO.optim_inputs_func(device="cpu"):
            given = {**each.kwargs, **FLAGS[implementation]}
            is_sgd_only = any(given.get(own) for own in ("dampening", "nesterov", "fused"))
            is_unknown = implementation == "differentiable" and not name.endswith("off")
            if not is_unknown and not (is_sgd_only and name.startswith("paper")):
                yield given


def start(*, contiguous: bool = True) -> list[Tensor]:
    """A matrix and a vector."""
    own = [random_tensor((*shape, 2), torch.float32, 5) for shape in ((10, 5), (10,))]
    views = [each[..., 0] for each in own]
    return [v.contiguous().requires_grad_() if contiguous else v.requires_grad_() for v in views]


def loss_of(optimizer: Optimizer) -> Tensor:
    """A convex function of all parameters, with its gradients."""
    optimizer.zero_grad()
    weight, bias = parameters_of(optimizer)
    loss = (weight @ random_tensor((5,), torch.float32, 6) + bias).square().sum()
    loss.backward()
    return loss.detach()


def trained(optimizer: Optimizer, steps: int) -> Optimizer:
    for _ in range(steps):
        loss_of(optimizer)
        optimizer.step()
    return optimizer


def assert_alike(first: Optimizer, second: Optimizer, context: object) -> None:
    for a, b in zip(parameters_of(first), parameters_of(second), strict=True):
        assert difference(a, b) < ROUNDING[torch.float32], context


@every_configuration
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_losses_fall(name: str, contiguous: bool) -> None:
    """B3, B9: with all inputs; where gradients are climbed, they rise."""
    implementations = ("for-loop", "foreach", "fused") if contiguous else ("for-loop",)
    for given in inputs(name, *implementations):
        optimizer = CONFIGURATIONS[name](start(contiguous=contiguous), **given)
        before = loss_of(optimizer)
        trained(optimizer, 3)
        assert (loss_of(optimizer) > before) == given.get("maximize", False), given


@every_configuration
def test_losses_fall_with_schedulers(name: str) -> None:
    """F2: of a group with a learning rate of its own."""
    for makers in INFO.scheduler_inputs:
        weight, bias = start()
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
        optimizer = CONFIGURATIONS[name](groups, lr=1e-3)
        schedulers = [make(optimizer) for make in makers]
        before = loss_of(optimizer)
        for _ in range(5):
            loss = optimizer.step(lambda optimizer=optimizer: loss_of(optimizer))
            for scheduler in schedulers:
                scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert loss_of(optimizer) < before


@every_configuration
def test_the_learning_rate_may_be_a_tensor(name: str) -> None:
    """B5: and is the same number."""
    for given in inputs(name, "for-loop"):
        ends = [
            trained(CONFIGURATIONS[name](start(), **{**given, "lr": lr}), 3)
            for lr in (1e-3, torch.tensor(1e-3))
        ]
        assert_alike(*ends, given)


@every_configuration
def test_implementations_agree(name: str) -> None:
    """G1, G2: foreach and fused with the for-loop."""
    loops: dict[str, Optimizer] = {}
    for given in inputs(name, "for-loop", "foreach", "fused"):
        optimizer = trained(CONFIGURATIONS[name](start(), **given), 2)
        own = {key: value for key, value in given.items() if key not in ("foreach", "fused")}
        expected = loops.setdefault(repr(own), optimizer)
        assert_alike(optimizer, expected, given)
        for p, q in zip(parameters_of(optimizer), parameters_of(expected), strict=True):
            assert optimizer.state[p].keys() == expected.state[q].keys()
    assert len(loops) < 10


@every_configuration
def test_complex_parameters_are_pairs_of_real_ones(name: str) -> None:
    """B10: of each element."""
    value = random_tensor((5, 5), torch.complex64, 7)
    for given in inputs(name, "for-loop"):
        pair = [copied([value]), copied([torch.view_as_real(value)])]
        ours, real = (CONFIGURATIONS[name](own, **copy.deepcopy(given)) for own in pair)
        for step in range(3):
            gradient = random_tensor((5, 5), torch.complex64, 8, step)
            parameters_of(ours)[0].grad = gradient
            parameters_of(real)[0].grad = torch.view_as_real(gradient).clone()
            ours.step()
            real.step()
            found = torch.view_as_real(parameters_of(ours)[0])
            assert difference(found, parameters_of(real)[0]) < ROUNDING[torch.float32], given


@every_configuration
def test_nothing_moves_without_gradients(name: str) -> None:
    """B2: nor where they are zero, and weights do not decay."""
    for given in inputs(name, "for-loop", "foreach", "fused", "differentiable"):
        optimizer = CONFIGURATIONS[name](start(), **given)
        optimizer.step()
        assert bits(parameters_of(optimizer)) == bits(start())
        if not (given.get("weight_decay") or given.get("differentiable")):
            for parameter in parameters_of(optimizer):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            assert bits(parameters_of(optimizer)) == bits(start())


@every_configuration
def test_groups_have_their_own(name: str) -> None:
    """A6: a learning rate of zero rests, and a decay shrinks what has no gradient to speak of."""
    weight, bias = start()
    groups = [{"params": [weight], "lr": 0.0}, {"params": [bias], "weight_decay": 0.5}]
    optimizer = CONFIGURATIONS[name](groups, lr=0.1)
    for _ in range(3):
        weight.grad, bias.grad = torch.ones_like(weight), torch.zeros_like(bias)
        optimizer.step()
    assert bits(weight) == bits(start()[0])
    assert float(bias.detach().norm()) < 0.9 * float(start()[1].detach().norm())


@every_optimizer
def test_states_are_saved_and_loaded(name: str) -> None:
    """D2, D7: what loads one goes on alike; it stays as it is, and older ones do as well."""
    for given in inputs(name, "for-loop"):
        optimizer = trained(CONFIGURATIONS[name](start(), **given), 3)
        again = CONFIGURATIONS[name](copied(parameters_of(optimizer)), **given)
        saved = copy.deepcopy(optimizer.state_dict())
        again.load_state_dict(saved)
        assert bits(saved["state"]) == bits(optimizer.state_dict()["state"]), given
        for each in (optimizer, again):
            trained(each, 3)
        assert bits(snapshot([again])) == bits(snapshot([optimizer])), given
        older = copy.deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            for key in ("maximize", "foreach", "differentiable", "fused"):
                del group[key]
        again.load_state_dict(older)
        trained(again, 1)


@every_optimizer
def test_copies_and_what_is_printed(name: str) -> None:
    """D9, E3: a deep copy has all public attributes, and goes on alike."""
    for given in inputs(name, "for-loop", "differentiable"):
        optimizer = CONFIGURATIONS[name](start(), **given)
        assert "Parameter Group 0" in repr(optimizer)
        if not given.get("differentiable"):
            trained(optimizer, 2)
        again = copy.deepcopy(optimizer)
        names = ({key for key in vars(each) if key[0] != "_"} for each in (optimizer, again))
        assert len({frozenset(own) for own in names}) == 1
        if not given.get("differentiable"):
            assert bits(parameters_of(trained(again, 2))) == bits(
                parameters_of(trained(optimizer, 2))
            )


@every_configuration
def test_errors(name: str) -> None:
    """A2, A3: all that torch expects of SGD."""
    for case in INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        params = start() if given.params is None else given.params
        assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        warns = issubclass(case.error_type, Warning)
        with (pytest.warns if warns else pytest.raises)(case.error_type, match=case.error_regex):
            CONFIGURATIONS[name](params, **given.kwargs)
