"""Noise that nobody else can know, and how equal noise of two workers is found."""

import math
import secrets
import ssl
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.wire.collectives import AllGather, Exchange
from efsgd.wire.compare import digest_of

#: So many values are drawn at a time: they stay in a core's cache.
_PIECE = 1 << 15


def secret_uniforms(count: int) -> Tensor:
    """Uniform on the multiples of 2⁻⁵³ above 0 and up to 1, float64 [count], on the CPU.

    They are OpenSSL's, which the operating system seeds: unlike torch's generators, whose state
    can be computed from some of what they draw, it gives away nothing of what else it has drawn.

    Args:
        count: at least 1.

    Example:
        >>> from efsgd.privacy.noise import secret_uniforms
        >>> bool((secret_uniforms(1000) == secret_uniforms(1000)).any())
        False
    """
    words = torch.frombuffer(bytearray(ssl.RAND_bytes(8 * count)), dtype=torch.int64)
    return words.bitwise_and_((1 << 53) - 1).double().add_(1).mul_(2.0**-53)


def secret_normals(count: int) -> Tensor:
    """Independent standard normal values, float64 [count], on the CPU; none is beyond 8.6.

    Source: Box, Muller: "A Note on the Generation of Random Normal Deviates", 1958.
    """
    first, second = secret_uniforms(count + count % 2).view(2, -1)
    radii, angles = first.log_().mul_(-2).sqrt_(), second.mul_(2 * math.pi)
    return torch.cat([radii * angles.cos(), radii * angles.sin()])[:count]


class NoiseSource:
    """Gaussian noise of one worker, on any device.

    `generator` is None for secret noise.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._given = generator

    def add_(self, tensor: Tensor, deviation: float) -> None:
        """Adds noise of this standard deviation, in the tensor's dtype (modified in place)."""
        if deviation > 0:
            tensor.add_(self._drawn(tensor), alpha=deviation)

    def _drawn(self, like: Tensor) -> Tensor:
        kind: Any = {"dtype": like.dtype, "device": like.device}
        if self._given is not None:
            return torch.randn(like.shape, generator=self._given, **kind)
        drawn = torch.empty(like.shape, **kind)
        for piece in drawn.view(-1).split(_PIECE) if drawn.numel() else ():
            piece.copy_(secret_normals(len(piece)))
        return drawn

    def digests(self) -> list[int]:
        """Two numbers, one of which is another worker's where that draws the same noise.

        Of a generator they are digests of what it is about to draw, and of what it drew from its
        seed on. A seed can be found by them, by trying all: on the CPU it has 32 bits.
        """
        if self._given is None:
            return [secrets.randbits(62), secrets.randbits(62)]
        first = torch.Generator(self._given.device).manual_seed(self._given.initial_seed())
        return [stream_digest(self._given), stream_digest(first)]


def stream_digest(generator: torch.Generator) -> int:
    """64 bits, equal where generators are about to draw the same.

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
