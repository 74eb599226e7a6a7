"""Lines 11 to 13 for parameters of every dtype, in groups of every kind, and with bad numbers."""

from typing import Any

import pytest
import torch

from efsgd import PowerSGDOptimizer
from efsgd.algorithms.error_feedback import descend_
from efsgd.algorithms.sgd import sgd_

SGD: dict[str, Any] = {"momentum_form": "sgd"}


@pytest.mark.parametrize("form", [{}, SGD, SGD | {"foreach": True}, SGD | {"fused": True}], ids=str)
def test_float16_survives_updates_that_it_cannot_hold(form: dict[str, Any]) -> None:
    x = torch.zeros(8, 8, dtype=torch.float16, requires_grad=True)
    optimizer = PowerSGDOptimizer([x], lr=1e-6, rank=1, **form)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):  # errors and gradients add up to more than 65504
        x.grad = (torch.rand(8, 8, generator=generator) * 60000).half()
        optimizer.step()
        assert optimizer.param_groups[0]["step"] == step + 1
    assert x.isfinite().all() and x.any()


@pytest.mark.parametrize("rule", [descend_, sgd_])
def test_an_element_s_update_does_not_depend_on_other_elements(rule: Any) -> None:
    options = {"lr": 0.1, "momentum": 0.9}
    if rule is sgd_:
        options |= {"is_first": False, "dampening": 0.0, "nesterov": False}
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        x, m = (torch.randn(8, 8, generator=generator).to(dtype) for _ in range(2))
        update = torch.randn(8, 8, generator=generator)
        update[0, 0] = 1e5  # more than float16 holds
        ends = []
        for pieces in ([slice(0, 8)], [slice(0, 1), slice(1, 8)]):
            own, momentum = x.clone(), m.clone()
            for rows in pieces:
                rule([update[rows].clone()], [own[rows]], [momentum[rows]], **options)
            ends.append((own, momentum))
        (x_whole, m_whole), (x_cut, m_cut) = ends
        assert torch.equal(m_whole[1:], m_cut[1:])
        if rule is descend_:
            # torch itself adds two tensors of half precision differently in whole vectors and in
            # what remains of them; the paper's rule adds in float32.
            assert torch.equal(x_whole[1:], x_cut[1:])


@pytest.mark.parametrize("together", [False, True])
def test_momenta_in_bfloat16_are_rounded_once(together: bool) -> None:
    m, x = torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    # 0.999 + 2^-8: rounded in between, 0.999 would be 1.
    options = {"lr": 0.1, "momentum": 0.999, "together": together}
    descend_([torch.full((2,), -(2.0**-9))], [x], [m], **options)
    exact = torch.tensor(0.999 - 2.0**-9, dtype=torch.float64)
    assert torch.equal(m, exact.to(torch.bfloat16).expand(2))


def test_many_tensors_at_once_are_the_same_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [[torch.randn(n, generator=generator) for n in (3, 5)] for _ in range(3)]
    ends = []
    for together in (False, True):
        updates, xs, ms = [[t.clone() for t in tensors] for tensors in given]
        options = {"weight_decay": 0.1, "maximize": True, "together": together}
        descend_(updates, xs, ms, lr=0.1, momentum=0.9, **options)
        ends.append([*xs, *ms])
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)  # float32, a multiplication more


def test_momenta_go_on_where_another_parameter_of_the_group_has_none() -> None:
    xs = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    optimizer = PowerSGDOptimizer(xs, lr=0.1, momentum=0.9)
    for x in xs:
        x.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0
    del optimizer.state[xs[1]]["momentum_buffer"]
    for x in xs:
        x.grad = torch.full((2,), 2.0)
    optimizer.step()
    assert torch.equal(optimizer.state[xs[0]]["momentum_buffer"], torch.full((2,), 2.0))


def test_parameters_with_gaps_in_memory_keep_their_momentum_buffer() -> None:
    x = torch.zeros(4, 8)[:, ::2].requires_grad_()
    optimizer = PowerSGDOptimizer([x], lr=0.1, momentum=0.9, rank=1)
    kept = optimizer.state[x]["momentum_buffer"]
    for _ in range(2):
        x.grad = torch.ones(4, 4)
        optimizer.step()
    assert optimizer.state[x]["momentum_buffer"] is kept
