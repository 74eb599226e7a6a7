"""A program of the structure of pytorch/examples' imagenet: DistributedDataParallel and SGD.

Convolutions with BatchNorm, epochs with a sampler and a scheduler, validation on all workers, and
checkpoints of everything that rank 0 writes after each epoch.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import efsgd

CLASSES, EPOCHS, SAVED_AFTER = 5, 3, 1


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(32, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (32,), generator=generator))


def main(folder: Path, init_from: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = DistributedDataParallel(make_model().to(memory_format=torch.channels_last))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    attached = efsgd.attach(model, optimizer, efsgd.PowerSGD(rank=2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    start_epoch = 0
    if init_from == "resume":
        checkpoint = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
        start_epoch = checkpoint["epoch"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    train_sampler: DistributedSampler[TensorDataset] = DistributedSampler(dataset())
    train_loader = DataLoader(dataset(), batch_size=8, sampler=train_sampler)
    for epoch in range(start_epoch, EPOCHS):
        train_sampler.set_epoch(epoch)
        model.train()
        for images, target in train_loader:
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = sum((model(i).argmax(1) == t).sum() for i, t in train_loader)
        dist.all_reduce(correct)
        scheduler.step()
        attached.consolidate()
        if rank == 0 and epoch + 1 == SAVED_AFTER:
            state = {
                "epoch": epoch + 1,
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            torch.save(state, folder / "checkpoint.pth.tar")
    return model, optimizer
