"""Workers in lockstep, of which is known what they compress and what they make of it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, Signum
from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.error_feedback import Outcome
from efsgd.algorithms.interfaces import copy_
from efsgd.audit import Observed
from efsgd.engine.plan import Plan
from efsgd.layout import Blocks
from efsgd.testing import lockstep
from efsgd.wire.collectives import Collective, Exchange, intercept
from tests.simulation import copied, parameters_of

#: Matrices whose rows are aligned and not, equal ones apart; more dimensions; a vector, a number,
#: nothing.
SHAPES = [(12, 10), (10,), (40, 24), (12, 10), (6, 4, 3, 3), (), (0, 3), (33, 16)]


class Team:
    """Workers in lockstep.

    Attributes:
        optimizers: of the workers.
        handed_over: by worker the buffers of the last step's collectives, copied.
        deltas: by worker what the last step was to compress: of a `Signum`, the momenta.
        own: by worker and index what workers made of their own messages in the last step.
    """

    def __init__(
        self, make: Callable[[list[Tensor]], Any], world_size: int, parameters: Sequence[Tensor]
    ) -> None:
        self.optimizers = [make(copied(parameters)) for _ in range(world_size)]
        self.handed_over: list[list[Tensor]] = [[] for _ in self.optimizers]
        self.deltas: list[list[Tensor]] = []
        self.own: list[dict[int, Tensor]] = [{} for _ in self.optimizers]

    def keep_reconstructions(self) -> None:
        """Fills `own` from now on."""
        for optimizer, own in zip(self.optimizers, self.own, strict=True):
            optimizer.listen(_Spy(own))

    def step(self, gradients: Sequence[Sequence[Tensor | None]], **options: Any) -> None:
        """One step of all workers."""
        errors = [[error_of(o, p) for p in parameters_of(o)] for o in self.optimizers]
        exchanges = []
        for worker, (optimizer, own) in enumerate(zip(self.optimizers, gradients, strict=True)):
            for parameter, gradient in zip(parameters_of(optimizer), own, strict=True):
                parameter.grad = (
                    None if gradient is None else gradient.to(parameter.dtype, copy=True)
                )
            self.handed_over[worker] = buffers = []
            self.own[worker].clear()

            def note(collective: Collective, buffers: list[Tensor] = buffers) -> None:
                buffers.append(collective.buffer.clone())

            exchange = optimizer.exchange(len(self.optimizers), worker)
            exchanges.append(intercept(exchange, note))
        self.deltas = self._deltas(errors)
        with warnings.catch_warnings():
            for expected in ("All workers have bitwise equal gradients", "Compression saves"):
                warnings.filterwarnings("ignore", expected)
            lockstep(exchanges, **options)
        if isinstance(self.optimizers[0], Signum):
            self.deltas = self._deltas(errors)

    def _deltas(self, errors: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor]]:
        return [
            [self._delta(o, p, e) for p, e in zip(parameters_of(o), own, strict=True)]
            for o, own in zip(self.optimizers, errors, strict=True)
        ]

    @staticmethod
    def _delta(optimizer: Any, parameter: Tensor, error: Tensor | None) -> Tensor:
        momentum: Tensor | None = optimizer.state[parameter].get("local_momentum")
        if momentum is not None:
            return momentum.clone()
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # A copy: averagers write to gradients.
        return gradient.clone() if error is None else error + gradient


class _Spy:
    """Keeps what a worker makes of its own message, as it does in a step, by index."""

    def __init__(self, found: dict[int, Tensor]) -> None:
        self._found = found
        self._known: set[Bucket] = set()

    def __call__(
        self, plan: Plan, bucket: Bucket, step: int, exchange: Exchange[Outcome]
    ) -> Exchange[Outcome]:
        if bucket not in self._known:
            self._known.add(bucket)
            aggregator = bucket.aggregator
            aggregate, placement = aggregator.aggregate, aggregator.placement

            def spy(local: Any) -> Exchange[Any]:
                blocks = Blocks(aggregator.layout, placement.dtype, placement.device)
                local.decompress_with_(copy_, blocks.views)
                self._found.update(blocks.views)
                return aggregate(local)

            aggregator.aggregate = spy  # type: ignore[method-assign]
        return exchange


def error_of(optimizer: Any, parameter: Tensor) -> Tensor | None:
    """A copy of the error memory."""
    error = optimizer.state[parameter].get("error") if parameter in optimizer.state else None
    return None if error is None else error.clone()


def error_feedback(compressor: Any, **options: Any) -> Callable[[list[Tensor]], ErrorFeedbackSGD]:
    """Makes optimizers whose step is x - Δ'."""
    own = {"lr": 1.0, "momentum_form": "sgd", "compressor": compressor, **options}
    return lambda parameters: ErrorFeedbackSGD(parameters, **own)


def normal(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, *seed: int) -> list[Tensor]:
    """Normal tensors that depend on the seed alone."""
    generator = torch.Generator().manual_seed(hash(seed) & 0xFFFFFFFF)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def assert_measured(observed: Observed, delta: Tensor, slack: Sequence[float] = ()) -> None:
    """`measure` of what was compressed gives what was sent, but for rounding.

    `slack` are the largest differences that are meant to be, by value: of codes, half a step.
    """
    candidate = delta.detach().clone().requires_grad_()
    measured = observed.measure(candidate)
    assert len(measured) == len(observed.values)
    sum((value.sum() for value in measured), torch.zeros(())).backward()
    assert candidate.grad is not None and candidate.grad.isfinite().all()
    for n, (found, sent) in enumerate(zip(measured, observed.values, strict=True)):
        assert found.shape == sent.shape
        assert sent.is_floating_point()
        if sent.numel() == 0:
            continue
        if observed.kind == "signs" and n == 0:  # a smooth stand-in for signs: they are the same
            assert torch.equal(found >= 0, sent > 0)
            continue
        # Sums of products of so many numbers, one of whose factors is at most 1.
        is_sum = observed.kind in ("low rank", "triplets", "signs")
        rounding = torch.finfo(sent.dtype).eps * delta.numel() * float(delta.norm()) * is_sum
        allowed = rounding + (slack[n] if slack else 0.0)
        assert float((found.detach() - sent).abs().max()) <= allowed
