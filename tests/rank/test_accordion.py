"""Accordion's decisions: Algorithm 1 of arXiv 2010.16248, window by window, from written tables."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGD, TopK, UniformQuantized
from efsgd.rank import RankScheduler, is_critical
from tests.rank.rank_runs import SQUARE, Team, accordion, of_norm

LOW, HIGH = 1, 3  # those of `accordion`
TOP_K: dict[str, Any] = {"make": ErrorFeedbackSGD, "compressor": TopK(density=0.3), "lr": 0.0}


@dataclass(frozen=True)
class Windows:
    """Windows of one step: a norm, what is expected after it (H or L), and a learning rate of each.

    The last learning rate is that of a window that would follow; all are 1.0 if none are given.
    """

    name: str
    norms: list[float]
    expected: str
    options: dict[str, Any] = field(default_factory=dict)
    lrs: list[float] | None = None


def cosine(windows: int) -> list[float]:
    """A cosine schedule from 1 to 0, of each window and of the one that would follow."""
    return [(1 + math.cos(math.pi * t / windows)) / 2 for t in range(windows + 1)]


CASES = [
    Windows("the first window has nothing to be compared with", [4], "H"),
    Windows("nothing changes", [4, 4, 4], "HLL"),
    Windows("a fall by half is one by the threshold", [4, 2], "HH"),
    Windows("a fall by less than half", [4, 2.5], "HL"),
    Windows("a rise by half", [4, 6], "HH"),
    Windows("a rise by less than half", [4, 5.5], "HL"),
    Windows("the change is that since the last window, not since the first", [4, 5, 7, 10], "HLLL"),
    Windows("back to low once nothing changes any more", [4, 1, 1], "HHL"),
    Windows("zero before", [0, 4, 4], "HHL"),
    Windows("zero now", [4, 0], "HH"),
    Windows("zero before and now", [0, 0], "HH"),
    Windows("zero now, below the threshold", [4, 0], "HL", {"threshold": 2.0}),
    Windows("with threshold 0 all is critical", [4, 4, 4], "HHH", {"threshold": 0}),
    Windows("threshold 1, a fall by three quarters", [4, 1], "HL", {"threshold": 1.0}),
    Windows("threshold 1, twice as long", [4, 8], "HH", {"threshold": 1.0}),
    Windows("large norms", [1e150, 1.2e150, 1e149], "HLH", {"setting": "density"}),
    Windows("small norms", [1e-150, 1.2e-150, 1e-149], "HLH", {"setting": "density"}),
    Windows("every second window is looked at", [4, 99, 4, 0, 8], "HHLLH", {"interval": 2}),
    Windows("every third window is looked at", [4, 0, 0, 4, 0, 0, 4], "HHHLLLL", {"interval": 3}),
    Windows("the learning rate falls", [4] * 4, "HLHL", lrs=[1, 1, 1, 0.1, 0.1]),
    Windows("it falls a little", [4] * 4, "HLHL", lrs=[1, 1, 1, 0.999, 0.999]),
    Windows("it falls with the first decision", [4] * 3, "HLL", lrs=[1, 0.1, 0.1, 0.1]),
    Windows("warming up is no fall", [4] * 4, "HLLL", lrs=[0.1, 0.2, 0.4, 0.8, 0.8]),
    Windows("a fall from warmth is one", [4] * 4, "HLHL", lrs=[0.1, 0.2, 0.4, 0.3, 0.3]),
    Windows(
        "a fall counts up to the next decision",
        [4] * 7,
        "HHHLHHL",
        {"interval": 3},
        lrs=[1, 1, 1, 1, 1, 0.1, 0.1, 0.1],
    ),
    Windows(
        "a fall with a decision counts up to the next one",
        [4] * 7,
        "HHHHHHL",
        {"interval": 3},
        lrs=[1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1],
    ),
    Windows("a step by half is no fall to less than half", [4] * 3, "HLL", {"lr_fall": 0.5},
            lrs=[1, 1, 0.5, 0.5]),
    Windows("a step to less than half is", [4] * 3, "HHL", {"lr_fall": 0.5}, lrs=[1, 1, 0.49, 0.4]),
    Windows("a cosine always falls", [4] * 10, "H" * 10, lrs=cosine(10)),
    # Towards its end it is a parabola: (2/3)² and (1/2)² are below one half, and 0 is, too.
    Windows("a cosine at half", [4] * 10, "HLLLLLLHHH", {"lr_fall": 0.5}, lrs=cosine(10)),
    Windows("a line at half", [4] * 10, "HLLLLLLLLH", {"lr_fall": 0.5},
            lrs=[1 - t / 10 for t in range(11)]),
    Windows("a cosine that is left alone", [4] * 10, "HLLLLLLLLL", {"lr_fall": 0.0},
            lrs=cosine(10)),
]  # fmt: skip


@pytest.mark.parametrize(("scope", "gradients"), [("layer", "mean"), ("model", "worker 0")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_each_window_is_decided_on_as_the_table_says(
    case: Windows, scope: str, gradients: str
) -> None:
    options = {"scope": scope, "gradients": gradients, **case.options}
    levels = {"L": LOW, "H": HIGH}
    if "setting" in options:  # norms that PowerSGD's products would not bear
        levels = {"L": 0.25, "H": 0.5}
        options |= {"low": levels["L"], "high": levels["H"]}
        team = Team(lambda: accordion(**options), 2, **TOP_K)
    else:
        team = Team(lambda: accordion(**options), 2)
    lrs = case.lrs or [1.0] * (len(case.norms) + 1)
    decided = []
    assert team.ranks == [levels["H"]]
    for norm, lr, next_lr in zip(case.norms, lrs, lrs[1:], strict=False):
        team.set_lr(lr)
        team.step_alike(norm)
        team.set_lr(next_lr)
        team.decide()
        decided += team.ranks
    assert decided == [levels[letter] for letter in case.expected]


def test_norms_may_be_as_large_as_they_come_and_those_that_are_not_finite_are_critical() -> None:
    for previous, present in itertools.permutations((1.0, math.inf, math.nan), 2):
        assert is_critical(previous, present, threshold=math.inf)
    assert is_critical(math.inf, math.inf, threshold=math.inf)
    assert not is_critical(1.5e308, 1.6e308)
    assert is_critical(5e-324, 1.0)


def test_a_sum_that_overflows_is_critical_and_does_no_harm_afterwards() -> None:
    policy = accordion(setting="density", low=0.25, high=0.5)
    team = Team(lambda: policy, dtype=torch.float32, **TOP_K)
    decided = []
    for steps in (1, 4, 1, 1):  # of a largest element of 2e38, in float32: 4 of them are infinite
        for _ in range(steps):
            team.step_alike(16 * 1e38)
        team.decide()
        decided += team.ranks
    assert decided == [0.5, 0.5, 0.5, 0.25]


def test_layers_decide_for_themselves() -> None:
    team = Team(accordion, 2, [SQUARE, (32, 8), (64,), SQUARE])
    for norms in ((3, 4, 9, 8), (3, 1, 0, 9)):
        team.window_alike(*norms)
    assert team.ranks == [LOW, HIGH, None, LOW]
    assert team.schedulers[0].get_last_ranks() == {
        "parameter 0": LOW,
        "parameter 1": HIGH,
        "parameter 3": LOW,
    }


@pytest.mark.parametrize(("norms", "expected"), [((3, 1), LOW), ((2.1, 0), HIGH), ((0, 5), LOW)])
def test_a_model_decides_by_the_norm_of_all_its_compressed_layers(
    norms: tuple[float, float], expected: int
) -> None:
    """From (3, 4), of norm 5, to norms of √10, 2.1 and 5."""
    team = Team(lambda: accordion(scope="model"), 2, [SQUARE, SQUARE, (64,)])
    for each in ((3, 4, 7), (*norms, 0)):
        team.window_alike(*each)
    assert team.ranks == [expected, expected, None]


def test_the_learning_rate_counts_in_each_group_by_itself() -> None:
    team = Team(lambda: accordion(interval=3), 1, [SQUARE, SQUARE])
    decided = []
    for lrs in ((1, 0.1), (1, 0.1), (1, 0.1), (1, 0.05), (0.5, 0.05), (0.5, 0.05)):
        team.step_alike(4, 4)
        team.set_lr(*lrs)
        team.decide()
        decided.append(team.ranks)
    high, low = HIGH, LOW
    # A fall from 1 to 0.1 with the first decision; then at window 3 a decision, with a fall.
    assert decided == [[high, high]] * 3 + [[low, high], [high, high], [high, high]]


@pytest.mark.parametrize("gradients", ["mean", "worker 0"])
@pytest.mark.parametrize(
    ("later", "by_mean", "by_worker_0"),
    [((1, 7), LOW, HIGH), ((4, -4), HIGH, LOW), ((4, 4), LOW, LOW), ((9, 9), HIGH, HIGH)],
)
def test_what_counts_is_the_norm_of_the_workers_mean(
    gradients: str, later: tuple[float, float], by_mean: int, by_worker_0: int
) -> None:
    team = Team(lambda: accordion(gradients=gradients), 2)
    for norms in ((4, 4), later):
        team.step([[of_norm(norm)] for norm in norms])
        team.decide()
    assert team.ranks == [by_mean if gradients == "mean" else by_worker_0]


def test_what_counts_is_the_norm_of_the_sum_over_a_window() -> None:
    team = Team(accordion)
    decided = []
    for window in ((3, 3, 3), (9,), (6, -6, 9), (9, -9), (-9, 9, 1)):
        for norm in window:
            team.step_alike(norm)
        team.decide()
        decided += team.ranks
    assert decided == [HIGH, LOW, LOW, HIGH, HIGH]


@pytest.mark.parametrize(
    ("compressor", "setting", "low", "high"),
    [
        (TopK(density=0.1), "density", 0.01, 0.25),
        (UniformQuantized(bits=4), "bits", 2, 8),
        (PowerSGD(rank=3), "rank", 2, 2),
        (PowerSGD(), "min_compression_rate", 0, 1.5),
    ],
    ids=["density", "bits", "rank", "min_compression_rate"],
)
def test_any_setting_that_single_parameters_may_have_can_be_decided_on(
    compressor: Any, setting: str, low: float, high: float
) -> None:
    made: dict[str, Any] = {"make": ErrorFeedbackSGD, "compressor": compressor}
    team = Team(lambda: accordion(low=low, high=high, setting=setting), 2, **made)
    decided = []
    for norm in (4, 4, 4, 1, 1):
        decided += team.window_alike(norm)
    assert decided == [high, low, low, high, low]
    assert [type(value) for value in decided] == [
        type(value) for value in (high, low, low, high, low)
    ]
    assert team.schedulers[0].get_last_ranks() == {"parameter 0": low}


def test_an_averager_follows_the_learning_rates_of_its_optimizer() -> None:
    own = [torch.zeros(SQUARE, requires_grad=True) for _ in range(2)]
    adamw = torch.optim.AdamW([{"params": own[:1], "lr": 0.1}, {"params": own[1:], "lr": 0.001}])
    averager = GradientAverager(own)  # both in one group
    scheduler = RankScheduler(averager, accordion(), lr_of=adamw)
    decided = []
    for lr in (0.001, 0.001, 0.0001, 0.0001):
        for parameter in own:
            parameter.grad = of_norm(4).float()
        averager.average_()
        adamw.step()
        adamw.param_groups[1]["lr"] = lr
        scheduler.step()
        decided.append(list(scheduler.get_last_ranks().values()))
    assert decided == [[HIGH, HIGH], [LOW, LOW], [LOW, HIGH], [LOW, LOW]]


def test_a_layer_that_is_sent_whole_at_the_high_rank_can_become_low() -> None:
    shape = (4, 64)  # factors of rank 4 have 272 numbers, and it has 256 itself
    team = Team(lambda: accordion(high=4), 2, [shape])
    decided, collectives = [], []
    for norm in (4, 4, 4, 0.5, 0.5):
        team.step_alike(norm)
        collectives.append(team.optimizers[0].communication_stats()["collectives"])
        team.decide()
        decided += team.ranks
    assert decided == [4, LOW, LOW, 4, LOW]
    assert collectives == [1, 1, 2, 2, 1]  # a second one for Q, where it is compressed


def test_steps_before_compression_starts_count() -> None:
    team = Team(accordion, 1, start_compressing_at=2)
    for _ in range(2):
        team.window_alike(4)
    assert team.ranks == [LOW]
