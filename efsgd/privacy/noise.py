"""Noise that nobody else can know: generators, and how equal ones are found."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.wire.collectives import AllGather, Exchange
from efsgd.wire.compare import digest_of

# torch's generator on the CPU is a Mersenne Twister: 624 words of 32 bits, from the fourth on.
_WORDS, _FIRST, _STATE_BYTES = 624, 3, 5056


def secret_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that the operating system has seeded.

    A seed would not do on the CPU: of it torch uses 32 bits, which anybody can try one by one
    beside a message. Here all 19,968 bits of the state are random.

    Args:
        device: where the noise is drawn.

    Example:
        >>> from efsgd.privacy.noise import secret_generator
        >>> first, second = secret_generator(), secret_generator()
        >>> torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=second))
        False
    """
    generator = torch.Generator(device).manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    state = generator.get_state()
    if generator.device.type == "cpu" and state.numel() == _STATE_BYTES:
        words = torch.frombuffer(bytearray(os.urandom(4 * _WORDS)), dtype=torch.int32)
        state.view(torch.int64)[_FIRST : _FIRST + _WORDS] = words.to(torch.int64) & 0xFFFFFFFF
        generator.set_state(state)
    return generator


class NoiseSource:
    """Gaussian noise of one worker, on any device.

    `generator` is None for secret ones.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._given = generator
        self._generators: dict[torch.device, torch.Generator] = {}

    def _of(self, device: torch.device) -> torch.Generator:
        if self._given is not None:
            return self._given
        if device not in self._generators:
            self._generators[device] = secret_generator(device)
        return self._generators[device]

    def add_(self, tensor: Tensor, deviation: float) -> None:
        """Adds noise of this standard deviation, in the tensor's dtype (modified in place)."""
        if deviation > 0:
            kind: Any = {"dtype": tensor.dtype, "device": tensor.device}
            drawn = torch.randn(tensor.shape, generator=self._of(tensor.device), **kind)
            tensor.add_(drawn, alpha=deviation)

    def digests(self, device: torch.device) -> list[int]:
        """Of what is about to be drawn, and of what was drawn from the seed on, if it is given."""
        now = self._of(device)
        seeded = None if self._given is None else self._given.initial_seed()
        first = now if seeded is None else torch.Generator(now.device).manual_seed(seeded)
        return [stream_digest(now), stream_digest(first)]


def stream_digest(generator: torch.Generator) -> int:
    """64 bits, equal where generators are about to draw the same, which give away nothing of it.

    The generator does not move on.
    """
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    drawn = torch.randint(1 << 62, (8,), generator=twin, device=generator.device)
    return digest_of(repr(drawn.tolist()).encode())


def require_different(digests: Sequence[int], device: torch.device) -> Exchange[None]:
    """Compares workers' digests. Where two are equal all workers raise ValueError."""
    own = torch.tensor(digests, dtype=torch.int64, device=device)
    gathered = yield AllGather(own, "digests of noise")
    seen: dict[int, int] = {}
    for worker, digests_of_worker in enumerate(gathered.tolist()):
        for digest in set(digests_of_worker):
            if seen.setdefault(digest, worker) != worker:
                raise ValueError(
                    f"Workers {seen[digest]} and {worker} draw the same noise: it cancels in the "
                    f"difference of their messages. Leave out generator, or seed it differently on "
                    f"every worker. Nothing has changed."
                )
