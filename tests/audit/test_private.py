"""Messages of private training: of them the noise is a part."""

import pytest

from efsgd.audit import observe
from efsgd.privacy import PrivateOptimizer
from tests.audit.observed_runs import assert_measured
from tests.privacy.teams import FAMILY, SHAPES, made_records, private_team, step_watched


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_observed_is_what_was_made_of_noisy_gradients(name: str) -> None:
    team = private_team(2, FAMILY[name])
    with observe(team) as recording:
        messages, noisy = step_watched(team, made_records(SHAPES, [3, 4], 1))
    for worker, optimizer in enumerate(team):
        (message,) = recording.messages(worker=worker)
        assert message.applied
        assert message.nbytes == optimizer.communication_stats()["bytes_sent"]
        assert message.nbytes >= sum(own.nbytes for own in messages[worker][-1:])
        for each, gradient in zip(message.parameters, noisy[worker], strict=True):
            assert_measured(each, gradient)  # in the first step there are no errors
    assert isinstance(team[0], PrivateOptimizer)


def test_one_private_optimizer_is_observed_by_itself() -> None:
    (optimizer,) = private_team(1)
    with observe(optimizer) as recording:
        step_watched([optimizer], made_records(SHAPES, [3], 2))
    assert [each.kind for each in recording.messages()[0].parameters] == ["clear"] * len(SHAPES)
