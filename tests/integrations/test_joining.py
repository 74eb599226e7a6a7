"""What an optimizer does for torch's Join, in one process; with several: test_around_ddp.py."""

import pytest
import torch
from torch.distributed.algorithms.join import Join

from efsgd import GradientAverager, PowerSGDOptimizer, WorkerMismatchError


def test_gradients_for_another_optimizer_are_refused() -> None:
    averager = GradientAverager([torch.ones(4, 3, requires_grad=True)])
    with pytest.raises(NotImplementedError, match="the same number of steps"):
        Join([averager])


def test_a_step_without_gradients_leaves_the_user_s_where_they_were() -> None:
    parameter = torch.ones(4, 3, requires_grad=True)
    parameter.grad = given = torch.ones(4, 3)
    optimizer = PowerSGDOptimizer([parameter])
    optimizer.join_hook().main_hook()
    assert parameter.grad is given
    assert torch.equal(given, torch.ones(4, 3))
    assert torch.equal(parameter, torch.ones(4, 3))
    assert optimizer.param_groups[0]["step"] == 1


def test_they_are_put_back_after_an_error_too() -> None:
    parameter = torch.ones(4, 3, requires_grad=True)
    parameter.grad = given = torch.ones(4, 3)
    optimizer = PowerSGDOptimizer([parameter])
    optimizer.param_groups[0]["rank"] = 0
    with pytest.raises(ValueError, match="Invalid rank"):
        optimizer.join_hook().main_hook()
    assert parameter.grad is given


def test_when_all_have_joined_workers_are_compared_and_notices_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = PowerSGDOptimizer([torch.ones(4, 3, requires_grad=True)])
    compared, noticed = [], []
    monkeypatch.setattr(optimizer, "compare_workers", lambda: compared.append(True))
    monkeypatch.setattr(Join, "notify_join_context", noticed.append)
    optimizer.step()
    assert noticed == []
    optimizer._join_config = object()  # as Join sets it
    optimizer.step()
    assert noticed == [optimizer]
    optimizer.join_hook().post_hook(is_last_joiner=True)
    assert compared == [True]
    optimizer.step()
    assert noticed == [optimizer]


def test_what_differs_when_all_have_joined_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = PowerSGDOptimizer([torch.ones(4, 3, requires_grad=True)])

    def compare() -> None:
        raise WorkerMismatchError("lr differs.")

    monkeypatch.setattr(optimizer, "compare_workers", compare)
    with pytest.raises(WorkerMismatchError, match=r"lr differs\. .* outside of Join"):
        optimizer.join_hook().post_hook(is_last_joiner=False)
