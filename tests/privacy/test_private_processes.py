"""Real processes train privately, on batches of which some are empty."""

from pathlib import Path

import pytest
import torch

from efsgd.testing import step_together
from tests.launcher import launch
from tests.privacy import private_worker as script
from tests.privacy.teams import backward


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_compute_what_lockstep_computes(world_size: int, tmp_path: Path) -> None:
    reports = launch(script.__file__, world_size, tmp_path)
    first = reports[0]
    for report in reports:  # bitwise equal, in equal steps with equal numbers of bytes
        assert report["trained"] == first["trained"]
        assert report["sent"] == first["sent"]
        assert (report["total"], report["check"]) == (first["total"], first["check"])
        assert report["spent"] == first["spent"]
        assert len(report["sizes"]) == script.STEPS
    assert any(0 in report["sizes"] for report in reports)
    assert len({tuple(report["sizes"]) for report in reports}) == world_size

    team = [script.make(worker, world_size) for worker in range(world_size)]
    optimizers, sent, total = [optimizer for _, optimizer, _ in team], [], 0
    for batches in zip(*(own for *_, own in team), strict=True):
        for (module, optimizer, _), (inputs, classes) in zip(team, batches, strict=True):
            optimizer.zero_grad()
            backward(module, inputs, classes)
        trace = step_together(optimizers)
        means = [each.nbytes for each in trace if each.kind == "AllReduceMean"]
        sent.append([len(means), sum(means)])
        total += sum(each.nbytes for each in trace)
    assert first["sent"] == sent
    assert first["total"] == total
    assert {who: e["rdp"] for who, e in optimizers[0].guarantees(1e-5).items()} == first["spent"]
    for values, parameter in zip(first["values"], team[0][0].parameters(), strict=True):
        difference = (
            torch.tensor(values, dtype=torch.float64) - parameter.detach().flatten()
        ).abs()
        # A sum of two is the same in either order. Of four gloo may add in another one: rounding of
        # float64, multiplied by thirty steps of error feedback on noise.
        assert float(difference.abs().max()) <= (0 if world_size == 2 else 1e-9)
