"""What two stages do that do not go together, fail, or take turns; for `pipeline_worker.py`."""

from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleGPipe

from efsgd import RandomK, TopK, UniformQuantized
from efsgd.pipeline import CompressedStage, Link
from tests.pipeline import training
from tests.pipeline.training import BATCH, MICROBATCHES, Pipeline, batches, compressed
from tests.wire.process_worker import error_of


def disagreements() -> dict[str, Any]:
    """The stages are made with different links, scalers, or checkpoints."""
    rank = dist.get_rank()
    inputs, targets, ids = next(batches(1))
    short = {"activations": Link(UniformQuantized(4), memory="samples", capacity=9)}

    def error(pipeline: Pipeline) -> dict[str, Any]:
        return error_of(partial(pipeline.run, inputs, targets))

    bits = Link(UniformQuantized(4 + rank))
    per = Link(UniformQuantized(4), per="microbatch" if rank else "sample")
    scaler = torch.amp.GradScaler("cpu") if rank else None
    found = {
        "bits": error(Pipeline(partial(CompressedStage, activations=bits))),
        "per": error(Pipeline(partial(CompressedStage, gradients=per))),
        "scaler": error(Pipeline(compressed("memories", scaler=scaler))),
        "none": error(Pipeline(compressed("memories" if rank else "identity"))),
    }
    pipeline = Pipeline(compressed("memories")).train(1)
    saved = [pipeline.stages[0].state_dict()]
    saved.append(pipeline.train(1, 1).stages[0].state_dict())
    pipeline.stages[0].load_state_dict(saved[rank])
    found["checkpoint"] = error(pipeline)
    pipeline.stages[0].load_state_dict(saved[1])
    pipeline.run(inputs, targets)  # the remedy

    other = Pipeline(compressed("identity")).stages[0]
    found["other_links"] = error_of(partial(other.load_state_dict, saved[0]))
    pipeline = Pipeline(compressed("samples"))
    found["no_samples"] = error(pipeline)
    for name, own in {
        "one_has_samples": ids if rank else None,
        "ids": ids[:: 1 - 2 * rank],
    }.items():
        if own is not None:
            pipeline.stages[0].announce(own, MICROBATCHES)
        found[name] = error(pipeline)
    pipeline.train(1, announces=True)  # the remedy
    found["mode"] = error_of(
        partial(pipeline.run, inputs, targets, pipeline.engine.eval if rank else None)
    )
    random = partial(CompressedStage, activations=Link(RandomK(density=0.5)))
    pipeline = Pipeline(random)
    if rank:
        pipeline.stages[0].load_state_dict(Pipeline(random).train(1).stages[0].state_dict())
    else:
        Pipeline(random).train(1)
    found["one_has_loaded"] = error(pipeline)
    pipeline = Pipeline(partial(CompressedStage, **short))
    pipeline.stages[0].announce(ids, MICROBATCHES)
    found["capacity"] = error(pipeline)
    mask = {
        "activations": Link(TopK(density=0.1)),
        "gradients": Link(TopK(density=0.2), reuse_mask=True),
    }
    found["masks"] = error_of(partial(Pipeline, partial(CompressedStage, **mask)))
    forwards = {"activations": Link(TopK(density=0.1), reuse_mask=True)}
    found["forwards"] = error_of(partial(Pipeline, partial(CompressedStage, **forwards)))
    return found


class Failing(nn.Module):
    """Raises at a microbatch, forwards or backwards, once it is told to."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__()
        self.linear, self.left, self.left_backwards = training.block(number, count), -1, -1

    def backwards(self, gradient: Tensor) -> None:
        self.left_backwards -= 1
        if self.left_backwards == 0:
            raise ArithmeticError("this gradient is not to be computed")

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left_backwards > 0:
            x = self.linear(x)
            x.register_hook(self.backwards)
            return x
        if self.left == 0:
            dist.barrier()  # what a stage has sent would be lost where it fails before it arrives
            raise ArithmeticError("this microbatch is not to be computed")
        return self.linear(x)


def failures() -> dict[str, Any]:
    """A step that fails between two that do not, beside a run without it."""
    found = {}
    for name in ("mask", "memories", "samples"):
        announces = name == "samples"
        pipeline, other = (Pipeline(compressed(name), make_block=Failing) for _ in range(2))
        for own in (pipeline, other):
            own.train(2, announces=announces)
        before = pipeline.memories()
        # Stage 0 has sent two microbatches by then, and stage 1 has received them.
        pipeline.stages[0].submod.left = 3 - dist.get_rank()
        error = error_of(partial(pipeline.train, 1, 3, announces=announces))
        after = pipeline.memories()
        pipeline.renew_schedule()
        for own in (pipeline, other):
            own.train(2, 2, announces=announces)
        found[name] = {
            "error": error["text"],
            "memories": [before, after],
            "at_last": [pipeline.memories(), other.memories()],
            "values": [pipeline.values(), other.values()],
        }
    return found


def alone(action: Any) -> dict[str, Any]:
    """The error of what waits for a neighbor in vain."""
    store = dist.distributed_c10d._get_default_store()
    patience = store.timeout
    store.set_timeout(timedelta(seconds=0.2))
    found = error_of(action)
    store.set_timeout(patience)
    return found


def failures_of_one() -> dict[str, Any]:
    """Stage 0 fails in its last backward, when stage 1 has come to the end of the step."""
    found = {}
    inputs, targets, ids = next(batches(1, 3))
    for name in ("identity", "mask", "samples"):
        announces = name == "samples"
        pipeline, other = (Pipeline(compressed(name), make_block=Failing) for _ in range(2))
        for own in (pipeline, other):
            own.train(2, announces=announces)
        stage, before = pipeline.stages[0], pipeline.memories()
        stage.submod.left_backwards = MICROBATCHES if dist.get_rank() == 0 else -1
        if announces:
            stage.announce(ids, MICROBATCHES)
        failed = error_of(partial(pipeline.run, inputs, targets))
        after = pipeline.memories()
        pipeline.renew_schedule()
        for own in (pipeline, other):
            own.train(1, 2, announces=announces)
        # One stage tries again, and the others come late.
        waited = alone(stage.clear_runtime_states) if dist.get_rank() == 0 else {}
        dist.barrier()
        pipeline.renew_schedule()
        for own in (pipeline, other):
            own.train(1, 3, announces=announces)
        found[name] = {
            "error": failed.get("text"),
            "waited": waited.get("type"),
            "memories": [before, after],
            "at_last": [pipeline.memories(), other.memories()],
            "values": [pipeline.values(), other.values()],
        }
    return found


def other_schedules() -> dict[str, Any]:
    """Between training steps, a schedule that only computes forwards, of more microbatches."""
    found = {}
    for name in ("memories", "samples"):
        announces = name == "samples"
        pipeline, other = (Pipeline(compressed(name)).train(2, announces=announces) for _ in "12")
        inputs = torch.cat([own for own, *_ in batches(2, 4)])
        longer = ScheduleGPipe(pipeline.stages[0], 2 * MICROBATCHES)
        pipeline.run(inputs, None, longer.step)
        pipeline.renew_schedule()  # torch's buffers are of the schedule that inferred shapes last
        between = pipeline.memories()
        after = []
        for step in (2, 3):
            for own in (pipeline, other):
                own.train(1, step, announces=announces)
            after.append(pipeline.memories())
        smaller = ScheduleGPipe(pipeline.stages[0], 2 * MICROBATCHES)
        pipeline.run(inputs[:BATCH], None, smaller.step)  # of half as many samples
        found[name] = {
            "memories": [between, *after],
            "at_last": [pipeline.memories(), other.memories()],
            "values": [pipeline.values(), other.values()],
        }
    return found


def inference() -> dict[str, Any]:
    """Evaluates in inference mode, and in none, between training steps."""
    found = {}
    for name in ("memories", "samples"):
        announces = name == "samples"
        pipeline, other = (Pipeline(compressed(name)).train(1, announces=announces) for _ in "12")
        inputs, targets, _ = next(batches(1, 4))
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                pipeline.run(inputs, targets, pipeline.engine.eval)
        for own in (pipeline, other):
            own.train(2, announces=announces)  # the same samples, and others
        found[name] = {
            "at_last": [pipeline.memories(), other.memories()],
            "values": [pipeline.values(), other.values()],
        }
    return found


TASKS = (failures, failures_of_one, other_schedules, inference, disagreements)
