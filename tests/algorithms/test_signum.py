"""Signum: what it computes, and what it sends."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd.algorithms import majority_vote
from efsgd.compressors.majority_vote import MajorityVote
from efsgd.optimizers.signum import Signum
from efsgd.wire.bits import majority
from examples.models import CifarResNet18, LSTMLanguageModel
from tests.simulation import bits, parameters_of, replicated, step_with, train
from tests.strategies import Gradients, Scenario, examples, gaussian, scenarios

# A multiply-add that rounds once differs from two numerics by a unit in the last place of float64,
# 1e-16 of numbers of about ten; there are a few of them in a row.
ROUNDING = 1e-13


class Reference:
    """The definition, in float64, one parameter and one worker at a time."""

    def __init__(self, parameters: Sequence[Tensor], world_size: int, **options: Any) -> None:
        self.x = [p.detach().double() for p in parameters]
        self.m: list[list[Tensor | None]] = [[None] * world_size for _ in self.x]
        self.options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0, "maximize": False} | options

    def step(self, gradients: Gradients) -> None:
        beta, o = self.options["momentum"], self.options
        for i, x in enumerate(self.x):
            own = [given[i] for given in gradients]
            if all(g is None for g in own):
                continue
            total = torch.zeros_like(x)
            for w, gradient in enumerate(own):
                g = torch.zeros_like(x) if gradient is None else gradient.double()
                before = self.m[i][w]
                m = g if before is None else beta * before + (1 - beta) * g
                self.m[i][w] = m
                total = total + torch.where(m >= 0, 1.0, -1.0)
            vote = total.sign() * (-1 if o["maximize"] else 1)
            self.x[i] = x - o["lr"] * (vote + o["weight_decay"] * x)


def workers_of(
    parameters: Sequence[Tensor],
    world_size: int,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> list[Signum]:
    return [
        Signum([p.detach().to(dtype, copy=True).requires_grad_() for p in parameters], **options)
        for _ in range(world_size)
    ]


def a_run(world_size: int = 3, **options: Any) -> tuple[list[Signum], Scenario]:
    shapes: list[tuple[int, ...]] = [(12, 10), (7,), (), (4, 3, 2)]
    scenario = Scenario(shapes, world_size, {}, 9, 4)
    return workers_of(scenario.parameters(), world_size, **{"lr": 0.01, **options}), scenario


def trained(steps: int = 3, **options: Any) -> tuple[list[Signum], Scenario]:
    workers, scenario = a_run(**options)
    train(scenario, range(steps), workers)
    return workers, scenario


def momenta_of(optimizer: Signum) -> list[Tensor]:
    return [optimizer.state[p]["local_momentum"] for p in parameters_of(optimizer)]


def all_options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.0, 0.01, 0.5]),
            "momentum": st.sampled_from([0.0, 0.5, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "maximize": st.booleans(),
        }
    )


@examples(50)
@given(scenario=scenarios(), options=all_options(), at_once=st.sampled_from([8, 16, 2**18]))
def test_it_is_the_definition(scenario: Scenario, options: dict[str, Any], at_once: int) -> None:
    workers = workers_of(scenario.parameters(), scenario.world_size, **options)
    reference = Reference(scenario.parameters(), scenario.world_size, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(majority_vote, "FLOATS_AT_ONCE", at_once)  # in many pieces, or in one
        for step in range(scenario.steps):
            step_with(workers, scenario.gradients(step))
            reference.step(scenario.gradients(step))
    for w, optimizer in enumerate(workers):
        assert replicated(optimizer) == replicated(workers[0])
        for i, (p, x) in enumerate(zip(parameters_of(optimizer), reference.x, strict=True)):
            assert torch.allclose(p.detach(), x, rtol=ROUNDING, atol=ROUNDING)
            m = reference.m[i][w]
            if p.numel():
                own = optimizer.state[p]
                expected = torch.zeros_like(x) if m is None else m
                assert torch.allclose(own["local_momentum"], expected, ROUNDING, ROUNDING)
                assert bool(own["momentum_started"]) == (m is not None)


@given(voters=st.integers(1, 300), count=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_a_majority_is_counted_right(voters: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ballots = torch.randint(-(2**31), 2**31, (voters, count), generator=generator).int()
    if seed % 2:  # close to a tie
        ballots[1::2] = ~ballots[: voters - voters % 2 : 2]
    places = torch.arange(32)
    counts = (ballots.unsqueeze(-1) >> places & 1).sum(dim=0)
    more, as_many = ((word.unsqueeze(-1) >> places & 1).bool() for word in majority(ballots))
    assert torch.equal(more, 2 * counts > voters)
    assert torch.equal(as_many, 2 * counts == voters)


def test_a_tie_moves_nothing_but_by_decay() -> None:
    workers = workers_of([torch.tensor([2.0, 2.0, 2.0])], 2, lr=0.5, weight_decay=0.25)
    step_with(workers, [[torch.tensor([1.0, 1.0, -9.0])], [torch.tensor([-5.0, 3.0, -1.0])]])
    for optimizer in workers:
        assert parameters_of(optimizer)[0].tolist() == [1.75, 1.25, 2.25]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_sign_of_zero_is_plus_and_zero_is_survivable(zero: float) -> None:
    workers = workers_of([torch.ones(5, 3)], 2, lr=0.5)
    step_with(workers, [[torch.full((5, 3), zero)]] * 2)
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for o in workers for p in parameters_of(o))
    step_with(workers, [[-torch.ones(5, 3)]] * 2)
    assert all(torch.equal(p, torch.ones_like(p)) for o in workers for p in parameters_of(o))


def test_what_no_worker_has_a_gradient_for_stays_as_it_is() -> None:
    workers, scenario = a_run(weight_decay=0.1)
    step_with(workers, scenario.gradients(0))
    given = scenario.gradients(1)
    for own in given:
        own[0] = own[2] = None
    given[1][3] = None  # others have one
    before = [[*map(bits, [*parameters_of(o), *momenta_of(o)])] for o in workers]
    step_with(workers, given)
    for optimizer, old in zip(workers, before, strict=True):
        now = map(bits, [*parameters_of(optimizer), *momenta_of(optimizer)])
        assert [a == b for a, b in zip(now, old, strict=True)] == [True, False, True, False] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_the_scale_of_gradients_does_not_matter(exponent: int, dtype: torch.dtype) -> None:
    parameters, scenario = a_run()[1].parameters(), a_run()[1]
    workers, others = (workers_of(parameters, 3, dtype, lr=0.01) for _ in range(2))
    for step in range(4):
        step_with(workers, scenario.gradients(step))
        scaled = [[math.ldexp(1, exponent) * g for g in own] for own in scenario.gradients(step)]
        step_with(others, scaled)
    assert bits(parameters_of(workers[0])) == bits(parameters_of(others[0]))
    for optimizer in others:
        assert all(bool(m.isfinite().all()) and bool(m.any()) for m in momenta_of(optimizer))


# ---- what is sent -------------------------------------------------------------------------------


def test_a_step_is_one_small_all_reduce_and_one_gather_of_bits() -> None:
    workers, scenario = a_run()
    step_with(workers, scenario.gradients(0))
    for step in (1, 2):
        trace = step_with(workers, scenario.gradients(step))
        words, signs = 4 + 3, 20  # four parameters, three workers; 120 + 7 + 1 + 24 = 152 bits
        kinds = [(t.kind, t.purpose, t.shape, t.dtype) for t in trace]
        assert kinds == [
            ("AllReduceMean", "vectors", (words,), torch.float64),
            ("AllGather", "signs", (signs,), torch.uint8),
        ]
        stats = workers[0].communication_stats()
        assert stats["bytes_sent"] == sum(t.nbytes for t in trace) == 8 * words + signs
        assert MajorityVote().payload_bytes(scenario.shapes) == signs


def test_volumes_are_those_of_the_papers_models() -> None:
    with torch.device("meta"):
        models = CifarResNet18(), LSTMLanguageModel(28_869, 650, 650, 3, dropout=0.0)
    shapes = [[p.shape for p in model.parameters()] for model in models]
    assert [sum(s.numel() for s in own) for own in shapes] == [11_173_962, 28_949_319]
    assert [MajorityVote().payload_bytes(own) for own in shapes] == [1_396_748, 3_618_668]
    assert pytest.approx(32, abs=0.5) == 24 * 1_396_748 / 2**20  # MB per epoch, as printed
    assert pytest.approx(242, abs=0.5) == 70 * 3_618_668 / 2**20
    workers = workers_of([torch.ones(s) for s in shapes[0]], 2, torch.float32)
    ones = [torch.ones(s) for s in shapes[0]]
    trace = step_with(workers, [ones, ones])
    assert trace[-1].kind == "AllGather"
    assert trace[-1].nbytes == 1_396_748


# ---- what it is good for ------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 4])
def test_noisy_gradients_of_a_convex_function_lead_to_its_minimum(world_size: int) -> None:
    target = gaussian((8, 6), 1)
    workers = workers_of([torch.zeros(8, 6)], world_size, lr=0.1)
    for step in range(100):
        noise = [0.2 * gaussian((8, 6), 2, step, w) for w in range(world_size)]
        step_with(workers, [[parameters_of(workers[0])[0].detach() - target + n] for n in noise])
        for optimizer in workers:
            optimizer.param_groups[0]["lr"] -= 0.1 / 101
    # Steps of up to 0.1 add up to 5, more than any element is away; the last are of 0.001. What is
    # left then is less than the noise of a single gradient.
    assert float((parameters_of(workers[0])[0].detach() - target).abs().max()) < 0.2
