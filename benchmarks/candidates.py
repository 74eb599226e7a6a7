"""What is compared: this package, SGD, and other implementations of PowerSGD, ready to step."""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import Runner
from benchmarks.workloads import FixedGradients
from efsgd import PowerSGDOptimizer

__all__ = ["Bench", "Candidate", "compared", "knows_compile", "left_out", "use_epfml"]

SGD_SETTINGS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True}
# With several buckets the hook deadlocks under gloo, so there is only one.
ONE_BUCKET_MB = 100_000
# From the third step on DDP does not rebuild its buckets any more, and the hook may compress.
HOOK_STARTS_AT = 2


@dataclass(frozen=True)
class Candidate:
    """What is measured, as it stands in the results.

    Attributes:
        kind: a key of `Bench.makers`.
        rank: of the compression.
        form: of the momentum, for `efsgd`.
        compiled: with `compile=True`, for `efsgd`.
        nbytes: of the buffer, for `all-reduce`.
    """

    kind: str
    rank: int | None = None
    form: str | None = None
    compiled: bool = False
    nbytes: int | None = None

    @property
    def name(self) -> str:
        """Unique among candidates."""
        details = [
            "" if self.rank is None else f"rank {self.rank}",
            "" if self.form is None else f"form {self.form}",
            "compiled" if self.compiled else "",
            "" if self.nbytes is None else f"{self.nbytes} bytes",
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

    Candidates that do not change gradients share one module, and so its memory.

    Args:
        gradients: by parameter.
        device: where to step.
    """

    def __init__(self, gradients: Sequence[Tensor], device: torch.device | str = "cpu") -> None:
        self.gradients, self.device = gradients, torch.device(device)
        self.plain = FixedGradients(gradients, device=device)
        self.optimizers: dict[str, PowerSGDOptimizer] = {}
        self.makers: dict[str, Callable[[Candidate], Runner]] = {
            "floor": lambda _: _whole_step(self.plain, self.plain),
            "copy": lambda _: self._copy(),
            "all-reduce": self._all_reduce,
            "sgd-foreach": lambda _: self._sgd(foreach=True),
            "sgd-loop": lambda _: self._sgd(foreach=False),
            "sgd-fused": lambda _: self._sgd(fused=True),
            "ddp-sgd": lambda _: self._ddp(),
            "hook": self._hook,
            "hook-batched": self._hook,
            "epfml": self._epfml,
            "efsgd": self._efsgd,
        }

    def runner(self, candidate: Candidate) -> Runner:
        """One step of a candidate: backward, exchange and update."""
        return self.makers[candidate.kind](candidate)

    def _copy(self) -> Runner:
        """A copy of as many bytes as the parameters have: what any pass over them costs."""
        source = torch.cat([gradient.flatten() for gradient in self.gradients]).to(self.device)
        target = torch.empty_like(source)
        return Runner(lambda: target.copy_(source))

    def _all_reduce(self, candidate: Candidate) -> Runner:
        assert candidate.nbytes is not None
        buffer = torch.zeros(candidate.nbytes // 4, device=self.device)
        return Runner(lambda: dist.all_reduce(buffer))

    def _sgd(self, **implementation: bool) -> Runner:
        optimizer = torch.optim.SGD(self.plain.parameters(), **SGD_SETTINGS, **implementation)
        return _whole_step(self.plain, self.plain, optimizer.step)

    def _ddp(self) -> Runner:
        module = FixedGradients(self.gradients, device=self.device)
        return self._under_ddp(module, DistributedDataParallel(module))

    def _hook(self, candidate: Candidate) -> Runner:
        assert candidate.rank is not None
        module = FixedGradients(self.gradients, device=self.device)
        wrapped = DistributedDataParallel(module, bucket_cap_mb=ONE_BUCKET_MB)
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=candidate.rank,
            start_powerSGD_iter=HOOK_STARTS_AT,
            min_compression_rate=1,  # compresses the same tensors as efsgd
            batch_tensors_with_same_shape=candidate.kind == "hook-batched",
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return self._under_ddp(module, wrapped)

    def _under_ddp(self, module: FixedGradients, wrapped: DistributedDataParallel) -> Runner:
        optimizer = torch.optim.SGD(wrapped.parameters(), **SGD_SETTINGS, foreach=True)
        return _whole_step(module, wrapped, optimizer.step)

    def _epfml(self, candidate: Candidate) -> Runner:
        powersgd = importlib.import_module("powersgd")
        module = FixedGradients(self.gradients, accumulates=True, device=self.device)
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

    def _efsgd(self, candidate: Candidate) -> Runner:
        assert candidate.rank is not None and candidate.form is not None
        settings = {**SGD_SETTINGS, "nesterov": candidate.form == "sgd"}
        if candidate.compiled:
            settings["compile"] = True
        optimizer = PowerSGDOptimizer(
            self.plain.parameters(), **settings, rank=candidate.rank, momentum_form=candidate.form
        )
        self.optimizers[candidate.name] = optimizer
        return _whole_step(self.plain, self.plain, optimizer.step)


def _whole_step(
    module: FixedGradients,
    wrapped: torch.nn.Module,
    update: Callable[[], object] = lambda: None,
) -> Runner:
    def step() -> None:
        wrapped().backward()
        update()

    return Runner(step, module.prepare)
