"""Warnings stand at the line that called the package."""

import warnings

import pytest
import torch

from efsgd import PowerSGDOptimizer
from efsgd.errors import warn_user


def test_a_warning_names_the_line_of_the_caller() -> None:
    with pytest.warns(UserWarning, match="an example") as caught:
        warn_user("an example")
    assert caught[0].filename == __file__


def test_a_warning_of_a_step_names_the_line_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.ones(12, 10, requires_grad=True)
    optimizer = PowerSGDOptimizer([parameter])
    optimizer.state[parameter]["error"] += 1
    optimizer.param_groups[0].update(worker=1, world_size=2)
    optimizer.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    assert "those of worker 1 of 2, and this is worker 0 of 1" in str(caught[0].message)
