"""Models for the command line."""

import torch
from torch import nn


def module() -> nn.Module:
    """A small one."""
    return nn.Linear(16, 8)


def with_loss() -> object:
    """The same, with a function that returns a loss."""
    model = module()
    return model, lambda: model(torch.ones(2, 16)).sum()


def number() -> object:
    """No module."""
    return 3
