"""The parameters of the machine, and their gradients."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tests.promises.reference import Hyperparameters, Reference
from tests.strategies import gaussian

SHAPES = [(6, 5), (4,), (6, 5), (5, 2, 4), (3, 9)]


@dataclass
class Slot:
    """A parameter on all workers. The reference knows it by its number, wherever it stands."""

    number: int
    parameters: list[Tensor]
    is_known: bool = True  # whether optimizers have kept what they learned of it
    is_sparse: bool = False  # whether all workers know that it has sparse gradients
    may_be_sparse: bool = False  # whether some worker had one, if in a step that was refused

    @classmethod
    def make(cls, number: int, world_size: int) -> Self:
        """A new one."""
        value = gaussian(SHAPES[number % len(SHAPES)], 1000 + number)
        return cls(number, [value.clone().requires_grad_() for _ in range(world_size)])

    @property
    def shape(self) -> torch.Size:
        return self.parameters[0].shape

    def add_to(self, reference: Reference) -> None:
        """The next parameter of the reference is this one."""
        reference.shapes.append(tuple(self.shape))
        reference.hyperparameters.append(Hyperparameters(momentum_form="sgd"))
        reference.parameters.append(self.parameters[0].detach().clone())
        for tensors in (reference.momenta, reference.last_updates):
            tensors.append(torch.zeros(self.shape, dtype=torch.float64))
        for each in (*reference.errors, *reference.deltas):
            each.append(torch.zeros(self.shape, dtype=torch.float64))
        reference.has_momentum.append(False)
        reference.queries.append(None)

    def forget(self, reference: Reference) -> None:
        """The reference knows no more of it than its values."""
        number = self.number
        reference.momenta[number] = torch.zeros(self.shape, dtype=torch.float64)
        reference.has_momentum[number], reference.queries[number] = False, None
        for errors in reference.errors:
            errors[number] = torch.zeros(self.shape, dtype=torch.float64)


def sparse(gradient: Tensor) -> Tensor:
    """The same in sparse form, with each row twice."""
    rows = torch.arange(len(gradient)).repeat(2)[None]
    values = torch.cat([gradient / 4, gradient * 0.75])
    return torch.sparse_coo_tensor(rows, values, gradient.shape, check_invariants=True)


def give_gradients(
    slots: Sequence[Slot], seed: int, joined: Collection[int]
) -> list[list[Tensor | None]]:
    """Each worker's for each parameter: some are missing, some are zero, some are sparse.

    Of a parameter they are never zero on all workers: what is left of errors then has a low rank,
    and columns that are rounding have other directions in the reference. Workers that have joined
    have none.
    """
    draw, world_size = random.Random(seed), len(slots[0].parameters)
    made: list[list[Tensor | None]] = [[] for _ in range(world_size)]
    for slot in slots:
        is_missing, is_sparse = draw.randrange(6) == 0, draw.randrange(16) == 0
        whole = draw.choice([worker for worker in range(world_size) if worker not in joined])
        slot.may_be_sparse |= is_sparse
        for worker, own in enumerate(made):
            kind = 2 if worker == whole else draw.randrange(4)
            gradient = gaussian(slot.shape, 97 * seed + 13 * worker + slot.number) * (kind != 1)
            if is_sparse and draw.randrange(2):
                gradient = sparse(gradient)
            own.append(None if is_missing or kind == 0 or worker in joined else gradient)
            slot.parameters[worker].grad = own[-1]
    return made
