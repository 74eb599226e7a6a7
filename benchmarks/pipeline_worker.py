"""One stage of `benchmarks.pipeline`: measures steps of a schedule.

`namespaces.Network` starts it. Its only argument is a JSON file::

    shape         of a microbatch at the boundaries between stages
    microbatches  how many in a step
    rounds        how many steps are measured
    warm_up       how many come before
    timeout       seconds, for every wait
    output        where stage 0 writes {"samples": ..., "stats": ..., ...}
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from benchmarks.timing import Runner, clock_for, measure
from benchmarks.worker import slowest, work
from efsgd import SymmetricQuantized, TopK, UniformQuantized
from efsgd.pipeline import CompressedStage, Link
from efsgd.pipeline.codec import Codec
from efsgd.randomness import Draws

TORCH, PLAIN = "torch's PipelineStage", "no compressor"
Q4_Q8, WHOLE, TOP = "4 bits, 8 bits back", "the same, per microbatch", "Top 10 %"
LINKS: dict[str, tuple[Link, Link]] = {
    PLAIN: (Link(), Link()),
    Q4_Q8: (Link(UniformQuantized(bits=4)), Link(SymmetricQuantized(bits=8))),
    WHOLE: (
        Link(UniformQuantized(bits=4), per="microbatch"),
        Link(SymmetricQuantized(bits=8), per="microbatch"),
    ),
    TOP: (Link(TopK(density=0.1)), Link(TopK(density=0.1))),
}


class Scale(nn.Module):
    """A stage that computes next to nothing."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Whose gradient is as large as the output."""
    return (output * target).sum()


def step_of(name: str, job: dict[str, Any]) -> tuple[Callable[[], object], Any]:
    """A step of a candidate, and its stage."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place: Any = Scale(job["shape"][-1]), rank, world, torch.device("cpu")
    if name == TORCH:
        stage: Any = PipelineStage(*place)
    else:
        activations, gradients = LINKS[name]
        stage = CompressedStage(*place, activations=activations, gradients=gradients)
    schedule = ScheduleGPipe(stage, job["microbatches"], loss_fn=loss)
    generator = torch.Generator().manual_seed(0)
    whole = (job["shape"][0] * job["microbatches"], *job["shape"][1:])
    batch = torch.randn(whole, generator=generator)
    if rank == 0:
        return lambda: schedule.step(batch.requires_grad_()), stage
    if rank == world - 1:
        return lambda: schedule.step(target=batch), stage
    return schedule.step, stage


def packing(name: str, shape: list[int]) -> float:
    """Seconds to encode and decode one microbatch, there and back."""
    x = torch.randn(shape)
    clock, total = clock_for(torch.device("cpu")), 0.0

    def draws(row: int, is_private: bool) -> Draws:
        return Draws(0, row, 0, 0 if is_private else None)

    for link in LINKS.get(name, ()):
        if link.codes is not None:
            codec = Codec(link.codes, by_rows=link.per == "sample")
            buffer = codec.encode(x, draws)
            for act in (
                lambda codec=codec: codec.encode(x, draws),
                lambda codec=codec, buffer=buffer: codec.decode(buffer, x.shape, x.dtype, draws),
            ):
                total += sorted(clock(act) for _ in range(9))[4]
    return total


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Measures all candidates, together with the other stages."""
    made = {name: step_of(name, job) for name in (TORCH, *LINKS)}
    costs = {name: packing(name, job["shape"]) for name in made}
    samples = measure(
        {name: Runner(step) for name, (step, _) in made.items()},
        job["rounds"],
        warm_up=job["warm_up"],
        clock=clock_for(torch.device("cpu")),
        barrier=dist.barrier,
    )
    stats = {n: stage.communication_stats() for n, (_, stage) in made.items() if n != TORCH}
    # Stage 1 sends back to stage 0: with those of stage 0, all that crosses one boundary.
    back: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(back, {n: own["backward_bytes_sent"] for n, own in stats.items()})
    return {"samples": slowest(samples), "stats": stats, "packing": costs, "back": back[1]}


if __name__ == "__main__":
    work(run)
