"""Labeled images: division into batches over workers, and augmentation in plain torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageData:
    """A data set of images, divided into training and test images.

    Attributes:
        train_images: uint8 [images, channels, height, width].
        train_labels: int64 [images].
        test_images: uint8 [images, channels, height, width].
        test_labels: int64 [images].
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def normalize(self, images: Tensor) -> Tensor:
        """Converts uint8 images to float32 of zero mean and unit variance on the training set."""
        mean, deviation = self._moments.to(images.device)
        return (images.float() - mean) / deviation

    @cached_property
    def _moments(self) -> Tensor:
        """Mean and standard deviation per channel, [2, channels, 1, 1]."""
        # Counts of the 256 values are exact, and no float copy of the data set is made.
        values = torch.arange(256, dtype=torch.float64)
        moments = []
        for channel in self.train_images.unbind(1):
            counts = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean = (counts * values).sum()
            moments.append(torch.stack([mean, (counts * (values - mean) ** 2).sum().sqrt()]))
        return torch.stack(moments, dim=1).float()[:, :, None, None]


def steps_per_epoch(images: int, batch_size: int, world_size: int) -> int:
    """Number of full batches each worker gets of this many images; incomplete ones are dropped."""
    steps = images // world_size // batch_size
    if steps == 0:
        raise ValueError(
            f"{images} images over {world_size} workers make {images // world_size} for each, "
            f"which must be at least one batch of {batch_size}: use fewer workers or a smaller "
            "--batch-size"
        )
    return steps


def training_batches(
    data: ImageData, batch_size: int, worker: int, world_size: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's share of an epoch; the workers' shares are disjoint.

    Args:
        data: the data set.
        batch_size: images per batch of one worker.
        worker: number of this worker.
        world_size: number of workers.
        seed: together with `epoch` it determines the order, equally on all workers.
        epoch: number of the epoch, from 0.

    Yields:
        uint8 images [batch_size, channels, height, width] and labels [batch_size].
    """
    steps = steps_per_epoch(len(data.train_labels), batch_size, world_size)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(data.train_labels), generator=generator)
    share = order[worker::world_size][: steps * batch_size]
    for indices in share.split(batch_size):
        yield data.train_images[indices], data.train_labels[indices]


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Moves every image by up to `padding` pixels each way, and mirrors every other one.

    Args:
        images: [batch, channels, height, width]; uncovered pixels become zero.
        padding: largest displacement, in pixels.
        flip: mirror left and right with probability one half.
        generator: source of the displacements, on the CPU.

    Returns:
        Images of the same shape and dtype.
    """
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(batch)[:, None, None, None]
    channel = torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
