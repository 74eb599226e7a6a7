"""What one worker of `test_pipelines.py` does. Run with the environment variables of torchrun.

    python pipeline_worker.py schedules RESULTS    trains under every schedule
    python pipeline_worker.py links RESULTS        two stages: evaluation, failures, saving, scaling
    python pipeline_worker.py mesh RESULTS         two pipelines of two stages, averaged by PowerSGD

Each worker writes RESULTS/worker.json.
"""

import contextlib
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage

from efsgd import PowerSGDOptimizer, RandomK, UniformQuantized
from efsgd.audit import observe
from efsgd.pipeline import CompressedStage, Link
from tests.pipeline import training, troubles
from tests.pipeline.training import MICROBATCHES, Pipeline, batches, compressed, plain_data
from tests.wire.process_worker import join

IN_ORDER = ("GPipe", "1F1B")  # one stage in a process, and microbatches one after the other


def schedules() -> dict[str, Any]:
    """Three steps under each schedule, of torch's stage and of ours."""
    _, world_size = join()
    found: dict[str, Any] = {}
    for schedule in training.SCHEDULES:
        if world_size == 4 and schedule == "DualPipeV":  # torch does not run there
            continue
        own = found[schedule] = {
            "torch": {"values": Pipeline(PipelineStage, schedule).train(3).values()}
        }
        names = ["identity", "mask"]
        if world_size == 2:
            names += ["Q4/Q8", *(("top", "memories") if schedule in IN_ORDER else ())]
        for name in names:
            done = Pipeline(compressed(name), schedule).train(3)
            is_whole = all(stage._is_whole() for stage in done.stages)
            own[name] = {"values": done.values(), "sent": done.sent(), "is_whole": is_whole}
    return found


# ---- two stages --------------------------------------------------------------------------------


def evaluation() -> dict[str, Any]:
    """Evaluates between steps, and without."""
    pipeline, other = (Pipeline(compressed("memories")).train(2) for _ in range(2))
    before, sent = pipeline.memories(), pipeline.sent()
    inputs, targets, _ = next(batches(1, 4))
    outputs = pipeline.run(inputs, targets, pipeline.engine.eval)
    after = pipeline.memories()
    evaluated = [new - old for new, old in zip(pipeline.sent(), sent, strict=True)]
    with observe(pipeline.stages) as recording:
        pipeline.train(2, 2)
    other.train(2, 2)
    return {
        "before": before,
        "after": after,
        "sent": evaluated,
        "is_finite": outputs is None or bool(outputs.isfinite().all()),
        "values": [pipeline.values(), other.values()],
        "memories": [pipeline.memories(), other.memories()],
        "observed": [[m.step, m.worker, m.nbytes, len(m.parameters)] for m in recording],
    }


class Many(nn.Module):
    """Gives numbers of several dtypes, or takes them, and remembers the others."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__()
        self.number, self.linear, self.seen = number, training.block(number, count), []

    def forward(self, *inputs: Tensor) -> Any:
        if self.number == 0:
            x = self.linear(inputs[0])
            others = (inputs[0][:, :2] * 100).long(), inputs[0] > 0
            self.seen.append(others)
            return others[0], x, others[1], (x * 2).double().unflatten(1, (8, 4))
        index, x, mask, y = inputs
        self.seen.append((index.clone(), mask.clone()))
        scale = 1 + index.sum(1, keepdim=True).sign() * mask[:, :1]
        return self.linear(x * scale + y.flatten(1).float())


def several_outputs() -> dict[str, Any]:
    """Integers and bools between floating-point outputs of two dtypes."""
    found: dict[str, Any] = {}
    for name in ("torch", *training.LINKS):
        make = PipelineStage if name == "torch" else compressed(name)
        pipeline = Pipeline(make, make_block=Many).train(3, announces=name == "samples")
        seen = pipeline.stages[0].submod.seen[-MICROBATCHES:]
        found[name] = {
            "values": pipeline.values(),
            "sent": pipeline.sent() if name != "torch" else None,
            "seen": [[part.tolist() for part in parts] for parts in seen],
            "memories": pipeline.memories() if name != "torch" else None,
        }
    return found


def saving() -> dict[str, Any]:
    """Five steps, and five of which the last two go on from a file."""
    random = {
        "activations": Link(RandomK(density=0.5), memory="difference"),
        "gradients": Link(RandomK(density=0.5), memory="error"),
    }
    makes = {name: compressed(name) for name in ("mask", "memories", "samples")}
    makes["random"] = partial(CompressedStage, **random)
    found = {}
    for name, make in makes.items():
        announces = name == "samples"
        whole = Pipeline(make).train(3, announces=announces)
        stage = whole.stages[0]
        state = [stage.state_dict(), stage.submod.state_dict(), whole.optimizer.state_dict()]
        saved = plain_data(state)
        whole.train(2, 3, announces=announces)
        loaded = Pipeline(make)
        loaded.stages[0].load_state_dict(saved[0])
        loaded.stages[0].submod.load_state_dict(saved[1])
        loaded.optimizer.load_state_dict(saved[2])
        loaded.train(2, 3, announces=announces)
        pair = (whole, loaded)
        found[name] = {
            "values": [own.values() for own in pair],
            "memories": [own.memories() for own in pair],
        }
    return found


def scaling() -> dict[str, Any]:
    """With scales of the loss that are powers of two and change, and without."""
    found = {}
    for name in ("memories", "mask"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scaled = Pipeline(compressed(name, scaler=scaler), scaler=scaler).train(5)
        plain = Pipeline(compressed(name)).train(5)
        found[name] = {
            "scale": scaler.get_scale(),
            "values": [scaled.values(), plain.values()],
            "memories": [scaled.memories(), plain.memories()],
        }
    return found


def long_run() -> dict[str, Any]:
    """AQ-SGD: bytes of each epoch of two steps, and memories after 50 steps."""
    pipeline, sent = Pipeline(compressed("samples"), "1F1B"), []
    for epoch in range(25):
        before = pipeline.sent()[0]
        pipeline.train(2, 2 * epoch, announces=True)
        sent.append(pipeline.sent()[0] - before)
    return {"sent": sent, "memories": pipeline.memories()}


def links() -> dict[str, Any]:
    join()
    tasks = (evaluation, several_outputs, saving, scaling, long_run, *troubles.TASKS)
    return {task.__name__: task() for task in tasks}


# ---- with data parallelism -----------------------------------------------------------------------


def mesh() -> dict[str, Any]:
    """Replicas see other batches, and average the gradients of each stage."""
    join()
    found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "stage"))
    replica = found.get_local_rank("replica")
    pipeline = Pipeline(compressed("memories"), group=found.get_group("stage"))
    start = pipeline.values()
    pipeline.optimizer = PowerSGDOptimizer(
        pipeline.parameters, lr=0.05, momentum=0.9, rank=2, process_group=found.get_group("replica")
    )
    for step in range(4):
        pipeline.train(1, 2 * step + replica)
    noisy = []
    for compressor in (UniformQuantized(1, stochastic=True), RandomK(density=0.25)):
        link = partial(CompressedStage, activations=Link(compressor))
        noisy.append(Pipeline(link, group=found.get_group("stage")).train(1).values())
    return {
        "noisy": noisy,
        "coordinate": [replica, found.get_local_rank("stage")],
        "start": start,
        "values": pipeline.values(),
        "memories": pipeline.memories(),
        "collectives": pipeline.optimizer.communication_stats()["collectives"],
    }


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    results = {"schedules": schedules, "links": links, "mesh": mesh}[task]()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    with contextlib.suppress(Exception):  # a step that has failed may have left something
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
