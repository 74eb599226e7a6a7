"""A compressor of one's own: the mean of each of many random bins, with random signs."""

from dataclasses import dataclass

import torch

from efsgd import Claims, Field, TensorCompressor


@dataclass(frozen=True)
class Sketch(TensorCompressor):
    """Sends one number in place of `bin_size` numbers: their mean, with random signs."""

    bin_size: int = 32
    seed: int = 0
    averages = True  # it is linear: the sketch of a mean is the mean of the sketches

    def __post_init__(self):
        if not isinstance(self.bin_size, int) or self.bin_size < 1:
            raise ValueError(f"Invalid bin_size: {self.bin_size!r}. Must be an integer from 1 on.")

    def claims(self):
        share = 1 / self.bin_size
        return Claims(averages=True, is_random=True, contraction=lambda shape: share, linear=True)

    def compresses(self, shape):
        return len(shape) > 1  # biases and norms go as they are

    def fields(self, shape):
        return [Field(-(-shape.numel() // self.bin_size))]  # rounded up

    def compress(self, delta, draws):
        bins, signs = self._draw(delta, draws)
        means = delta.new_zeros(self.fields(delta.shape)[0].count)
        return [means.scatter_reduce(0, bins, signs * delta.view(-1), "mean", include_self=False)]

    def decompress(self, payload, shape, draws):
        bins, signs = self._draw(payload[0].new_empty(shape), draws)
        return (signs * payload[0][bins]).view(shape)

    def _draw(self, like, draws):
        generator = draws.shared()  # the same on every worker, and for both of the above
        bins = torch.randperm(like.numel(), generator=generator) // self.bin_size
        signs = torch.randint(2, (like.numel(),), generator=generator) * 2 - 1
        return bins.to(like.device), signs.to(like)
