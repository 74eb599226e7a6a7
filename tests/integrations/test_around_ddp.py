"""Beside the rest of torch, over real processes: DistributedDataParallel, Join, torch.compile, ...

What the workers do is in `around_ddp_worker.py` and `around_ddp_loops.py`.
"""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.testing import step_together
from tests.integrations import around_ddp_loops as loops
from tests.integrations import around_ddp_training as training
from tests.integrations import around_ddp_worker as script
from tests.launcher import ROOT, launch
from tests.promises.reference import Reference

pytestmark = pytest.mark.xdist_group("processes")

WORLD_SIZE = 2
Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What each worker reports of all tasks."""
    return launch(script.__file__, WORLD_SIZE, tmp_path_factory.mktemp("around_ddp"))


def largest_difference(a: Any, b: Any) -> float:
    """Of two lists of lists of numbers."""
    pairs = zip(a, b, strict=True)
    return max(float((torch.tensor(x) - torch.tensor(y)).abs().max()) for x, y in pairs)


def quoted(text: str) -> bool:
    """Whether docs/around-ddp.md shows this message."""
    page = (ROOT / "docs" / "around-ddp.md").read_text()
    return text in re.sub(r"\n> ", " ", page)


# ---- the model ----------------------------------------------------------------------------------


def test_every_wrapper_that_leaves_gradients_local_gives_the_same_bits(workers: Reports) -> None:
    models = [training.make_model() for _ in workers]
    optimizers = [training.make_optimizer(model) for model in models]
    for step in range(training.STEPS):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            training.local_gradients(model, worker, step)
        step_together(optimizers)
    expected = [training.fingerprint(optimizer) for optimizer in optimizers]
    assert expected[0]["parameters"] == expected[1]["parameters"]
    assert expected[0]["error"] != expected[1]["error"]
    for report, own in zip(workers, expected, strict=True):
        for name in (*script.VARIANTS, "no_sync"):
            assert report["variants"]["trained"][name] == own, name
        graphs = report["variants"]["graphs"]
        assert {name: n > 0 for name, n in graphs.items()} == {n: "compiled" in n for n in graphs}


@pytest.mark.parametrize("name", ["plain", "noop_hook", "no_sync"])
def test_only_step_communicates(workers: Reports, name: str) -> None:
    for worker in workers:
        traffic = worker["traffic"][name]
        assert traffic["backward"] == {}
        assert traffic["step"] == {"allreduce_": 2}
        assert traffic["stats"] == workers[0]["traffic"]["plain"]["stats"]


def test_ddp_without_hook_communicates_in_every_backward_pass(workers: Reports) -> None:
    # This is what the test above would see if a wrapper did not leave gradients alone.
    for worker in workers:
        backward = worker["traffic"]["averaging DDP"]["backward"]
        assert backward["allreduce_"] >= training.MICRO_BATCHES


def test_parameters_unused_on_one_worker_or_on_all(workers: Reports) -> None:
    for worker in workers:
        unused = worker["unused"]
        assert unused["find_unused_parameters"] == unused["plain"]
        assert unused["plain"]["parameters"] == workers[0]["unused"]["plain"]["parameters"]
        for name in ("plain", "find_unused_parameters"):
            assert unused[name + ", moved"]  # by the gradient of worker 0 alone
            assert unused[name + ", rested"] and not unused[name + ", gradient"]


@pytest.mark.parametrize("name", ["plain", "no_sync"])
def test_buffers_of_a_plain_model_are_local_until_they_are_averaged(
    workers: Reports, name: str
) -> None:
    of_each = [worker["buffers"][name + ", one batch later"] for worker in workers]
    averaged = [worker["buffers"][name + ", averaged"] for worker in workers]
    assert averaged[0] == averaged[1]
    for statistic in ("running_mean", "running_var"):
        own = [torch.tensor(buffers[statistic]) for buffers in of_each]
        assert not torch.equal(*own)
        assert torch.equal(torch.tensor(averaged[0][statistic]), (own[0] + own[1]) / 2)
    counts = [buffers["num_batches_tracked"] for buffers in of_each]
    assert counts == ([4, 5] if name == "plain" else [4, 4])
    assert averaged[1]["num_batches_tracked"] == counts[0]


def test_ddp_starts_every_forward_pass_from_the_buffers_of_worker_0(workers: Reports) -> None:
    start = torch.tensor(workers[0]["buffers"]["noop_hook"]["running_mean"])
    assert workers[1]["buffers"]["noop_hook"]["running_mean"] != start.tolist()
    for worker in workers:
        own = torch.tensor(worker["buffers"]["noop_hook, of that batch"])
        after = torch.tensor(worker["buffers"]["noop_hook, one batch later"]["running_mean"])
        # A mean of 8 numbers below 10 and one more sum in float32: some numerics of 6e-8.
        assert (after - (0.9 * start + 0.1 * own)).abs().max() < 1e-5


def test_gradients_that_were_averaged_before_are_noticed_on_every_worker(workers: Reports) -> None:
    texts = [worker["averaged_twice"]["warnings"] for worker in workers]
    assert texts[0] == texts[1] and len(texts[0]) == 1
    assert quoted(texts[0][0])
    for worker in workers:
        report = worker["averaged_twice"]
        assert report["parameters"] == workers[0]["averaged_twice"]["parameters"]
        # The same step: sums in another order, float64's 1e-16 after six steps.
        assert largest_difference(report["parameters"], report["remedied"]) < 1e-12


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("_apply_optimizer_in_backward", ["backward"]),
        ("fully_shard", ["DTensor", "DistributedDataParallel"]),
        ("FSDP, flat parameters", ["FullyShardedDataParallel", "DistributedDataParallel"]),
        ("FSDP, original parameters", ["FullyShardedDataParallel", "DistributedDataParallel"]),
    ],
)
def test_sharded_and_scattered_parameters_are_refused(
    workers: Reports, case: str, words: list[str]
) -> None:
    errors = [worker["refusals"][case] for worker in workers]
    assert {error["type"] for error in errors} == {"NotImplementedError"}, errors
    assert len({error["text"] for error in errors}) == 1
    assert all(word in errors[0]["text"] for word in words), errors


def test_parameters_that_zero_redundancy_optimizer_splits_are_found_at_the_first_step(
    workers: Reports,
) -> None:
    errors = [worker["refusals"]["ZeroRedundancyOptimizer"] for worker in workers]
    assert {error["type"] for error in errors} == {"WorkerMismatchError"}, errors
    assert len({error["text"] for error in errors}) == 1
    assert "torch's ZeroRedundancyOptimizer gives each worker other" in errors[0]["text"]
    assert "construct this optimizer directly" in errors[0]["text"]


# ---- the loop -----------------------------------------------------------------------------------


class ClippedReference(Reference):
    """The reference, with all Δ' together clipped before the update."""

    def __init__(self, max_norm: float) -> None:
        options = {key: value for key, value in training.OPTIONS.items()}
        start = list(training.make_model().parameters())

        def query(index: int, step: int) -> Tensor:
            n, m = start[index].shape
            return initial_query(0, index, m, min(n, m, options["rank"]), step=step)

        super().__init__([p.shape for p in start], start, WORLD_SIZE, options, query)
        self.max_norm, self.norms, self.waiting = max_norm, list[float](), list[Tensor]()

    def step(self, gradients: Any) -> None:
        super().step(gradients)
        self.norms.append(math.sqrt(sum(float(u.square().sum()) for u in self.waiting)))
        factor = min(1.0, self.max_norm / (self.norms[-1] + 1e-6))
        for index, update in enumerate(self.waiting):
            super()._descend(index, update * factor)
        self.waiting = []

    def _descend(self, index: int, update: Tensor) -> None:
        self.waiting.append(update)


def local_norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


@pytest.mark.parametrize("name", ["local", "global"])
def test_clipping_against_the_reference(workers: Reports, name: str) -> None:
    reference = ClippedReference(loops.MAX_NORM if name == "global" else math.inf)
    norms: list[list[float]] = [[], []]
    for step in range(loops.CLIPPED_STEPS):
        gradients = [loops.clipped_gradients(step, worker) for worker in range(WORLD_SIZE)]
        if name == "local":
            for worker, own in enumerate(gradients):
                norms[worker].append(local_norm(own))
                factor = min(1.0, loops.MAX_NORM / (norms[worker][-1] + 1e-6))
                gradients[worker] = [gradient * factor for gradient in own]
        reference.step(gradients)
    if name == "global":
        norms = [reference.norms] * WORLD_SIZE
    cut = {norm > loops.MAX_NORM for norm in norms[0]}
    assert cut == {True, False}  # some steps are clipped, and some are not
    for worker, expected in zip(workers, norms, strict=True):
        report = worker["clipping"][name]
        assert report["norms"] == pytest.approx(expected, rel=1e-10)  # as promised of every path
        final = [x.flatten() for x in reference.parameters]
        assert largest_difference(report["parameters"], [x.tolist() for x in final]) < 1e-10
        assert report["parameters"] == workers[0]["clipping"][name]["parameters"]


def test_two_optimizers_in_turn(workers: Reports) -> None:
    for worker in workers:
        report = worker["adversaries"]
        assert report["moved"] == [[True, False]]  # its own parameters, not those of the other
        for kind in ("parameters", "momentum_buffer", "q"):
            assert report["trained"][kind] == workers[0]["adversaries"]["trained"][kind]
        assert [(stats["steps"], stats["collectives"]) for stats in report["stats"]] == [(4, 2)] * 2


def test_a_group_of_one_worker_trains_like_one_process(workers: Reports) -> None:
    for number, worker in enumerate(workers):
        model = training.make_model()
        optimizer = training.make_optimizer(model)
        for step in range(3):
            optimizer.zero_grad()
            training.loss_of(model, training.batch(number, step)).backward()
            optimizer.step()
        assert worker["subgroups"]["trained"] == training.fingerprint(optimizer)


def test_a_group_without_this_worker_is_an_error_that_changes_nothing(workers: Reports) -> None:
    for worker in workers:
        error = worker["subgroups"]["outsider"]
        assert error["type"] == "ValueError"
        assert quoted(error["text"])
        assert worker["subgroups"]["untouched"]
        assert worker["subgroups"]["steps after it was given a group"] == 1


def test_workers_that_have_run_out_of_batches_take_part_without_gradients(workers: Reports) -> None:
    models = [training.make_model() for _ in workers]
    optimizers = [training.make_optimizer(model) for model in models]
    for number in range(max(loops.UNEVEN)):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            if number < loops.UNEVEN[worker]:
                training.loss_of(model, training.batch(worker, number)).backward()
        step_together(optimizers)
    for report, optimizer in zip(workers, optimizers, strict=True):
        for name in ("plain", "noop_hook"):
            assert report["uneven"][name] == training.fingerprint(optimizer), name
            assert report["uneven"][name + ", steps"] == max(loops.UNEVEN)


@pytest.mark.parametrize("name", ["compressed", "uncompressed"])
def test_weighted_workers_are_one_worker_with_all_batches(workers: Reports, name: str) -> None:
    model = training.make_model().double()
    rate = 1.0 if name == "compressed" else math.inf
    optimizer = training.make_optimizer(model, min_compression_rate=rate)
    for number, sizes in enumerate(zip(*loops.SIZES, strict=True)):
        shares = [training.batch(worker, number, size) for worker, size in enumerate(sizes)]
        optimizer.zero_grad()
        training.loss_of(model, torch.cat(shares)).backward()
        optimizer.step()
    expected = training.values(training.parameters_of(optimizer))
    for worker in workers:
        found = worker["weighted"][name]
        assert found == workers[0]["weighted"][name]
        # Sums in another order: some times 1e-16 in each of three steps.
        assert largest_difference(found, expected) < 1e-13


def test_line_searches_on_the_averaged_loss_are_those_of_one_worker(workers: Reports) -> None:
    model = training.make_model().double()
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=6, line_search_fn="strong_wolfe")
    inputs = torch.cat([training.batch(worker, 0) for worker in range(WORLD_SIZE)])
    evaluations = 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        lbfgs.zero_grad()
        loss = training.loss_of(model, inputs)
        loss.backward()
        return loss

    lbfgs.step(closure)
    for worker in workers:
        found = worker["line_search"]
        assert found == workers[0]["line_search"]
        assert found["evaluations"] == evaluations
        # Six iterations in float64, each of which multiplies rounding by the curvature's condition.
        assert largest_difference(found["parameters"], training.values(model.parameters())) < 1e-9


def test_averaged_models_need_no_communication(workers: Reports) -> None:
    for worker in workers:
        report = worker["averaged_models"]
        others = workers[0]["averaged_models"]
        assert report["rates"] == others["rates"]
        # From 0.05 to 0.01 in two equal parts, which rounding may miss by a bit.
        assert report["rates"] == pytest.approx([0.03, 0.01, 0.01, 0.01], rel=1e-12)
        history = [[torch.tensor(x) for x in step] for step in report["history"]]
        mean = [torch.stack(steps).mean(0).tolist() for steps in zip(*history, strict=True)]
        ema = history[0]
        for step in history[1:]:
            ema = [loops.DECAY * x + (1 - loops.DECAY) * y for x, y in zip(ema, step, strict=True)]
        for name, expected in (("swa", mean), ("ema", [x.tolist() for x in ema])):
            assert report[name] == others[name]
            # Means of four numbers below 1, in float32 (6e-8), in another order.
            assert largest_difference(report[name], expected) < 1e-6


@pytest.mark.parametrize("name", ["swa", "ema"])
def test_statistics_of_averaged_models_are_averaged_like_others(
    workers: Reports, name: str
) -> None:
    local = [torch.tensor(worker["averaged_models"][name + ", local"]) for worker in workers]
    assert not torch.equal(*local)
    for worker in workers:
        everywhere = torch.tensor(worker["averaged_models"][name + ", everywhere"])
        assert torch.equal(everywhere, (local[0] + local[1]) / 2)
