"""Small pipelines for processes: the same model in stages, under any schedule of torch's."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleLoopedBFS

from efsgd import SymmetricQuantized, TopK, UniformQuantized
from efsgd.pipeline import CompressedStage, Link
from efsgd.wire.compare import checksum

WIDTH, BATCH, MICROBATCHES, INPUTS, CLASSES = 32, 32, 4, 16, 10

#: Of each schedule: the class, stages in a process, and whether they lie as in the letter V.
SCHEDULES: dict[str, tuple[Any, int, bool]] = {
    "GPipe": (ScheduleGPipe, 1, False),
    "1F1B": (Schedule1F1B, 1, False),
    "Interleaved1F1B": (ScheduleInterleaved1F1B, 2, False),
    "LoopedBFS": (ScheduleLoopedBFS, 2, False),
    "InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, 2, False),
    "ZBV": (ScheduleZBVZeroBubble, 2, True),
    "DualPipeV": (ScheduleDualPipeV, 2, True),
}

LINKS: dict[str, Mapping[str, Any]] = {
    "identity": {},
    "Q4/Q8": {
        "activations": Link(UniformQuantized(4), per="microbatch"),
        "gradients": Link(UniformQuantized(8), per="microbatch"),
    },
    "top": {"activations": Link(TopK(density=0.1)), "gradients": Link(TopK(density=0.1))},
    "mask": {
        "activations": Link(TopK(density=0.1), memory="difference"),
        "gradients": Link(TopK(density=0.1), memory="error", reuse_mask=True),
    },
    "memories": {
        "activations": Link(UniformQuantized(4), memory="difference"),
        "gradients": Link(SymmetricQuantized(4), memory="error"),
    },
    "samples": {
        "activations": Link(UniformQuantized(4), "microbatch", "samples", capacity=64),
        "gradients": Link(SymmetricQuantized(8)),
    },
}


def block(number: int, count: int) -> nn.Module:
    """One of the model's stages, the same in each process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 * count + number)
        first = nn.Linear(INPUTS if number == 0 else WIDTH, WIDTH)
        last = nn.Linear(WIDTH, CLASSES if number == count - 1 else WIDTH)
    return nn.Sequential(first, nn.Tanh(), last)


def batches(count: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Inputs, classes, and which samples of 64 they are."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, INPUTS, generator=generator)
    targets = torch.randint(0, CLASSES, (64,), generator=generator)
    for number in range(skip + count):
        if number % 2 == 0:
            order = torch.randperm(64, generator=generator)
        chosen = order[BATCH * (number % 2) :][:BATCH]
        if number >= skip:
            yield inputs[chosen], targets[chosen], chosen.tolist()


@dataclass
class Pipeline:
    """The stages of this process, and what trains them.

    Args:
        make: of a stage, from a module, its index, their number and a device.
        schedule: one of `SCHEDULES`.
        make_block: of a module, from its number and the number of all.
        group: of the pipeline.
        scaler: of the loss.
    """

    make: Callable[..., PipelineStage]
    schedule: str = "GPipe"
    make_block: Callable[[int, int], nn.Module] = block
    group: Any = None
    scaler: Any = None
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    stages: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        _, each, is_v = SCHEDULES[self.schedule]
        count = each * world
        own = [rank, count - 1 - rank] if is_v else [rank + world * n for n in range(each)]
        self.stages = [
            self.make(self.make_block(n, count), n, count, torch.device("cpu"), group=self.group)
            for n in own
        ]
        self.is_first, self.is_last = 0 in own, count - 1 in own
        self.renew_schedule()
        self.parameters = [p for stage in self.stages for p in stage.submod.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9)

    def renew_schedule(self) -> None:
        """After a failed step torch's own has losses of it, which the next step would take."""
        kind, each, _ = SCHEDULES[self.schedule]
        stages = self.stages if each > 1 else self.stages[0]
        self.engine = kind(stages, n_microbatches=MICROBATCHES, loss_fn=self._loss)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.loss(outputs, targets)
        return loss if self.scaler is None else self.scaler.scale(loss)

    def run(self, inputs: Tensor, targets: Tensor, call: Any = None) -> Any:
        """A step of the schedule, or another of its methods."""
        arguments = (inputs,) if self.is_first else ()
        options = {"target": targets} if self.is_last else {}
        return (call or self.engine.step)(*arguments, **options)

    def train(self, steps: int, skip: int = 0, *, announces: bool = False) -> "Pipeline":
        for inputs, targets, ids in batches(steps, skip):
            for stage in self.stages if announces else ():
                stage.announce(ids, MICROBATCHES)
            self.optimizer.zero_grad()
            self.run(inputs, targets)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.scale(torch.zeros(()))  # which makes the scale where there is no loss
                self.scaler.step(self.optimizer)
                self.scaler.update()
        return self

    def values(self) -> list[int]:
        """Checksums of the parameters."""
        return [checksum(parameter.detach()) for parameter in self.parameters]

    def memories(self) -> list[dict[str, Any]]:
        """Digests of all that stages keep, by end; of one that keeps nothing as well."""
        found = []
        for stage in self.stages:
            stage.state_dict()  # settles what the last step has changed
            ends = stage._ends.items()
            found.append({name: end.memory.digest() for name, end in ends if end.memory})
        return found

    def sent(self) -> list[int]:
        """Bytes of all stages: forwards, backwards, and both uncompressed."""
        stats = [stage.communication_stats() for stage in self.stages]
        names = ("forward_bytes_sent", "backward_bytes_sent")
        names += ("forward_bytes_uncompressed", "backward_bytes_uncompressed")
        return [sum(own[name] for own in stats) for name in names]


def compressed(name: str, **options: Any) -> Callable[..., CompressedStage]:
    """Makes stages with some of `LINKS`."""
    return partial(CompressedStage, **LINKS[name], **options)


def plain_data(state: Any) -> Any:
    """A copy that has been through a file, as `torch.load(weights_only=True)` reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
