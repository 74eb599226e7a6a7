"""What neighbors tell each other before a step, over a store of this process."""

from collections.abc import Iterator
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from efsgd.errors import CollectiveError, WorkerMismatchError
from efsgd.pipeline.handshake import Handshake, Said


class Group:
    """Stands for a process group, as one process sees it."""


@pytest.fixture
def store() -> Iterator[dist.HashStore]:
    """The store of all groups; who waits in it gives up soon."""
    found = dist.HashStore()
    found.set_timeout(timedelta(milliseconds=20))
    with mock.patch("efsgd.pipeline.handshake.store_of", lambda group: found):
        yield found


def said(step: int, *lines: str, is_whole: bool = True) -> Said:
    return Said(step, is_whole, list(lines))


def test_each_end_hears_what_the_other_tells_and_nothing_is_left(store: dist.HashStore) -> None:
    ends = [Handshake(Group(), 3, 4), Handshake(Group(), 4, 3)]
    others = [Handshake(Group(), 4, 5), Handshake(Group(), 5, 4)]  # of another link
    for step in range(5):
        for number, end in enumerate(ends + others):
            end.tell(said(step, f"end {number}", is_whole=step != 2))
        heard = [end.hear() for end in ends + others]
        expected = [said(step, f"end {number}", is_whole=step != 2) for number in (1, 0, 3, 2)]
        assert heard == expected
    assert store.num_keys() <= 2 * 4  # of this step and the last


def test_stages_that_are_made_anew_go_on(store: dist.HashStore) -> None:
    groups = [Group(), Group()]
    for step in range(4):
        for _ in range(step):  # of one process alone
            Handshake(groups[0], 0, 1)
        first, second = Handshake(groups[0], 0, 1), Handshake(groups[1], 1, 0)
        first.tell(said(step, "first"))
        second.tell(said(step, "second"))
        assert second.hear() == said(step, "first")
        assert first.hear() == said(step, "second")


@pytest.mark.parametrize("late", [0, 1])
def test_who_is_alone_takes_it_back_and_can_try_again(store: dist.HashStore, late: int) -> None:
    ends = [Handshake(Group(), 0, 1), Handshake(Group(), 1, 0)]
    for step in range(3):
        waits = ends[1 - late]
        for _ in range(2):
            waits.tell(said(step, "what does not count"))
            with pytest.raises(CollectiveError, match=f"Stage {late} has not begun the step"):
                waits.hear()
        ends[late].tell(said(step, "late"))
        waits.tell(said(step, "what counts"))
        assert ends[late].hear() == said(step, "what counts")
        assert waits.hear() == said(step, "late")


def test_a_difference_is_the_same_error_at_both_ends(store: dist.HashStore) -> None:
    ends = [Handshake(Group(), 2, 1), Handshake(Group(), 1, 2)]
    told = [said(1, "equal", "mine"), said(1, "equal", "yours")]
    texts = []
    for end, own, theirs in zip(ends, told, told[::-1], strict=True):
        end.compare(own, own)
        with pytest.raises(WorkerMismatchError) as raised:
            end.compare(own, theirs)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]
    assert "between stages 1 and 2 differ. Stage 1: yours; stage 2: mine. All" in texts[0]
