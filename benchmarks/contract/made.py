"""Made-up models and gradients, and questions about them, for the probes."""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.contract.questions import require

#: Seconds that a collective is waited for.
PATIENCE = 10


class Given(nn.Module):
    """Parameters whose gradients are given: those of its output are the tensors of its input.

    Args:
        tensors: values of the parameters; integers have no gradient.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            [nn.Parameter(t, t.is_floating_point() or t.is_complex()) for t in tensors]
        )

    def forward(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """A scalar; a parameter whose gradient is None has no part in it."""
        parts = [
            (weight * gradient.conj()).sum().real.double()
            for weight, gradient in zip(self.weights, gradients, strict=True)
            if gradient is not None
        ]
        return torch.stack(parts).sum()


def worker() -> int:
    """The number of this process among the workers."""
    return int(os.environ.get("RANK", "0"))


def join() -> None:
    """Makes the default process group of the workers of this probe."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['CONTRACT_STORE']}",
        rank=worker(),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=PATIENCE),
    )


def values(
    shapes: Sequence[Sequence[int]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Tensors of these shapes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator, dtype=dtype) for shape in shapes]


def given(*shapes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Given:
    """A module with parameters of these shapes: by default two matrices and a vector."""
    return Given(values(shapes or ((12, 10), (9, 14), (7,)), seed, dtype))


def noise(model: nn.Module, step: int, part: int = 0) -> list[Tensor | None]:
    """Gradients for one step of one worker; `part` tells workers and micro-batches apart."""
    generator = torch.Generator().manual_seed(1 + 1000 * step + part)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if p.requires_grad
        else None
        for p in model.parameters()
    ]


def same(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> bool:
    """Whether two models have the same parameters, but for a tolerance relative to the largest."""
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        if tolerance == 0:
            if not torch.equal(p, q):
                return False
        elif float((p - q).abs().max()) > tolerance * max(1.0, float(q.abs().max())):
            return False
    return True


def require_finite(model: nn.Module, when: str) -> None:
    """Parameters must be finite."""
    require(all(bool(p.isfinite().all()) for p in model.parameters()), f"NaN {when}")


def require_equal_workers(model: nn.Module, when: str) -> None:
    """All workers must have the same parameters, bit by bit."""
    own = torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    difference = max(float((other - gathered[0]).abs().max()) for other in gathered)
    equal = all(torch.equal(other, gathered[0]) for other in gathered)
    require(equal, f"the workers' parameters differ by {difference:.1g} {when}")
