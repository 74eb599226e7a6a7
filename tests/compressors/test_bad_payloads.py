"""Payloads that are not what was announced, and compressors that are none."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, Field, TensorCompressor
from efsgd.algorithms.operators import Payload
from efsgd.randomness import Draws


@pytest.mark.parametrize("is_averaged", [False, True])
@pytest.mark.parametrize(
    "payload",
    [
        (torch.zeros(2),),
        (torch.zeros(3), torch.zeros(1)),
        (torch.zeros(3, dtype=torch.float64),),
        (torch.zeros(3, 1),),
    ],
    ids=["short", "one too many", "dtype", "shape"],
)
def test_what_was_not_announced_is_refused(payload: Payload, is_averaged: bool) -> None:
    @dataclasses.dataclass(frozen=True)
    class Bad(TensorCompressor):
        averages = is_averaged

        def fields(self, shape: torch.Size) -> Sequence[Field]:
            return (Field(3),)

        def compress(self, delta: Tensor, draws: Draws) -> Payload:
            return payload

    x = torch.ones(3, requires_grad=True)
    x.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"Invalid payload.*announce"):
        ErrorFeedbackSGD([x], lr=1.0, compressor=Bad()).step()
    assert x.tolist() == [1.0] * 3


def test_private_numbers_are_not_for_decompressing() -> None:
    with pytest.raises(RuntimeError, match="Only compress"):
        Draws(0, 0, 0, None).private()


def test_a_compressor_must_be_a_dataclass() -> None:
    class Plain(TensorCompressor):
        pass

    with pytest.raises(TypeError, match="Plain is no dataclass"):
        ErrorFeedbackSGD([torch.ones(3, requires_grad=True)], compressor=Plain())
