"""B8 to B12, B16: kinds of parameters."""

import copy

import torch
from torch import Tensor, nn

from benchmarks.contract.adapters import Adapter
from benchmarks.contract.made import Given, given, noise, require_finite, same, values
from benchmarks.contract.probes.rules import sgd_twin
from benchmarks.contract.questions import Missed, require, row

__all__: list[str] = []


@row(
    "B8",
    "Parameters whose data is replaced or converted",
    "`p.data = ...` and `model.double()` after two steps; two more steps.",
)
def replaced_data(adapter: Adapter) -> None:
    model = given((12, 10), (9, 14))
    loop = adapter.loop(model, momentum=0.9)
    for step in range(2):
        loop.train(noise(model, step))
    loop.zero_grad()
    for p in model.parameters():
        p.data = p.data.clone()
    loop.train(noise(model, 2))
    loop.zero_grad()
    model.double()
    before = copy.deepcopy(model)
    for step in range(3, 6):
        loop.train(noise(model, step))
    require_finite(model, "after model.double()")
    require(not same(model, before), "nothing moved after model.double()")


@row(
    "B9",
    "Momentum has the parameter's memory format",
    "State of a channels_last parameter that has the parameter's shape has its strides.",
)
def memory_format(adapter: Adapter) -> None:
    image = values([(4, 3, 2, 2)])[0].contiguous(memory_format=torch.channels_last)
    model = Given([image])
    # Nothing is compressed: whether that works in this format is asked elsewhere.
    loop = adapter.loop(model, rank=None, momentum=0.9)
    loop.train(noise(model, 0))
    p = model.weights[0]
    kept = {k: v for k, v in loop.optimizer.state[p].items() if v.shape == p.shape}
    require(kept, "there is no such state")
    for name, value in kept.items():
        require(value.stride() == p.stride(), f"{name} has strides {value.stride()}")


@row(
    "B10",
    "Complex parameters step like their real views",
    "A vector and a matrix, uncompressed: SGD's steps on `torch.view_as_real`, to 1e-6. Then six "
    "steps with compression: finite, and both move.",
)
def complex_parameters(adapter: Adapter) -> None:
    def model() -> Given:
        return Given(values([(6,), (12, 10)], dtype=torch.complex64))

    if adapter.is_sgd:
        own = model()
        real = Given([torch.view_as_real(p.detach()).clone() for p in own.parameters()])
        loop, twin = adapter.loop(own, rank=None, momentum=0.9), sgd_twin(real, momentum=0.9)
        for step in range(3):
            gradients = complex_noise(own, step)
            loop.train(list(gradients))
            twin.train([torch.view_as_real(gradient) for gradient in gradients])
        viewed = Given([torch.view_as_real(p.detach()) for p in own.parameters()])
        require(same(viewed, twin.model, 1e-6), "other parameters than SGD's")
    compressed = model()
    before = [p.detach().clone() for p in compressed.parameters()]
    loop = adapter.loop(compressed, rank=1)
    for step in range(6):
        loop.train(list(complex_noise(compressed, step)))
    require_finite(compressed, "with compression")
    moved = [not torch.equal(p, q) for p, q in zip(compressed.parameters(), before, strict=True)]
    require(all(moved), "with compression, a parameter did not move")


def complex_noise(model: nn.Module, step: int) -> list[Tensor]:
    shapes = [p.shape for p in model.parameters()]
    return values(shapes, 100 + step, dtype=torch.complex64)


SHAPES: list[tuple[int, ...]] = [
    (), (0,), (0, 3), (7,), (12, 10), (4, 3, 2), (4, 3, 2, 2), (3, 2, 2, 2, 2)
]  # fmt: skip


@row(
    "B11",
    "Any shape: 0 to 5 dimensions, empty, tied, nothing to compress",
    "Each shape beside a matrix that is compressed, then a vector alone, then a parameter that two "
    "modules share; five steps each.",
)
def any_shape(adapter: Adapter) -> None:
    failures = []
    for shape in SHAPES:
        failures += _failure(adapter, str(list(shape)), Given(values([shape, (12, 10)])))
    failures += _failure(adapter, "a vector alone", given((7,)))
    tied = nn.Sequential(given((12, 10)), given((12, 10)))
    tied[1].weights = tied[0].weights
    tied.forward = tied[0].forward
    failures += _failure(adapter, "tied", tied)
    require(not failures, "; ".join(failures))


def _failure(adapter: Adapter, what: str, model: nn.Module) -> list[str]:
    before = [p.detach().clone() for p in model.parameters()]
    try:
        loop = adapter.loop(model)
        for step in range(5):
            loop.train(noise(model, step))
        require_finite(model, "in the parameters")
        for p, q in zip(model.parameters(), before, strict=True):
            require(p.numel() == 0 or not torch.equal(p, q), "a parameter did not move")
    except Exception as error:
        short = str(error) if isinstance(error, Missed) else type(error).__name__
        return [f"{what}: {short}"]
    return []


@row(
    "B12",
    "Several dtypes in one optimizer",
    "A matrix and a vector in each of float64, float32, bfloat16, float16; six steps. Several "
    "devices are not probed.",
)
def several_dtypes(adapter: Adapter) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    model = Given([t.to(dtype) for dtype in dtypes for t in values([(12, 10), (7,)])])
    before = [p.detach().clone() for p in model.parameters()]
    loop = adapter.loop(model, lr=0.01)
    for step in range(6):
        loop.train(noise(model, step))
    require_finite(model, "in the parameters")
    for p, q in zip(model.parameters(), before, strict=True):
        require(p.dtype == q.dtype and not torch.equal(p, q), f"one of {q.dtype} did not move")


@row(
    "B16",
    "Parameters on the meta device",
    "An optimizer of them can be made.",
)
def meta_parameters(adapter: Adapter) -> None:
    parameter = nn.Parameter(torch.empty(12, 10, device="meta"))
    adapter.optimizer([parameter], momentum=0.9)
