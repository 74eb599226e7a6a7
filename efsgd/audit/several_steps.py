"""What several messages of one worker say together: error feedback gives later what it hid."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from efsgd.audit.observed import Message, Observed


def combine(messages: Sequence[Message], *, error_feedback: bool = True) -> Message:
    """One message that says what the messages of several steps with one gradient say together.

    Where weights and batch stay, each step's message is of a sum that the attacker can follow:
    Δ_t = g + e_(t-1) and e_t = Δ_t - C(Δ_t), so that Δ_t = (t + 1) g - Σ_(s<t) C(Δ_s), and all but
    g was sent. So every step is a further exact measurement of g. And the mean of what was received
    differs from g by exactly e_T / T after T steps, whatever the compressor. Without error feedback
    it stays as wrong as the first message, where that does not change.

    Args:
        messages: of one worker, or averages; of all steps from one before which errors were zero,
            all of them applied.
        error_feedback: whether the worker keeps errors. Without them each Δ_t is g.

    Returns:
        A message of the last step. `values` and `measure` are those of all steps, one after the
        other, `decompressed` is the mean: for each parameter that was always sent. Signs are no
        measurements that a search could follow; of them the mean alone is compared.

    Raises:
        ValueError: no messages, of several workers, or of steps that do not follow each other.

    Source: Karimireddy, Rebjock, Stich, Jaggi, ICML 2019, arXiv:1901.09847, for error feedback; the
    rest is the algebra above.

    Example:
        >>> from efsgd.audit import Message, Observed, combine
        >>> def first_entry(delta):
        ...     return (delta[:1],)
        >>> def message(step, delta):  # only the first entry is ever sent
        ...     sent = torch.stack([delta[0], torch.tensor(0.0)])
        ...     return Message(step, 0, (
        ...         Observed("x", 0, sent.shape, "entries", first_entry(delta), first_entry, sent),
        ...     ))
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> steps = [message(0, gradient), message(1, gradient + torch.tensor([0.0, 4.0]))]
        >>> both = combine(steps).parameters[0]
        >>> both.decompressed, both.measure(gradient) == both.values
        (tensor([3., 0.]), True)
    """
    _require_steps_of_one(messages)
    by_index = [{seen.index: seen for seen in message.parameters} for message in messages]
    always = [index for index in by_index[0] if all(index in step for step in by_index)]
    combined = [_combined([step[index] for step in by_index], error_feedback) for index in always]
    return replace(
        messages[-1],
        parameters=tuple(combined),
        nbytes=sum(message.nbytes for message in messages),
    )


def _combined(steps: Sequence[Observed], error_feedback: bool) -> Observed:
    mean = torch.stack([seen.decompressed for seen in steps]).mean(0)
    if any(seen.kind == "signs" for seen in steps):
        return replace(
            steps[-1], kind="clear", values=(mean,), measure=lambda j: (j,), decompressed=mean
        )
    sent = torch.zeros_like(mean)
    measures: list[Callable[[Tensor], tuple[Tensor, ...]]] = []
    for number, seen in enumerate(steps):
        measures.append(_measure(seen, number + 1, sent) if error_feedback else seen.measure)
        sent = sent + seen.decompressed
    return replace(
        steps[-1],
        values=tuple(value for seen in steps for value in seen.values),
        measure=lambda j: tuple(value for measure in measures for value in measure(j)),
        decompressed=mean,
    )


def _measure(seen: Observed, times: int, sent: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda gradient: seen.measure(times * gradient - sent)


def _require_steps_of_one(messages: Sequence[Message]) -> None:
    found = [message.step for message in messages]
    workers = {message.worker for message in messages}
    is_whole = found == list(range(found[0], found[0] + len(found))) if found else False
    if len(workers) != 1 or not is_whole or not all(message.applied for message in messages):
        raise ValueError(
            f"Invalid messages: of steps {found} and workers {sorted(map(str, workers))}. They "
            "must be of one worker, and of all steps, each applied, in order, from one before "
            "which its errors were zero."
        )
