"""Algorithms 1 and 2 of the PowerSGD paper (arXiv 1905.13727), as naively as they can be written.

This file is the measure of the package, so it shares no code with it and is never optimised:
float64, one matrix and one worker at a time, nothing in place. Read it beside the paper:

    paper    here                         paper        here
    g_w      gradients[w][i]              M_w          one matrix of Delta_w
    e_w      errors[w][i]                 Q            query
    Delta_w  deltas[w]                    P, P_hat     p, p_hat
    Delta'   update, last_updates[i]      n, m, r      rows, columns, rank
    m        momenta[i]                   gamma        lr
    x        parameters[i]                lambda       momentum

What the paper leaves open is decided in `Reference`'s docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A column that keeps less than this part of its norm has nothing left but rounding: an operation in
# float64 is exact to 2e-16, and the sums here are short.
DEPENDENT = 1e-12


@dataclass
class Hyperparameters:
    """Of one parameter. May be changed between steps (a learning-rate schedule, say)."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    rank: int = 4
    min_compression_rate: float = 1.0
    momentum_form: str = "paper"
    warm_start: bool = True
    error_feedback: bool = True
    start_compressing_at: int = 0


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """ALL REDUCE MEAN: one tensor of each worker in, their mean out."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total = total + tensor
    return total / len(tensors)


def reject(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """`vector` without its part in the span of the orthonormal `basis`.

    That part is taken away twice: what rounding leaves of it the first time is small beside the
    vector, but not beside a remainder that is itself small."""
    for _ in range(2):
        for direction in basis:
            vector = vector - (direction @ vector) * direction
    return vector


def orthogonalize(p: Tensor) -> Tensor:
    """Gram-Schmidt, column by column, on p of shape [n, r] with r <= n.

    The result always has orthonormal columns: one that is zero, or depends on those before it, is
    replaced by the first standard basis vector that does not depend on them."""
    rows, rank = p.shape
    if rank > rows:
        raise ValueError(f"{rank} columns of length {rows} cannot be orthonormal")
    p = p.to(torch.float64)
    basis: list[Tensor] = []
    for j in range(rank):
        column = p[:, j]
        candidates = [column, *torch.eye(rows, dtype=torch.float64)]
        for candidate in candidates:
            largest = candidate.abs().max()
            if largest == 0:
                continue
            candidate = candidate / largest  # so that squares neither underflow nor overflow
            remainder = reject(candidate, basis)
            if remainder.norm() > DEPENDENT * candidate.norm():
                basis.append(remainder / remainder.norm())
                break
    return torch.stack(basis, dim=1)


def compress_and_aggregate(
    matrices: Sequence[Tensor], query: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Algorithm 1, lines 2 to 9, for all workers at once: `matrices[w]` is worker w's M.

    Returns P_hat, each worker's own Q (which Algorithm 2, line 9, needs), and the mean Q."""
    local_p = [matrix @ query for matrix in matrices]  # Algorithm 1, line 3
    p = mean(local_p)  # Algorithm 1, line 4
    p_hat = orthogonalize(p)  # Algorithm 1, line 5
    local_queries = [matrix.T @ p_hat for matrix in matrices]  # Algorithm 1, line 6
    mean_query = mean(local_queries)  # Algorithm 1, line 7
    return p_hat, local_queries, mean_query  # Algorithm 1, line 8


def decompress(p_hat: Tensor, query: Tensor) -> Tensor:
    """Algorithm 1, lines 10 to 12."""
    return p_hat @ query.T  # Algorithm 1, line 11


class Reference:
    """Algorithm 2 with Algorithm 1 as its compressor, for `world_size` workers in one process.

    Decisions that the paper does not take:

    * A tensor of two or more dimensions is the matrix [shape[0], numel / shape[0]]. It is
      compressed where that sends fewer numbers, n m > min_compression_rate r (n + m) with
      r = min(n, m, rank), from step `start_compressing_at` on. Other tensors are averaged and have
      no error memory; an error left from a time of compression joins the next average.
    * `initial_query(index, step)` gives the Q [m, r] of a parameter: at its start (step 0), and
      without warm start at each step. With warm start the mean Q is the next one, but a column of
      it that is exactly zero would stay zero for ever: there the column used before remains.
    * A None gradient is a zero. Where no worker has a gradient nothing of that parameter changes in
      that step, and its Delta' is zero.
    * `maximize` and weight decay act on Delta' after aggregation, as in torch.optim.SGD.

    Public state, all float64 and in the parameter's shape but for the queries:

    * `parameters[i]`, `momenta[i]`, `errors[w][i]` (zero where there is no memory);
    * `last_updates[i]`: Delta' of the latest step, before `maximize` and weight decay;
    * `deltas[w][i]`: Delta_w of the latest step in which any worker had a gradient;
    * `queries[i]` [m, r]: Q of the next step, or without warm start of the latest compressed one;
      None for a tensor that is not compressed.

    Hyper-parameters may be changed between steps; so may the rank, if `queries[i]` is replaced by
    one of the new rank. Steps are counted in `step_number`, from 0, for all parameters together.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        parameters: Sequence[Tensor],
        world_size: int,
        hyperparameters: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        initial_query: Callable[[int, int], Tensor],
    ) -> None:
        if isinstance(hyperparameters, Mapping):
            hyperparameters = [hyperparameters] * len(shapes)
        if not len(shapes) == len(parameters) == len(hyperparameters):
            raise ValueError("shapes, parameters and hyperparameters differ in number")
        self.shapes = [tuple(shape) for shape in shapes]
        self.world_size = world_size
        self.initial_query = initial_query
        self.step_number = 0
        # Algorithm 2, line 1
        self.hyperparameters = [Hyperparameters(**one) for one in hyperparameters]
        # Algorithm 2, line 2
        self.parameters = [
            parameter.detach().to(torch.float64, copy=True).reshape(shape)
            for parameter, shape in zip(parameters, self.shapes, strict=True)
        ]
        self.momenta = self._zeros()
        self.has_momentum = [False] * len(shapes)  # of the form "sgd", whose first step is special
        # Algorithm 2, lines 3 and 4
        self.errors = [self._zeros() for _ in range(world_size)]
        # Algorithm 1, line 1
        self.queries: list[Tensor | None] = [
            self._new_query(index, 0) if self.is_compressible(index) else None
            for index in range(len(shapes))
        ]
        self.last_updates = self._zeros()
        self.deltas = [self._zeros() for _ in range(world_size)]

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros(shape, dtype=torch.float64) for shape in self.shapes]

    def _new_query(self, index: int, step: int) -> Tensor:
        return self.initial_query(index, step).detach().to(torch.float64, copy=True)

    def matrix_shape(self, index: int) -> tuple[int, int, int]:
        """(n, m, r) of a parameter that has two or more dimensions and is not empty."""
        shape = self.shapes[index]
        rows, columns = shape[0], self.parameters[index].numel() // shape[0]
        return rows, columns, min(rows, columns, self.hyperparameters[index].rank)

    def is_compressible(self, index: int) -> bool:
        """Whether the parameter is a matrix worth compressing, whatever the step."""
        if len(self.shapes[index]) < 2 or self.parameters[index].numel() == 0:
            return False
        rows, columns, rank = self.matrix_shape(index)
        rate = self.hyperparameters[index].min_compression_rate
        return rows * columns > rate * rank * (rows + columns)

    def step(self, gradients: Sequence[Sequence[Tensor | None]]) -> None:
        """Algorithm 2, lines 5 to 14: one iterate t. `gradients[w][i]` is worker w's, or None."""
        if len(gradients) != self.world_size:
            raise ValueError(f"gradients of {len(gradients)} workers, not of {self.world_size}")
        for index, shape in enumerate(self.shapes):
            given = [own[index] for own in gradients]
            if all(gradient is None for gradient in given):
                self.last_updates[index] = torch.zeros(shape, dtype=torch.float64)
                continue
            local = [  # Algorithm 2, line 6
                torch.zeros(shape, dtype=torch.float64)
                if gradient is None
                else gradient.detach().to(torch.float64).reshape(shape)
                for gradient in given
            ]
            update = self._exchange(index, local)
            self.last_updates[index] = update
            self._descend(index, update)
        self.step_number += 1

    def _exchange(self, index: int, gradients: Sequence[Tensor]) -> Tensor:
        """Algorithm 2, lines 7 to 11, for one parameter: from the workers' gradients to Delta'."""
        shape, hyper = self.shapes[index], self.hyperparameters[index]
        deltas = []
        for w in range(self.world_size):
            delta = gradients[w]
            if hyper.error_feedback:
                delta = delta + self.errors[w][index]  # Algorithm 2, line 7
            self.deltas[w][index] = delta
            deltas.append(delta)

        if not self.is_compressible(index) or self.step_number < hyper.start_compressing_at:
            for w in range(self.world_size):
                self.errors[w][index] = torch.zeros(shape, dtype=torch.float64)
            return mean(deltas)

        rows, columns, rank = self.matrix_shape(index)
        query = self.queries[index]
        if not hyper.warm_start:
            query = self._new_query(index, self.step_number)
        if query is None or query.shape != (columns, rank):
            raise ValueError(f"parameter {index} needs a Q of shape {(columns, rank)}")
        # Algorithm 2, lines 8 and 10: COMPRESS and AGGREGATE are one function in Algorithm 1
        p_hat, local_queries, mean_query = compress_and_aggregate(
            [delta.reshape(rows, columns) for delta in deltas], query
        )
        for w in range(self.world_size):
            if hyper.error_feedback:
                own = decompress(p_hat, local_queries[w]).reshape(shape)
                self.errors[w][index] = deltas[w] - own  # Algorithm 2, line 9
        next_query = query.clone()
        if hyper.warm_start:
            for j in range(rank):
                if mean_query[:, j].any():
                    next_query[:, j] = mean_query[:, j]
        self.queries[index] = next_query
        return decompress(p_hat, mean_query).reshape(shape)  # Algorithm 2, line 11

    def _descend(self, index: int, update: Tensor) -> None:
        """Algorithm 2, lines 12 and 13, for one parameter, or torch.optim.SGD's in their place."""
        hyper, x, m = self.hyperparameters[index], self.parameters[index], self.momenta[index]
        if hyper.maximize:
            update = -update
        update = update + hyper.weight_decay * x

        if hyper.momentum_form == "paper":
            m = hyper.momentum * m + update  # Algorithm 2, line 12
            direction = update + m
        elif hyper.momentum_form != "sgd":
            raise ValueError(f"unknown momentum_form {hyper.momentum_form!r}")
        elif hyper.momentum == 0:
            direction = update
        else:
            if self.has_momentum[index]:
                m = hyper.momentum * m + (1 - hyper.dampening) * update
            else:
                m = update
                self.has_momentum[index] = True
            direction = update + hyper.momentum * m if hyper.nesterov else m
        self.momenta[index] = m
        self.parameters[index] = x - hyper.lr * direction  # Algorithm 2, line 13
