"""What is compared: this package, SGD, and other implementations of PowerSGD, ready to step."""

import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import Runner
from benchmarks.workloads import FixedGradients, matrices_of
from efsgd import PowerSGDOptimizer
from efsgd.algorithms.powersgd import orthogonalize

SGD_SETTINGS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True}
# With several buckets the hook deadlocks under gloo, so there is only one.
ONE_BUCKET_MB = 100_000
# From the third step on DDP does not rebuild its buckets any more, and the hook may compress.
HOOK_STARTS_AT = 2


@dataclass(frozen=True)
class Candidate:
    """What is measured, as it stands in the results.

    Attributes:
        kind: what it is, see `Bench`.
        rank: of the compression.
        form: of the momentum, for `efsgd`.
        compiled: with `compile=True`, for `efsgd`.
        nbytes: of the buffers, for `all-reduce`: they are reduced one after the other.
    """

    kind: str
    rank: int | None = None
    form: str | None = None
    compiled: bool = False
    nbytes: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The candidate of which `fields` are the attributes, read from JSON."""
        return cls(**{**fields, "nbytes": tuple(fields["nbytes"])})

    @property
    def name(self) -> str:
        """Unique among candidates."""
        details = [
            "" if self.rank is None else f"rank {self.rank}",
            "" if self.form is None else f"form {self.form}",
            "compiled" if self.compiled else "",
            " + ".join(map(str, self.nbytes)) + " bytes" if self.nbytes else "",
        ]
        return ", ".join([self.kind, *filter(None, details)])

    @property
    def footprint(self) -> int:
        """About how many times the memory of the parameters it keeps between steps."""
        kept = {"floor": 0, "all-reduce": 0, "copy": 2, "efsgd": 3, "ddp-sgd": 4}
        kept |= {"hook": 5, "hook-batched": 5, "epfml": 4}
        return kept.get(self.kind, 1)


def knows_compile() -> bool:
    """Whether this version of efsgd has the argument `compile`."""
    return "compile" in inspect.signature(PowerSGDOptimizer).parameters


def compared(
    ranks: Sequence[int], kinds: Sequence[str] | None, *, compiled: bool, epfml: bool
) -> list[Candidate]:
    """Candidates besides SGD.

    Args:
        ranks: of the compression.
        kinds: of the candidates; None is all.
        compiled: efsgd with `compile=True`, too.
        epfml: whether a clone of epfml/powersgd is there.
    """
    listed: list[Candidate] = []
    for rank in ranks:
        for kind in kinds or ["efsgd", "hook-batched", "hook", "epfml"]:
            if kind == "efsgd":
                for ahead in (False, True)[: 1 + compiled]:
                    listed += [Candidate(kind, rank, form, ahead) for form in ("sgd", "paper")]
            elif kind != "epfml" or epfml:
                listed.append(Candidate(kind, rank))
    return listed


def left_out(*, compiled: bool, epfml: bool) -> list[str]:
    """What a run does not compare though it was asked for, and why.

    Args:
        compiled: efsgd with `compile=True` is asked for.
        epfml: whether a clone of epfml/powersgd is there.
    """
    reasons = []
    if not epfml:
        reasons.append("epfml: its package on PyPI is empty; give a clone with --epfml.")
    if compiled and not knows_compile():
        reasons.append("efsgd, compiled: this version has no argument `compile`.")
    return reasons


def use_epfml(clone: Path | None) -> None:
    """Makes `import powersgd` find the clone of github.com/epfml/powersgd.

    Args:
        clone: a directory; None changes nothing.

    Raises:
        FileNotFoundError: there is no such package.
    """
    if clone is None:
        return
    if not (clone / "powersgd" / "__init__.py").is_file():
        raise FileNotFoundError(
            f"{clone} holds no package `powersgd`. Give the directory of a clone: "
            f"git clone https://github.com/epfml/powersgd"
        )
    sys.path.insert(0, str(clone))


class Bench:
    """Makes candidates that are stepped with the same gradients.

    Candidates that leave gradients as they are share one module, and so its memory.

    Args:
        gradients: by parameter.
        device: where to step.

    Attributes:
        optimizers: of this package, by name of the candidate.
    """

    def __init__(self, gradients: Sequence[Tensor], device: torch.device | str = "cpu") -> None:
        self.gradients, self.device = gradients, torch.device(device)
        self.optimizers: dict[str, PowerSGDOptimizer] = {}
        self._makers: dict[str, Callable[[Candidate, FixedGradients], Runner]] = {
            "floor": lambda _, module: _whole_step(module, module),
            "copy": self._copy,
            "all-reduce": self._all_reduce,
            "orthogonalization": self._orthogonalization,
            "sgd-foreach": self._sgd,
            "sgd-loop": self._sgd,
            "sgd-fused": self._sgd,
            "ddp-sgd": lambda _, module: _under_ddp(module, DistributedDataParallel(module)),
            "hook": _hook,
            "hook-batched": _hook,
            "epfml": _epfml,
            "efsgd": self._efsgd,
        }

    @cached_property
    def _shared(self) -> FixedGradients:
        return FixedGradients(self.gradients, device=self.device)

    def module(self, candidate: Candidate) -> FixedGradients:
        """The parameters for a candidate to step: its own where it needs that, else shared ones."""
        if candidate.kind in ("ddp-sgd", "hook", "hook-batched", "epfml"):
            accumulates = candidate.kind == "epfml"  # it keeps its error in `p.grad`
            return FixedGradients(self.gradients, accumulates=accumulates, device=self.device)
        return self._shared

    def runner(self, candidate: Candidate, module: FixedGradients | None = None) -> Runner:
        """One step of a candidate: backward, exchange and update.

        Args:
            candidate: what to make.
            module: of `Bench.module`; None makes it.
        """
        chosen = self.module(candidate) if module is None else module
        return self._makers[candidate.kind](candidate, chosen)

    def _copy(self, _: Candidate, __: FixedGradients) -> Runner:
        """A copy of as many bytes as the parameters have: what any pass over them costs."""
        source = torch.cat([gradient.flatten() for gradient in self.gradients]).to(self.device)
        target = torch.empty_like(source)
        return Runner(lambda: target.copy_(source))

    def _all_reduce(self, candidate: Candidate, _: FixedGradients) -> Runner:
        buffers = [torch.zeros(n // 4, device=self.device) for n in candidate.nbytes]
        return Runner(lambda: [dist.all_reduce(buffer) for buffer in buffers])

    def _orthogonalization(self, candidate: Candidate, _: FixedGradients) -> Runner:
        """Of all P of a step, in the batches in which efsgd has them."""
        assert candidate.rank is not None
        heights = Counter(
            (n, m) for n, m in matrices_of([g.shape for g in self.gradients], candidate.rank)
        )
        batches = [
            torch.randn(count, n, min(n, m, candidate.rank), device=self.device)
            for (n, m), count in heights.items()
        ]
        return Runner(lambda: [orthogonalize(P) for P in batches])

    def _sgd(self, candidate: Candidate, module: FixedGradients) -> Runner:
        implementation = {
            "sgd-foreach": {"foreach": True},
            "sgd-loop": {"foreach": False},
            "sgd-fused": {"fused": True},
        }[candidate.kind]
        optimizer = torch.optim.SGD(module.parameters(), **SGD_SETTINGS, **implementation)
        return _whole_step(module, module, optimizer.step)

    def _efsgd(self, candidate: Candidate, module: FixedGradients) -> Runner:
        assert candidate.rank is not None and candidate.form is not None
        settings = {**SGD_SETTINGS, "nesterov": candidate.form == "sgd"}
        if candidate.compiled:
            settings["compile"] = True
        optimizer = PowerSGDOptimizer(
            module.parameters(), **settings, rank=candidate.rank, momentum_form=candidate.form
        )
        self.optimizers[candidate.name] = optimizer
        return _whole_step(module, module, optimizer.step)


def _hook(candidate: Candidate, module: FixedGradients) -> Runner:
    assert candidate.rank is not None
    wrapped = DistributedDataParallel(module, bucket_cap_mb=ONE_BUCKET_MB)
    state = powerSGD_hook.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=candidate.rank,
        start_powerSGD_iter=HOOK_STARTS_AT,
        min_compression_rate=1,  # compresses the same tensors as efsgd
        batch_tensors_with_same_shape=candidate.kind == "hook-batched",
    )
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return _under_ddp(module, wrapped)


def _under_ddp(module: FixedGradients, wrapped: DistributedDataParallel) -> Runner:
    optimizer = torch.optim.SGD(wrapped.parameters(), **SGD_SETTINGS, foreach=True)
    return _whole_step(module, wrapped, optimizer.step)


def _epfml(candidate: Candidate, module: FixedGradients) -> Runner:
    powersgd = importlib.import_module("powersgd")
    parameters = list(module.parameters())
    config = powersgd.Config(
        rank=candidate.rank,
        min_compression_rate=1,
        num_iters_per_step=2,  # both factors in each step, as in the paper
        start_compressing_after_num_steps=0,
    )
    aggregator = powersgd.PowerSGD(parameters, config=config)
    optimizer = torch.optim.SGD(parameters, **SGD_SETTINGS, foreach=True)
    return _whole_step(module, module, lambda: powersgd.optimizer_step(optimizer, aggregator))


def _whole_step(
    module: FixedGradients,
    wrapped: torch.nn.Module,
    update: Callable[[], object] = lambda: None,
) -> Runner:
    def step() -> None:
        wrapped().backward()
        update()

    return Runner(step, module.prepare)
