"""Pipelines of processes: under torch's schedules, beside torch's own stage and a naive loop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from efsgd.pipeline import Link
from efsgd.wire.compare import checksum
from tests.launcher import launch
from tests.pipeline import pipeline_worker as script
from tests.pipeline.pair import Pair
from tests.pipeline.training import LINKS, MICROBATCHES, SCHEDULES, batches, block

# One process of pytest runs them all: they share launches, and several would crowd the cores.
pytestmark = pytest.mark.xdist_group("processes")
V_SCHEDULES = ("ZBV", "DualPipeV")
# Forwards and backwards: 3 steps of 4 microbatches [8, 32] in float32, over each link.
GOLDEN = {
    "identity": (12288, 12288),
    "Q4/Q8": (1632, 3168),
    "top": (2304, 2304),
    "mask": (2304, 1152),
}


def of_all_schedules(world_size: int, folder: Path) -> list[dict[str, Any]]:
    return launch(script.__file__, world_size, folder, "schedules")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two workers report of all schedules."""
    return of_all_schedules(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same, of four."""
    return of_all_schedules(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two workers report of links, by task."""
    return launch(script.__file__, 2, tmp_path_factory.mktemp("links"), "links")


def test_without_compression_it_is_torchs_own_stage(
    two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    assert set(two[0]) == set(SCHEDULES)
    assert set(four[0]) == set(SCHEDULES) - {"DualPipeV"}
    for worker in two + four:
        for schedule, own in worker.items():
            assert own["identity"]["values"] == own["torch"]["values"], schedule
            assert own["mask"]["values"] != own["torch"]["values"], schedule
            assert own["identity"]["is_whole"] and own["mask"]["is_whole"], schedule


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_are_those_announced(world_size: int, request: pytest.FixtureRequest) -> None:
    workers = request.getfixturevalue({2: "two", 4: "four"}[world_size])
    for schedule, (_, each, _) in SCHEDULES.items():
        if schedule not in workers[0]:
            continue
        # Between stages in one process nothing is sent.
        links = each * world_size - 1 - (schedule in V_SCHEDULES)
        for name, (forwards, backwards) in GOLDEN.items():
            if name not in workers[0][schedule]:
                continue
            plain = GOLDEN["identity"]
            sent = [worker[schedule][name]["sent"] for worker in workers]
            total = [sum(part) for part in zip(*sent, strict=True)]
            assert total == [links * part for part in (forwards, backwards, *plain)], schedule


@pytest.mark.parametrize("name", ["identity", "Q4/Q8", "top", "mask", "memories"])
def test_it_trains_like_a_loop_that_hands_messages_over(
    two: list[dict[str, Any]], name: str
) -> None:
    """To the bit, under the schedules that compute microbatches in order."""
    blocks = [block(number, 2) for number in range(2)]
    model = torch.nn.Sequential(*blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks: list[Any] = [{}, {}] if name == "mask" else [None, None]
    forwards = Pair(LINKS[name].get("activations", Link()), masks)
    backwards = Pair(LINKS[name].get("gradients", Link()), masks[::-1])
    for inputs, targets, _ in batches(3):
        optimizer.zero_grad()
        forwards.begin()
        backwards.begin()
        parts = zip(inputs.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True)
        for chunk, (x, y) in enumerate(parts):
            hidden = blocks[0](x)
            (received,) = forwards.carry([hidden], chunk=chunk)
            outputs = blocks[1](received.requires_grad_())
            torch.nn.functional.cross_entropy(outputs, y).backward()
            assert received.grad is not None
            (gradient,) = backwards.carry([received.grad], chunk=chunk)
            hidden.backward(gradient)
        forwards.end()
        backwards.end()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(MICROBATCHES)
        optimizer.step()
    for worker, own in zip(two, blocks, strict=True):
        expected = [checksum(parameter.detach()) for parameter in own.parameters()]
        for schedule in script.IN_ORDER:
            assert worker[schedule][name]["values"] == expected


def test_evaluation_compresses_and_changes_no_memory(links: list[dict[str, Any]]) -> None:
    for found in (worker["evaluation"] for worker in links):
        assert found["before"] == found["after"]
        assert found["is_finite"]
        # What comes later is as if nobody had evaluated.
        assert found["values"][0] == found["values"][1]
        assert found["memories"][0] == found["memories"][1] != [found["before"], found["after"]]
    # 4 microbatches of 8 samples: 32 codes of 4 bits, the smallest and the largest element.
    assert links[0]["evaluation"]["sent"] == [4 * 8 * (16 + 8), 0, 4 * 8 * 32 * 4, 0]
    assert links[1]["evaluation"]["sent"] == [0, 0, 0, 0]


def test_stages_are_observed_and_train_as_if_nobody_looked(links: list[dict[str, Any]]) -> None:
    # 4 microbatches of 8 samples: 32 codes of 4 bits, and one or two numbers. The third step was
    # an evaluation; that nothing else changes is seen above.
    sizes = [4 * 8 * (16 + 8), 4 * 8 * (16 + 4)]
    for stage, size in enumerate(sizes):
        found = links[stage]["evaluation"]["observed"]
        assert found == [[3, stage, size, MICROBATCHES], [4, stage, size, MICROBATCHES]]


def test_several_outputs_of_any_dtype(links: list[dict[str, Any]]) -> None:
    first, second = (worker["several_outputs"] for worker in links)
    # Of a sample: 2 int64, 16 bool, 32 float32 and 32 float64; gradients are of the last two.
    raw, samples = 2 * 8 + 16, 3 * 32
    for name, own in first.items():
        assert own["seen"] == second[name]["seen"]  # integers and bools have arrived
        assert any(any(row) for part, _ in own["seen"] for row in part)
        is_torchs = [part["values"] == of["torch"]["values"] for part, of in
                     ((own, first), (second[name], second))]  # fmt: skip
        assert is_torchs == [name in ("torch", "identity")] * 2
    sent = {name: (first[name]["sent"][0], second[name]["sent"][1]) for name in LINKS}
    plain = 32 * (4 + 8)
    assert sent["identity"] == (samples * (raw + plain), samples * plain)
    top = 3 * (4 + 4) + 3 * (8 + 4)
    assert sent["top"] == (samples * (raw + top), samples * top)
    assert sent["mask"] == (samples * (raw + top), samples * 3 * (4 + 8))
    four_bits = 2 * 16 + 2 * (4 + 8)
    assert sent["memories"] == (samples * (raw + four_bits), samples * (2 * 16 + 4 + 8))
    for name in ("mask", "memories", "samples"):
        (sender,), (receiver,) = first[name]["memories"], second[name]["memories"]
        assert sender["activations sent"] == receiver["activations received"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("bits", ["activations: ", "bits=4", "bits=5"]),
        ("per", ["gradients: ", "per='sample'", "per='microbatch'"]),
        ("scaler", ["gradients: ", "gradients with a scaler: "]),
        ("none", ["activations: Link(compressor=None", "activations: Link(compressor=Uniform"]),
        ("checkpoint", ["activations: ", "memory ", "load the same checkpoint"]),
        ("one_has_loaded", ["activations: ", "loaded after step 1"]),
        ("one_has_samples", ["samples announced: none", "samples announced: digest "]),
        ("ids", ["samples announced: digest ", "announce the same samples"]),
        ("mode", ["Stage 0: training", "stage 1: evaluation"]),
    ],
)
def test_stages_that_disagree_both_name_the_link(
    links: list[dict[str, Any]], case: str, words: list[str]
) -> None:
    first, second = (worker["disagreements"][case] for worker in links)
    assert first["type"] == second["type"] == "WorkerMismatchError"
    assert first["text"] == second["text"]
    for word in ("the link between stages 0 and 1 differ. Stage 0: ", "; stage 1: ", *words):
        assert word in first["text"]
    assert max(first["seconds"], second["seconds"]) < 15  # half of the group's time-out


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("other_links", "ValueError", "has memories of ['activations received', "),
        ("no_samples", "RuntimeError", "Call stage.announce(sample_ids, n_microbatches) before"),
        ("capacity", "ValueError", "32 samples, where Link(capacity=9) keeps no more."),
        ("masks", "ValueError", "reuse_mask=True needs the same compressor and the same per"),
        ("forwards", "ValueError", "reuse_mask is for gradients"),
    ],
)
def test_refusals_of_stages(links: list[dict[str, Any]], case: str, kind: str, words: str) -> None:
    for worker in links:
        assert worker["disagreements"][case]["type"] == kind
        assert words in worker["disagreements"][case]["text"]


@pytest.mark.parametrize("name", ["mask", "memories", "samples", "random"])
def test_a_run_goes_on_from_a_file_to_the_bit(links: list[dict[str, Any]], name: str) -> None:
    for found in (worker["saving"][name] for worker in links):
        assert found["values"][0] == found["values"][1]
        assert found["memories"][0] == found["memories"][1]


@pytest.mark.parametrize("name", ["mask", "memories", "samples"])
def test_a_step_that_fails_leaves_memories_as_they_were(
    links: list[dict[str, Any]], name: str
) -> None:
    for found in (worker["failures"][name] for worker in links):
        assert "failed to run forward" in found["error"]
        before, after = found["memories"]
        assert before == after
        # What follows is as if it had not been.
        assert found["values"][0] == found["values"][1]
        assert found["at_last"][0] == found["at_last"][1] != before


@pytest.mark.parametrize("name", ["identity", "mask", "samples"])
def test_of_a_step_that_fails_on_one_stage_nothing_is_kept_on_the_other(
    links: list[dict[str, Any]], name: str
) -> None:
    first, second = (worker["failures_of_one"][name] for worker in links)
    assert "Failed to run stage backward" in first["error"] and second["error"] == ""
    assert first["memories"][0] == first["memories"][1]
    # Stage 1 does not know of it yet, and what it would save has the step.
    assert (second["memories"][0] != second["memories"][1]) == (name != "identity")
    for found in (first, second):  # what follows is as if it had not been
        assert found["values"][0] == found["values"][1]
        assert found["at_last"][0] == found["at_last"][1]
    assert first["waited"] == "CollectiveError"


@pytest.mark.parametrize("name", ["memories", "samples"])
def test_a_schedule_of_more_microbatches_leaves_memories_at_work(
    links: list[dict[str, Any]], name: str
) -> None:
    for found in (worker["other_schedules"][name] for worker in links):
        between, *after = found["memories"]
        assert between != after[0] != after[1]
        assert found["values"][0] == found["values"][1]
        assert found["at_last"][0] == found["at_last"][1]


@pytest.mark.parametrize("name", ["memories", "samples"])
def test_evaluation_in_inference_mode_changes_nothing(
    links: list[dict[str, Any]], name: str
) -> None:
    for found in (worker["inference"][name] for worker in links):
        assert found["values"][0] == found["values"][1]
        assert found["at_last"][0] == found["at_last"][1]


@pytest.mark.parametrize("name", ["memories", "mask"])
def test_a_scale_of_the_loss_that_changes_changes_nothing(
    links: list[dict[str, Any]], name: str
) -> None:
    for found in (worker["scaling"][name] for worker in links):
        assert found["scale"] == 2.0**12  # it has doubled twice
        assert found["values"][0] == found["values"][1]
        assert found["memories"][0] == found["memories"][1]


def test_both_ends_keep_the_same_after_50_steps_of_reshuffled_samples(
    links: list[dict[str, Any]],
) -> None:
    first, second = (worker["long_run"] for worker in links)
    # 64 samples [32] in float32; then 8 microbatches of 256 codes of 4 bits and two floats.
    assert first["sent"] == [64 * 32 * 4] + [8 * (128 + 8)] * 24
    (sender,), (receiver,) = first["memories"], second["memories"]
    assert sender["activations sent"] == receiver["activations received"]
    assert sender["activations sent"] != sender["activations received"]


def test_replicas_of_each_stage_are_averaged_by_powersgd(tmp_path: Path) -> None:
    workers = launch(script.__file__, 4, tmp_path, "mesh")
    by_place = {tuple(worker["coordinate"]): worker for worker in workers}
    for stage in (0, 1):
        first, second = by_place[0, stage], by_place[1, stage]
        assert first["values"] == second["values"] != first["start"]
        assert first["start"] == second["start"]
        assert first["memories"] != second["memories"]  # of different batches
        assert first["collectives"] == 2
    for stage in (0, 1):  # of equal batches, but what is drawn differs between replicas
        assert by_place[0, stage]["start"] == by_place[1, stage]["start"]
        for one, other in zip(*(by_place[n, stage]["noisy"] for n in (0, 1)), strict=True):
            assert one != other
    for replica in (0, 1):
        (sender,), (receiver,) = (by_place[replica, stage]["memories"] for stage in (0, 1))
        assert sender["activations sent"] == receiver["activations received"]
