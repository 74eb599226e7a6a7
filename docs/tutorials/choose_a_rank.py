"""Train with several ranks, and see what each costs and what it leaves behind."""

import copy

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from efsgd import PowerSGDOptimizer

images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

torch.manual_seed(0)
untrained = torch.nn.Sequential(
    torch.nn.Linear(64, 256),
    torch.nn.ReLU(),
    torch.nn.Linear(256, 256),
    torch.nn.ReLU(),
    torch.nn.Linear(256, 10),
)


def train_with(rank):
    model = copy.deepcopy(untrained)
    optimizer = PowerSGDOptimizer(
        model.named_parameters(), lr=0.02, momentum=0.9, rank=rank, momentum_form="sgd"
    )
    torch.manual_seed(0)
    for _ in range(5):
        for batch in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model, optimizer


def steps_behind(model, optimizer):
    """For each compressed layer, what waits to be sent, in gradients of its present length."""
    return {
        name: float(optimizer.state[p]["error"].norm() / p.grad.norm())
        for name, p in model.named_parameters()
        if "error" in optimizer.state[p]
    }


print("rank  bytes per step  test accuracy  steps behind")
for rank in (1, 2, 4, 8):
    model, optimizer = train_with(rank)
    sent = optimizer.communication_stats()["bytes_sent"]
    correct = model(images[test]).argmax(dim=1) == labels[test]
    behind = steps_behind(model, optimizer)
    layers = ", ".join(f"{name} {steps:.1f}" for name, steps in behind.items())
    print(f"{rank:4}  {sent:14}  {100 * correct.float().mean():11.1f} %  {layers}")
