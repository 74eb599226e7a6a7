"""CIFAR-10 in its own binary version, as distributed in cifar-10-binary.tar.gz."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.data.files import require_files
from examples.data.images import ImageData

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
RECORD_BYTES = 1 + 3 * 32 * 32


def load(directory: Path) -> ImageData:
    """Reads the six files of the binary version.

    Args:
        directory: where data_batch_1.bin to data_batch_5.bin and test_batch.bin lie.

    Raises:
        FileNotFoundError: a file is missing; the message names those expected.
        ValueError: a file is not a whole number of records, or has a label above 9.
    """
    require_files(directory, (*TRAIN_FILES, TEST_FILE), "CIFAR-10's binary version")
    batches = [_read(directory / name) for name in TRAIN_FILES]
    test_images, test_labels = _read(directory / TEST_FILE)
    return ImageData(
        train_images=torch.cat([images for images, _ in batches]),
        train_labels=torch.cat([labels for _, labels in batches]),
        test_images=test_images,
        test_labels=test_labels,
    )


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [records, 3, 32, 32] and labels int64 [records] of one file."""
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % RECORD_BYTES != 0:
        raise ValueError(
            f"{path} has {content.size} bytes, which must be a positive multiple of "
            f"{RECORD_BYTES} (one byte of label, 3×32×32 of image): is it the binary version of "
            "CIFAR-10, completely unpacked?"
        )
    records = torch.from_numpy(content.reshape(-1, RECORD_BYTES))
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise ValueError(
            f"{path} has a label {int(labels.max())}, but those of CIFAR-10 are 0 to 9: is it a "
            "file of CIFAR-100?"
        )
    return records[:, 1:].reshape(-1, 3, 32, 32), labels
