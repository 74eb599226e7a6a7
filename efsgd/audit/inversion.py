"""Gradient inversion: inputs whose gradient fits what a worker has sent."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efsgd.audit.attacks import Attack
from efsgd.audit.labels import infer_labels
from efsgd.audit.objective import Bounds, FrozenModel, Loss, Objective
from efsgd.audit.observed import Message

#: Between two looks at the clock.
_ITERATIONS_AT_ONCE = 10
#: An iteration of L-BFGS has as many evaluations on average, or counts as several.
_EVALUATIONS = 2
_DECAY_AT, _DECAY = (3 / 8, 5 / 8, 7 / 8), 0.1
#: A start that comes as near as this is not followed by another.
_FOUND = {torch.float32: 1e-9, torch.float64: 1e-20}


@dataclass(frozen=True)
class Inversion:
    """What an attack found.

    Attributes:
        inputs: of the model, [samples, ...], within the bounds; in no particular order.
        labels: known, inferred from the last layer's biases, or found along with the inputs: int64
            [samples].
        distance: what the attack made small, at the best of its starts. It is known to an attacker,
            and says nothing across attacks.
        distances: at the end of each start; infinite where it overflowed.
        iterations: of all starts together.
        seconds: that it took.
        is_complete: False where the time was over before the iterations were.
    """

    inputs: Tensor
    labels: Tensor
    distance: float
    distances: tuple[float, ...]
    iterations: int
    seconds: float
    is_complete: bool


def invert(
    message: Message,
    model: nn.Module,
    input_shape: Sequence[int],
    labels: Tensor | None = None,
    *,
    loss: Loss = cross_entropy,
    attack: Attack = Attack(),  # noqa: B008 (immutable)
    parameters: Sequence[Tensor] | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    seconds: float = math.inf,
    show_progress: bool = False,
) -> Inversion:
    """Looks for inputs whose gradient fits a message, from several random starts.

    The result is the same for the same seed, unless the time limit ends it. What is not found here
    may be found by a better attack: that an attack fails shows nothing.

    Args:
        message: of one worker and step, or what `combine` makes of several.
        model: with the weights that it had when the gradient was computed, so from before the
            step; `copy.deepcopy` it there. In the same mode, without dropout. It is not modified.
        input_shape: of all inputs together, [samples, ...].
        labels: where the attacker knows them, [samples] as `loss` takes them. None infers them from
            the last parameter, if that is a vector of biases, or else looks for probabilities along
            with the inputs, which `loss` must take then.
        loss: of outputs and labels, a scalar.
        attack: what is compared, and how it is searched.
        parameters: the model's, in the order of the optimizer. By default
            `model.parameters()` that require gradients.
        bounds: the least and the largest value of inputs. Starts are uniform between them. None: no
            bounds, and normal starts.
        seed: of the starts.
        seconds: after which the search ends with what it has.
        show_progress: whether a bar is shown; needs the package rich.

    Returns:
        The inputs, with the distance that the attack could see.

    Raises:
        ValueError: the message is not of this model, or a shape cannot be.

    Example:
        >>> import torch
        >>> from efsgd.audit import Message, Observed, invert
        >>> model, x = torch.nn.Linear(4, 3), torch.tensor([[0.1, 0.9, 0.3, 0.6]])
        >>> loss, y = torch.nn.functional.cross_entropy, torch.tensor([2])
        >>> gradients = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        >>> message = Message(0, 0, tuple(
        ...     Observed(str(i), i, g.shape, "clear", (g,), lambda j: (j,), g)
        ...     for i, g in enumerate(gradients)
        ... ))
        >>> found = invert(message, model, x.shape)
        >>> found.labels.item(), [round(value, 2) for value in found.inputs[0].tolist()]
        (2, [0.1, 0.9, 0.3, 0.6])
    """
    started = time.monotonic()
    _require_samples(input_shape, labels)
    frozen = FrozenModel(model, loss, parameters)
    frozen.require_fits(message)
    objective = Objective(message, frozen, attack, bounds)
    generator = torch.Generator().manual_seed(seed)
    total = attack.restarts * attack.iterations
    best: tuple[Tensor, Tensor] | None = None
    distances: list[float] = []
    iterations, is_complete = 0, True
    with _progress(total, show_progress) as report:
        for _ in range(attack.restarts):
            inputs = _start(input_shape, frozen, bounds, generator)
            known = labels if labels is not None else infer_labels(message, frozen, inputs)
            search = _Search(objective, attack, inputs, known, bounds, frozen)
            while not search.is_done and time.monotonic() - started < seconds:
                iterations += search.advance()
                report(iterations)
            distance, found = search.result()
            if best is None or distance < min(distances):
                best = found
            distances.append(distance)
            is_complete = search.is_done
            if not is_complete or distance < _FOUND.get(inputs.dtype, 0.0):
                break
    assert best is not None  # there is at least one start
    spent = time.monotonic() - started
    return Inversion(*best, min(distances), tuple(distances), iterations, spent, is_complete)


class _Search:
    """One start, on its way."""

    def __init__(
        self,
        objective: Objective,
        attack: Attack,
        inputs: Tensor,
        labels: Tensor | None,
        bounds: Bounds,
        model: FrozenModel,
    ) -> None:
        self._objective, self._attack, self._bounds = objective, attack, bounds
        self._inputs, self._labels = inputs.requires_grad_(), labels
        self._logits: Tensor | None = None
        variables = [self._inputs]
        if labels is None:
            with torch.no_grad():
                self._logits = torch.zeros_like(model(inputs)).requires_grad_()
            variables.append(self._logits)
        self._done, self.is_done = 0, False
        self._optimizer: torch.optim.Optimizer
        if attack.search == "adam":
            self._optimizer = torch.optim.Adam(variables, lr=attack.lr)
            self._best = math.inf, self._found()
        else:
            self._optimizer = torch.optim.LBFGS(
                variables,
                lr=attack.lr,
                history_size=30,
                line_search_fn="strong_wolfe",
                tolerance_grad=1e-12,
                tolerance_change=1e-14,
            )

    def advance(self) -> int:
        """Some iterations; returns how many."""
        count = min(_ITERATIONS_AT_ONCE, self._attack.iterations - self._done)
        done = self._adam(count) if self._attack.search == "adam" else self._lbfgs(count)
        self._done += done
        self.is_done = self.is_done or self._done >= self._attack.iterations
        return done

    def result(self) -> tuple[float, tuple[Tensor, Tensor]]:
        """The distance, infinite where it overflowed, and inputs with their labels."""
        if self._attack.search == "adam":
            return self._best
        distance = float(self._value().detach())
        is_finite = math.isfinite(distance) and bool(self._inputs.isfinite().all())
        return distance if is_finite else math.inf, self._found()

    def _value(self) -> Tensor:
        labels = self._labels if self._logits is None else self._logits.softmax(1)
        assert labels is not None  # one of the two is there
        return self._objective(self._inputs, labels)

    def _found(self) -> tuple[Tensor, Tensor]:
        inputs = self._inputs.detach().nan_to_num().clone()
        if self._bounds is not None:
            inputs = inputs.clamp(*self._bounds)
        labels = self._labels if self._logits is None else self._logits.detach().argmax(1)
        assert labels is not None
        return inputs, labels

    def _lbfgs(self, count: int) -> int:
        group = self._optimizer.param_groups[0]
        group["max_iter"], group["max_eval"] = count, _EVALUATIONS * count
        before, evaluations = self._counted(), 0

        def closure() -> float:
            nonlocal evaluations
            evaluations += 1
            self._optimizer.zero_grad()
            value = self._value()
            value.backward()
            return float(value.detach())

        self._optimizer.step(closure)
        done = self._counted() - before
        # It stops early where nothing changes any more, or where it has overflowed.
        self.is_done = done < count and evaluations < _EVALUATIONS * count
        return max(done, math.ceil(evaluations / _EVALUATIONS))

    def _counted(self) -> int:
        state = self._optimizer.state[self._inputs]
        return int(state.get("n_iter", 0))

    def _adam(self, count: int) -> int:
        for step in range(self._done, self._done + count):
            passed = sum(step >= part * self._attack.iterations for part in _DECAY_AT)
            self._optimizer.param_groups[0]["lr"] = self._attack.lr * _DECAY**passed
            self._optimizer.zero_grad()
            value = self._value()
            value.backward()
            if float(value.detach()) < self._best[0]:
                self._best = float(value.detach()), self._found()
            assert self._inputs.grad is not None
            self._inputs.grad.sign_()
            self._optimizer.step()
            with torch.no_grad():
                if self._bounds is not None:
                    self._inputs.clamp_(*self._bounds)
        return count


def _start(
    shape: Sequence[int], model: FrozenModel, bounds: Bounds, generator: torch.Generator
) -> Tensor:
    # Drawn on the CPU: the same on every device.
    like = model.parameters[0]
    if bounds is None:
        values = torch.randn(*shape, generator=generator)
    else:
        low, high = bounds
        values = low + (high - low) * torch.rand(*shape, generator=generator)
    return values.to(like)


def _require_samples(shape: Sequence[int], labels: Tensor | None) -> None:
    if not shape or min(shape) < 1 or (labels is not None and len(labels) != shape[0]):
        count = "" if labels is None else f" with {len(labels)} labels"
        raise ValueError(
            f"Invalid input_shape: {list(shape)}{count}. It must be [samples, ...], without zeros, "
            "with a label for each sample. Give the shape of the whole batch."
        )


@contextmanager
def _progress(total: int, is_shown: bool) -> Iterator[Callable[[int], object]]:
    """A bar that is told how many iterations are done."""
    if not is_shown:
        yield lambda iterations: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("inversion", total=total)
        yield lambda iterations: bar.update(task, completed=iterations)
