"""H: what SGD alone does not have: several workers."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contract.adapters import Adapter, Loop
from benchmarks.contract.made import given, noise, require_equal_workers, same
from benchmarks.contract.probes.rules import sgd_twin
from benchmarks.contract.questions import Missed, describe_error, require, row, stage

__all__: list[str] = []


def require_distributed(model: nn.Module, loop: Loop, what: str, gaps: bool) -> None:
    """Twelve steps of two micro-batches, after each of which workers must be equal."""
    part = dist.get_rank()
    for step in range(12):
        loop.zero_grad()
        for micro_batch in (0, 1):
            gradients = noise(model, step, 10 * micro_batch + part)
            if gaps and (step + part) % 3 == 0:
                gradients[step % 2] = None
            if micro_batch:
                loop.backward(gradients)
            else:
                with loop.no_sync():
                    loop.backward(gradients)
        loop.step()
        require_equal_workers(model, f"after step {step}, {what}")


@row(
    "H1",
    "Workers are bitwise equal after every step",
    "Other gradients on each worker, two micro-batches per step; then gradients that are missing, "
    "from the beginning, on one worker or the other; twelve steps each.",
    workers=2,
)
def equal_workers(adapter: Adapter) -> None:
    for gaps, what in ((False, "with all gradients"), (True, "with gradients missing")):
        stage(what)
        model = given()
        loop = adapter.loop(model, unused=gaps, momentum=0.9)
        try:
            require_distributed(model, loop, what, gaps)
        except Exception as error:
            raise Missed(f"{what}: {describe_error(error)}") from error


class _Recorder(TorchDispatchMode):
    """Notes the collectives that are asked for: name, sizes and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.seen.append((str(func), [(tuple(t.shape), str(t.dtype)) for t in tensors]))
        return func(*args, **(kwargs or {}))


@row(
    "H2",
    "Collectives do not depend on the data",
    "Number, order, sizes and dtypes in steps with noise, with zeros, and with a gradient missing "
    "on one worker.",
    workers=2,
)
def fixed_schedule(adapter: Adapter) -> str:
    model = given()
    loop = adapter.loop(model, unused=True)
    for step in range(5):
        loop.train(noise(model, step, dist.get_rank()))
    found = {}
    for what in ("noise", "zeros", "a gradient missing"):
        gradients = noise(model, 6, dist.get_rank())
        if what == "zeros":
            gradients = [torch.zeros_like(p) for p in model.parameters()]
        elif what == "a gradient missing" and dist.get_rank() == 1:
            gradients[0] = None
        stage(what)
        with _Recorder() as recorder:
            try:
                loop.train(gradients)
            except Exception as error:
                raise Missed(f"{what}: {describe_error(error)}") from error
        found[what] = recorder.seen
        require(recorder.seen == found["noise"], f"with {what} there are other collectives")
    require(found["noise"], "no collective was seen")
    return f"{len(found['noise'])} per step"


@row(
    "H3",
    "A process group of one's own",
    "Two groups of one worker each: uncompressed, each is trained by its own gradients only. A "
    "group that the worker is not in: nothing, or an error.",
    workers=2,
)
def process_groups(adapter: Adapter) -> None:
    groups = [dist.new_group([0]), dist.new_group([1])]
    part = dist.get_rank()
    model = given()
    twin = sgd_twin(model) if adapter.is_sgd else adapter.loop(
        copy.deepcopy(model), rank=None, group=groups[part]
    )  # fmt: skip
    torch.manual_seed(0)
    loop = adapter.loop(model, rank=None, group=groups[part])
    for step in range(4):
        for run in (loop, twin):
            torch.manual_seed(step)
            run.train(noise(run.model, step, part))
    require(same(model, twin.model), "a group of one worker: others have a part in it")
    try:
        outsider = adapter.loop(given(), group=groups[1 - part])
        outsider.train(noise(outsider.model, 0, part))
    except Exception as error:
        require("imed out" not in str(error), describe_error(error))


@row(
    "H4",
    "Equal parameters to start with",
    "Workers have other initial parameters; after the set-up that is documented they are equal.",
    workers=2,
)
def initial_parameters(adapter: Adapter) -> None:
    model = given(seed=dist.get_rank())
    adapter.loop(model).make_workers_equal()
    require_equal_workers(model, "after the set-up: equal ones are up to the program")


@row(
    "H5",
    "The mean over workers; a weighted one for unequal batches",
    "Uncompressed, four steps are those of one worker with the mean of the gradients, to 1e-5; so "
    "they are with batches of 1 and 3, weighted by an option or by scaling the loss.",
    workers=2,
)
def means(adapter: Adapter) -> str | None:
    own = dist.new_group([0]), dist.new_group([1])
    remark = None
    for batches in ((1, 1), (1, 3)):
        model = given((12, 10), (9, 14))
        alone = copy.deepcopy(model)
        torch.manual_seed(0)
        loop = adapter.loop(model, rank=None)
        torch.manual_seed(0)
        twin = sgd_twin(alone) if adapter.is_sgd else adapter.loop(
            alone, rank=None, group=own[dist.get_rank()]
        )  # fmt: skip
        weights = [2 * size / sum(batches) for size in batches]
        scale = loop.weigh(weights[dist.get_rank()])
        if batches == (1, 3):
            remark = "by an option" if scale == 1.0 else "by scaling the loss"
        for step in range(4):
            parts = [noise(model, step, part) for part in (0, 1)]
            loop.zero_grad()
            torch.manual_seed(step)
            loop.backward(parts[dist.get_rank()], scale)
            loop.step()
            torch.manual_seed(step)
            twin.train([(weights[0] * a + weights[1] * b) / 2 for a, b in zip(*parts, strict=True)])
        require(same(model, twin.model, 1e-5), f"batches of {batches}: not the mean")
    return remark
