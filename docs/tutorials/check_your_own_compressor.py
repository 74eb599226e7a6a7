"""Hold a compressor of one's own against the laws, then train with it."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from your_own_compressor import Sketch

from efsgd import ErrorFeedbackSGD
from efsgd.testing import LAWS, check_compressor


def main():
    # For a start. Without the two arguments it checks more workers, and real processes.
    check_compressor(Sketch(bin_size=4), world_sizes=(1, 2), processes=0)
    print(f"{len(LAWS)} laws hold")

    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 10)
    optimizer = ErrorFeedbackSGD(
        model.parameters(), lr=0.1, momentum_form="sgd", compressor=Sketch(bin_size=4)
    )
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    correct = model(images).argmax(dim=1) == labels
    stats = optimizer.communication_stats()
    print(f"{100 * correct.float().mean():.1f} % of the images are right")
    print(f"a step sends {stats['bytes_sent']} bytes instead of {stats['bytes_uncompressed']}")


if __name__ == "__main__":  # the check starts processes that import this file
    main()
