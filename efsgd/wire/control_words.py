"""What workers must tell each other besides gradients, in words that ride with the vectors.

Some things decide whether and where a step is applied, and every worker must decide alike: which
parameters had a gradient anywhere, whether any worker's gradient was not finite, whether any worker
could not take part, and whether all have the same settings. They travel in the buffer of the first
collective, one float for each parameter and one for each worker, so they cost no collective of
their own and the schedule never depends on them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias, TypeVar

import torch
from torch import Tensor

from efsgd.errors import CollectiveError
from efsgd.layout import is_fake, real_view
from efsgd.wire.collectives import Collective, Exchange, InFlight, intercept

T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """What the control words of all workers say together; equal on every worker.

    Attributes:
        absent: indices of parameters for which no worker had a gradient.
        nonfinite: for each worker that met one, the index of its first parameter whose gradient is
            not finite; None where all gradients are finite but a sum or product with them is not.
        overflowed: the mean is not finite although each worker's part is.
        unable: workers that met an error of their own and sent zeros.
        changed: workers that train something else than before, and sent zeros.
        sparse: indices of parameters for which some worker had a sparse gradient.
        is_scaled: some worker's gradients are scaled, for which steps are skipped as a rule.
        differing: workers whose settings are not those of the first that told of its own.
    """

    absent: frozenset[int]
    nonfinite: dict[int, int | None]
    overflowed: bool
    unable: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    sparse: frozenset[int] = frozenset()
    is_scaled: bool = False
    differing: tuple[int, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether the step may be applied."""
        is_whole = not (self.unable or self.changed or self.differing)
        return is_whole and not (self.nonfinite or self.overflowed)

    def with_mean(self, *, is_finite: bool) -> Self:
        """The same, but for a mean that was found not to be finite."""
        return self if is_finite else dataclasses.replace(self, overflowed=True)


#: Why a worker takes part with zeros: it met an error, or trains something else than before.
Abstention: TypeAlias = Literal["unable", "changed"]

# What a worker writes in its own word, after the positions of parameters. Where it has nothing else
# to say it adds to the last of them its settings' digest, times two, and whether they are scaled.
_UNABLE, _CHANGED, _OVERFLOWED, _USUAL = 2, 3, 4, 5

#: Digests are below this: a word is a float32, which is exact below 2**24.
DIGESTS = 1 << 20


class ControlWords:
    """The control words of one worker for the parameters of one bucket, in the order of `indices`.

    Attributes:
        sent: how many collectives the exchange has asked for that they were last attached to.
        in_flight: those of them which it has started and not awaited.
    """

    def __init__(self, indices: Sequence[int], world_size: int, worker: int) -> None:
        self.world_size, self.sent = world_size, 0
        self.in_flight: dict[Collective, InFlight] = {}
        self._indices, self._worker = tuple(indices), worker
        self._all_present = [1.0] * len(self._indices)  # the mean, where all have dense gradients
        self._last: tuple[list[float], Tensor] = ([], torch.empty(0, device="cpu"))

    @staticmethod
    def count(parameters: int, world_size: int) -> int:
        """The number of words: one for each parameter, one for each worker."""
        return parameters + world_size

    def attach_control_words(
        self,
        exchange: Exchange[T],
        words: Tensor,
        gradients: Sequence[Tensor | None],
        record: Callable[[Collective], None],
        *,
        has_overflowed: bool = False,
        is_scaled: bool = False,
        abstains: Abstention | None = None,
        digest: int = 0,
    ) -> Exchange[tuple[T, Verdict]]:
        """Passes on what `exchange` asks for, with the control words in its first buffer.

        A worker whose first buffer is not finite, or which abstains, sends zeros for the whole step
        and says so: NaN never enters another worker's arithmetic, nobody waits for this worker, and
        the schedule stays as it is.

        Args:
            exchange: the collectives of one bucket; its first buffer begins with the words and
                must be finite only if all gradients are.
            words: holds the words' mean once the exchange has returned; may be the head of that
                first buffer.
            gradients: this worker's gradients, in the order of the words.
            record: called with each collective.
            has_overflowed: it is known already that a gradient of this worker is not finite.
            is_scaled: its gradients are those of a scaled loss.
            abstains: why this worker takes part with zeros alone, if it does.
            digest: of this worker's settings; below `DIGESTS`.
        """
        self.sent, is_good, mean_is_finite = 0, abstains is None, True
        is_checked = False

        def outgoing(collective: Collective) -> None:
            nonlocal is_good, is_checked
            buffer, head = collective.buffer, collective.buffer[: len(words)]
            if not self.sent:
                head.zero_()  # what the last step has left there is not this worker's
                is_good = is_good and not has_overflowed and all_finite(buffer)
                is_checked = self.world_size == 1  # the answer is the same buffer
            if not is_good:
                buffer.zero_()
            if not self.sent:
                code = self._code(_USUAL) + 2 * digest + is_scaled
                if abstains is not None:
                    code = self._code(_UNABLE if abstains == "unable" else _CHANGED)
                elif not is_good:
                    code = self._overflow(gradients, is_scaled=is_scaled)
                head.copy_(self._own_words(gradients, code))
            self.sent += 1
            record(collective)

        def incoming(answer: Tensor) -> None:
            nonlocal mean_is_finite, is_checked
            mean_is_finite = mean_is_finite and (is_checked or all_finite(answer))
            is_checked = False

        self.in_flight.clear()
        result = yield from intercept(exchange, outgoing, incoming, self.in_flight)
        is_unread = type(words) is not Tensor and is_fake(words)
        found = self._mean_of_equals() if is_unread else words.tolist()
        return result, self._read(found, overflowed=not mean_is_finite)

    def _own_words(self, gradients: Sequence[Tensor | None], code: int) -> Tensor:
        words = [0.0] * (len(self._indices) + self.world_size)
        for position, gradient in enumerate(gradients):
            if gradient is not None:  # any number of dense ones counts less than one sparse one
                is_dense = gradient.layout == torch.strided
                words[position] = 1.0 if is_dense else 1.0 + self.world_size
        words[len(self._indices) + self._worker] = code
        if words != self._last[0]:  # they are the same in most steps
            self._last = words, torch.tensor(words, dtype=torch.float64, device="cpu")
        return self._last[1]

    def _mean_of_equals(self) -> list[float]:
        """What is found where nothing can be read: all workers are like this one."""
        own, count = self._last[0], len(self._indices)
        code = own[count + self._worker] / self.world_size
        return own[:count] + [code] * self.world_size

    def _code(self, kind: int) -> int:
        """What a worker writes in its word that has something else to say than a position."""
        return len(self._indices) + kind

    def _overflow(self, gradients: Sequence[Tensor | None], *, is_scaled: bool) -> int:
        """1 + the position of the first gradient that is not finite; past the last if none."""
        if is_scaled:
            return self._code(_OVERFLOWED)
        for position, gradient in enumerate(gradients):
            if gradient is not None and not all_finite(real_view(gradient)):
                return 1 + position
        return 1 + len(gradients)

    def _read(self, words: list[float], *, overflowed: bool) -> Verdict:
        told = words[len(self._indices) :]
        if words[: len(self._indices)] == self._all_present and told == told[:1] * len(told):
            rest = round(told[0] * self.world_size) - self._code(_USUAL)
            if rest >= 0 and rest % 2 == 0:  # all tell the same, and nothing else
                return Verdict(frozenset(), {}, overflowed)
        sums = [round(mean * self.world_size) for mean in words]
        # One worker alone wrote each of the last words, so their sums are what it wrote.
        presence, codes = sums[: len(self._indices)], sums[len(self._indices) :]
        unable, changed, overflown = (
            tuple(worker for worker, code in enumerate(codes) if code == self._code(kind))
            for kind in (_UNABLE, _CHANGED, _OVERFLOWED)
        )
        usual = {w: code - self._code(_USUAL) for w, code in enumerate(codes)}
        usual = {worker: rest for worker, rest in usual.items() if rest >= 0}
        digests = [rest // 2 for rest in usual.values()]
        nonfinite = {
            worker: self._indices[code - 1] if code <= len(self._indices) else None
            for worker, code in enumerate(codes)
            if 0 < code < self._code(_UNABLE) or worker in overflown
        }
        counts = dict(zip(self._indices, presence, strict=True))
        return Verdict(
            absent=frozenset(index for index, count in counts.items() if count == 0),
            nonfinite=nonfinite,
            overflowed=overflowed,
            unable=unable,
            changed=changed,
            sparse=frozenset(index for index, n in counts.items() if n > self.world_size),
            is_scaled=bool(overflown) or any(rest % 2 for rest in usual.values()),
            differing=tuple(w for w, rest in usual.items() if rest // 2 != digests[0]),
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite (True for integers).

    Example:
        >>> from efsgd.wire.control_words import all_finite
        >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([0.0, float("nan")]))
        (True, False)
    """
    if not tensor.is_floating_point() or (type(tensor) is not Tensor and is_fake(tensor)):
        return True
    # A sum reads memory once and is finite in all but strange cases; a finite sum has only
    # finite terms, but finite terms may have an infinite sum.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def describe_rejection(verdicts: Sequence[Verdict], names: Mapping[int, str], step: int) -> str:
    """Says which gradient of which worker was not finite, of verdicts not all of which are good."""
    found = []
    for worker, index in (item for verdict in verdicts for item in verdict.nonfinite.items()):
        if index is None:
            found.append(f"on worker {worker} a sum or product with finite gradients overflows")
        else:
            found.append(f"on worker {worker} the gradient of {names[index]} is NaN or infinite")
    if not found:
        found.append(
            "the workers' gradients are finite, but their mean overflows, or what the compressor "
            "makes of it is NaN or infinite, or a worker met an error, which it raises itself"
        )
    return (
        f"Step {step} was abandoned: {'; '.join(found)}. Nothing has changed on any worker. "
        f"Look for the cause (learning rate, loss, data), or pass nonfinite='skip' to leave such "
        f"steps out. Where a GradScaler scales the loss, pass it as scaler."
    )


def raise_unable(verdicts: Iterable[Verdict]) -> None:
    """Raises a CollectiveError if some workers could not take part."""
    if unable := sorted({worker for verdict in verdicts for worker in verdict.unable}):
        numbers = ", ".join(map(str, unable))
        raise CollectiveError(f"could not take part, and say themselves why: worker {numbers}.")


def describe_change(workers: Iterable[int], step: int) -> str:
    """Says that these workers, and not all, have changed what they train."""
    who = ", ".join(map(str, workers))
    return (
        f"Step {step} was abandoned: worker {who} has changed what it trains since the last step, "
        f"and the others have not. Nothing has changed on any worker. Ranks and other settings of "
        f"the compressor, frozen parameters, parameter groups, loaded state_dicts and settings of "
        f"private training must change on all workers before the same step."
    )
