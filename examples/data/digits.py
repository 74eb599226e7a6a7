"""scikit-learn's handwritten digits: 1,797 gray images of 8×8 pixels, bundled with the package."""

from functools import cache

import torch
from sklearn.datasets import load_digits

from examples.data.images import ImageData

TEST_IMAGES = 597


@cache
def load() -> ImageData:
    """Loads the digits; the last 597 are the test set.

    The images stand in the order in which they were collected, so most writers of the test
    set do not occur among the 1,200 training images, and the test is harder than a random
    division would make it.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    return ImageData(
        train_images=images[:-TEST_IMAGES],
        train_labels=labels[:-TEST_IMAGES],
        test_images=images[-TEST_IMAGES:],
        test_labels=labels[-TEST_IMAGES:],
    )
