"""D5, D6: copies of whole optimizers, in memory, in files and in other processes."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from efsgd import PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import train
from tests.optimizers.swap_in.test_saving_and_loading import a_run
from tests.simulation import bits, parameters_of, snapshot


def by_deepcopy(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer)


def by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def by_torch_save(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [by_deepcopy, by_pickle, by_torch_save]


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("has_scheduler", [False, True])
def test_copies(make_copy: Callable[[Any], Any], has_scheduler: bool) -> None:
    """D5, D6: they have all public attributes, and train on; also with a patched `step`."""
    optimizer = a_run()
    if has_scheduler:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    twin = make_copy(optimizer)
    # A scheduler marks the optimizer that it patches; the copy is not patched.
    patched = {"step"} if has_scheduler else set()
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(twin) if not name.startswith("_")} == public - patched
    assert bits([twin.defaults, twin.param_groups]) == bits(
        [optimizer.defaults, optimizer.param_groups]
    )
    assert type(twin) is PowerSGDOptimizer
    train([twin, optimizer], range(2, 5))
    assert bits(snapshot([twin])) == bits(snapshot([optimizer]))


def _train_in_another_process(optimizer: PowerSGDOptimizer, answers: Any) -> None:
    torch.set_num_threads(1)
    train([optimizer], range(2, 5))
    answers.put([p.detach().numpy().tobytes() for p in parameters_of(optimizer)])


@pytest.mark.xdist_group("processes")
def test_spawn() -> None:
    """D6: an optimizer can be an argument of a process that is spawned."""
    optimizer, context = a_run(), mp.get_context("spawn")
    answers = context.SimpleQueue()
    # A copy: its tensors are moved to shared memory on the way.
    arguments = (copy.deepcopy(optimizer), answers)
    process = context.Process(target=_train_in_another_process, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    train([optimizer], range(2, 5))
    expected = [p.detach().numpy().tobytes() for p in parameters_of(optimizer)]
    assert answers.get() == expected
