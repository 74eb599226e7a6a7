"""efsgd.attach without DistributedDataParallel: what programs do with an optimizer of torch."""

import copy
import gc
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efsgd
from efsgd import GradientAverager, NonFiniteGradientError, PowerSGD, PowerSGDOptimizer, attach
from efsgd.testing import lockstep
from tests.integrations.threads import (
    WORKERS,
    Model,
    all_equal,
    loss_of,
    parameters,
    together,
    trained,
)
from tests.simulation import bits, through_a_file
from tests.wire.test_transports import Threads

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}
COMPRESSOR = PowerSGD(rank=2)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices and vectors apart, as many programs have them."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(model), lr=0.01)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, worker: int, steps: range = range(4)
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, worker, step).backward()
        optimizer.step()


def by_hand(make: Callable[..., torch.optim.Optimizer], steps: range = range(4)) -> list[Any]:
    """The parameters of each worker, where a loop calls an averager."""
    models = [Model() for _ in range(WORKERS)]
    optimizers = [make(groups_of(model)) for model in models]
    averagers = [GradientAverager(o.param_groups, COMPRESSOR) for o in optimizers]
    for step in steps:
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(model, worker, step).backward()
        lockstep([a.exchange(WORKERS, worker) for worker, a in enumerate(averagers)])
        for optimizer in optimizers:
            optimizer.step()
    return [parameters(model) for model in models]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("closes", [False, True], ids=["plain", "closure"])
def test_one_line_does_what_an_averager_does(name: str, closes: bool) -> None:
    def program(workers: Threads) -> Any:
        model = Model()
        optimizer = OPTIMIZERS[name](groups_of(model))
        attached = attach(model, optimizer, COMPRESSOR, process_group=workers)
        if not closes:
            train(model, optimizer, workers.worker)
        for step in range(4) if closes else ():

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, workers.worker, step)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
        assert attached.communication_stats()["steps"] == 4
        return parameters(model)

    assert together(program) == by_hand(OPTIMIZERS[name])


def test_workers_begin_with_the_model_of_worker_0_whole() -> None:
    def program(workers: Threads) -> Any:
        model = Model(seed=workers.worker)
        model.norm.running_mean.fill_(workers.worker)
        attach(model, adamw(model), process_group=workers)
        return bits(dict(model.state_dict()))

    assert together(program) == [bits(dict(Model(seed=0).state_dict()))] * WORKERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(dtype: torch.dtype) -> None:
    def program(workers: Threads) -> Any:
        model = Model().to(dtype)
        optimizer = adamw(model)
        attach(model, optimizer, COMPRESSOR, process_group=workers)
        train(model, optimizer, workers.worker, range(3))
        saved = through_a_file([model.state_dict(), optimizer.state_dict()])
        train(model, optimizer, workers.worker, range(3, 6))
        resumed = Model(seed=5).to(dtype)
        other = adamw(resumed)
        attach(resumed, other, COMPRESSOR, process_group=workers)
        resumed.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        train(resumed, other, workers.worker, range(3, 6))
        errors = [state["error"] for state in saved[1]["efsgd"]["state"].values() if state]
        assert any(error.any() for error in errors)
        return trained(model, optimizer), trained(resumed, other)

    ends = together(program)
    assert [whole for whole, _ in ends] == [resumed for _, resumed in ends]
    assert all_equal([whole[0] for whole, _ in ends])


def resume_from_worker_0(*, consolidates: bool) -> tuple[list[Any], list[Any], list[str]]:
    """What goes on, what was resumed from the dict of worker 0, and what was warned of."""

    def first(workers: Threads) -> Any:
        model = Model()
        optimizer = adamw(model)
        attached = attach(model, optimizer, COMPRESSOR, process_group=workers)
        train(model, optimizer, workers.worker, range(3))
        if consolidates:
            attached.consolidate()
        saved = through_a_file([model.state_dict(), optimizer.state_dict()])
        train(model, optimizer, workers.worker, range(3, 5))
        return saved, trained(model, optimizer)

    ends = together(first)
    saved = ends[0][0]

    def second(workers: Threads) -> Any:
        model = Model()
        optimizer = adamw(model)
        attach(model, optimizer, COMPRESSOR, process_group=workers)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # torch's Adam would share its steps
        train(model, optimizer, workers.worker, range(3, 5))
        return trained(model, optimizer)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = together(second)
    return [end for _, end in ends], resumed, [str(each.message) for each in caught]


def test_after_consolidation_one_worker_saves_for_all() -> None:
    whole, resumed, warned = resume_from_worker_0(consolidates=True)
    assert whole == resumed and not warned


def test_what_is_lost_without_consolidation_is_said() -> None:
    whole, resumed, warned = resume_from_worker_0(consolidates=False)
    assert whole != resumed and all_equal([end[0] for end in resumed])
    assert len(warned) == 1 and "attached.consolidate()" in warned[0], warned


def test_a_checkpoint_from_before_begins_anew_and_says_so() -> None:
    model = Model()
    optimizer = adamw(model)
    train(model, optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.warns(UserWarning, match="load that again now"):  # it may have been loaded
        attached = attach(model, optimizer, COMPRESSOR)
    train(model, optimizer, 0)
    new = bits(GradientAverager(optimizer.param_groups, COMPRESSOR).state_dict()["state"])
    assert bits(attached.averager.state_dict()["state"]) != new
    with pytest.warns(UserWarning, match="without efsgd.attach") as caught:
        optimizer.load_state_dict(before)
    assert len(caught) == 1
    saved = optimizer.state_dict()["efsgd"]
    assert bits(saved["state"]) == new and saved["param_groups"][0]["step"] == 0
    assert optimizer.state_dict()["state"][0]["step"] == before["state"][0]["step"] == 4


def test_a_dict_that_does_not_fit_changes_nothing() -> None:
    model, other = Model(), nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    optimizer, foreign = adamw(model), adamw(other)
    attach(model, optimizer, COMPRESSOR)
    attach(other, foreign, COMPRESSOR)
    train(model, optimizer, 0)
    before = trained(model, optimizer)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(foreign.state_dict())
    assert trained(model, optimizer) == before


def test_groups_and_parameters_that_come_later_are_averaged() -> None:
    def program(workers: Threads) -> Any:
        model = Model()
        late = [*model.side.parameters()]
        early = [p for p in model.parameters() if all(p is not q for q in late)]
        optimizer = torch.optim.AdamW(early, lr=0.01)
        attached = attach(model, optimizer, COMPRESSOR, process_group=workers)
        train(model, optimizer, workers.worker, range(2))
        optimizer.add_param_group({"params": late, "lr": 0.1})
        model.fixed.requires_grad_(True)
        train(model, optimizer, workers.worker, range(3, 5))
        assert len(attached.averager.param_groups) == 2
        trained_before = parameters(model)
        optimizer.param_groups[0]["params"].pop(0)
        train(model, optimizer, workers.worker, range(5, 6))
        assert len(attached.averager.param_groups[0]["params"]) == len(early) - 1
        assert trained_before[0] == parameters(model)[0]
        optimizer.param_groups.pop()
        train(model, optimizer, workers.worker, range(6, 7))
        assert len(attached.averager.param_groups) == 1
        return parameters(model)

    assert all_equal(together(program))


def test_a_skipped_average_is_a_step_without_effect() -> None:
    def program(workers: Threads) -> Any:
        model = Model()
        optimizer = adamw(model)
        attached = attach(model, optimizer, COMPRESSOR, nonfinite="skip", process_group=workers)
        train(model, optimizer, workers.worker, range(2))
        optimizer.zero_grad()
        factor = torch.nan if workers.worker == 1 else 1.0
        (factor * loss_of(model, workers.worker, 3)).backward()
        before, gradients = trained(model, optimizer), [p.grad for p in model.parameters()]
        values = bits(gradients)
        optimizer.step()
        assert trained(model, optimizer) == before
        assert bits([p.grad for p in model.parameters()]) == values
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert attached.metrics()["efsgd/skipped_steps"] == 1
        train(model, optimizer, workers.worker, range(4, 6))
        return parameters(model)

    ends = together(program)
    assert all_equal(ends)


def test_a_gradient_that_is_not_finite_raises_on_all_workers_and_changes_nothing() -> None:
    def program(workers: Threads) -> None:
        model = Model()
        optimizer = adamw(model)
        attach(model, optimizer, COMPRESSOR, process_group=workers)
        factor = torch.inf if workers.worker == 1 else 1.0
        (factor * loss_of(model, workers.worker, 0)).backward()
        before = trained(model, optimizer)
        with pytest.raises(NonFiniteGradientError, match="worker 1"):
            optimizer.step()
        assert trained(model, optimizer) == before
        train(model, optimizer, workers.worker, range(1))
        assert trained(model, optimizer) != before

    together(program)


def test_clipping_after_average_clips_the_mean_as_max_grad_norm_does() -> None:
    def program(workers: Threads) -> Any:
        ends = []
        for clips in (True, False):
            model = Model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            options = {} if clips else {"max_grad_norm": 0.01}
            attached = attach(model, optimizer, COMPRESSOR, process_group=workers, **options)
            for step in range(3):
                optimizer.zero_grad()
                loss_of(model, workers.worker, step).backward()
                if clips:
                    assert attached.average_() and attached.average_()  # the second does nothing
                    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                optimizer.step()
                if not clips:
                    norm = attached.communication_stats()["grad_norm"]
                assert norm > 0.01
            assert attached.communication_stats()["steps"] == 3
            ends.append(list(model.parameters()))
        for one, other in zip(*ends, strict=True):
            # The norm is summed in another order, and all is float32.
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
        return bits(ends[0])

    assert all_equal(together(program))


def test_clipping_local_gradients_is_noticed() -> None:
    def program(workers: Threads) -> None:
        model = Model()
        optimizer = adamw(model)
        attach(model, optimizer, COMPRESSOR, process_group=workers)
        for step in range(3):
            optimizer.zero_grad(set_to_none=step == 2)
            loss_of(model, workers.worker, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

    with pytest.warns(UserWarning, match=r"attached\.average_\(\)") as caught:
        together(program)
    assert len(caught) == WORKERS  # once on each


def test_unchanged_gradients_are_not_warned_of() -> None:
    def program(workers: Threads) -> None:
        model = Model()
        optimizer = adamw(model)
        attach(model, optimizer, COMPRESSOR, process_group=workers)
        for step in range(4):  # accumulated in place, and zeroed in place
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss_of(model, workers.worker, step).backward()
            loss_of(model, workers.worker, step + 10).backward()
            optimizer.step()

    together(program)


def test_a_backward_pass_after_the_average_is_refused_and_a_new_start_is_not() -> None:
    model = Model()
    optimizer = adamw(model)
    attached = attach(model, optimizer, COMPRESSOR)
    loss_of(model, 0, 0).backward()
    attached.average_()
    loss_of(model, 0, 1).backward()
    with pytest.raises(RuntimeError, match="after the last backward pass"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 0, 0).backward()
    optimizer.step()
    loss_of(model, 0, 0).backward()
    attached.average_()  # and the step is left out
    optimizer.zero_grad()
    loss_of(model, 0, 0).backward()
    optimizer.step()
    assert attached.communication_stats()["steps"] == 4


class Inherited(torch.optim.SGD):
    """Its hooks are called twice in each step, once torch.optim.SGD's own step has them."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("closes", [False, True])
def test_an_optimizer_that_calls_its_parent_s_step_averages_once(closes: bool) -> None:
    torch.optim.SGD(nn.Linear(2, 2).parameters())
    model = Model()
    optimizer = Inherited(groups_of(model), lr=0.1)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    attached = attach(model, optimizer, COMPRESSOR)
    for step in range(3):
        optimizer.zero_grad()
        if closes:
            optimizer.step(lambda step=step: loss_of(model, 0, step).backward())
        else:
            loss_of(model, 0, step).backward()
            optimizer.step()
    assert (len(fired), attached.communication_stats()["steps"]) == (6, 3)


class Twice(torch.optim.SGD):
    """Evaluates its closure twice in a step, as optimizers that look around do."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        with torch.enable_grad():
            closure()
        return super().step(closure)


def test_each_evaluation_of_a_closure_is_averaged() -> None:
    def program(workers: Threads) -> Any:
        model = Model()
        optimizer = Twice(groups_of(model), lr=0.1)
        attached = attach(model, optimizer, COMPRESSOR, nonfinite="skip", process_group=workers)
        first = torch.nan if workers.worker == 1 else 1.0
        factors = iter([first, 1.0, 1.0, 1.0])  # the first evaluation is skipped

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(model, workers.worker, 0)
            (next(factors) * loss).backward()
            return loss

        for evaluations in (1, 3):
            optimizer.step(closure)
            assert attached.communication_stats()["steps"] == evaluations
            assert model.side.weight.grad is not None and model.side.weight.grad.isfinite().all()
        return bits([model.side.weight.grad, *model.parameters()])

    assert all_equal(together(program))


def test_detach_leaves_the_optimizer_as_it_was() -> None:
    model = Model()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu")
    before = {name: copy.copy(value) for name, value in vars(optimizer).items()}
    hooked = dict(vars(scaler))
    for _ in range(2):
        for given in (None, scaler):
            attached = attach(model, optimizer, COMPRESSOR, scaler=given)
            assert vars(optimizer) != before
            attached.detach()
            assert vars(optimizer) == before and vars(scaler) == hooked
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    twin = Model()
    plain = adamw(twin)
    train(model, optimizer, 0)
    train(twin, plain, 0)
    assert trained(model, optimizer) == trained(twin, plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_optimizer_have_nothing_attached(copied: Callable[[Any], Any]) -> None:
    model = Model()
    optimizer = adamw(model)
    attached = attach(model, optimizer, COMPRESSOR)
    train(model, optimizer, 0)
    twin = copied(optimizer)
    assert "efsgd" in optimizer.state_dict() and "efsgd" not in twin.state_dict()
    assert bits(twin.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
    twin.step()
    assert attached.communication_stats()["steps"] == 4
    with pytest.raises(TypeError, match="attach to the other optimizer"):
        copied(attached)


def test_two_optimizers_of_one_model_exchange_for_themselves() -> None:
    def program(workers: Threads) -> Any:
        model = Model()
        halves = [*model.side.parameters()], [*model.norm.parameters(), *model.first.parameters()]
        optimizers = [torch.optim.AdamW(half, lr=0.01) for half in halves]
        attached = [attach(model, o, COMPRESSOR, process_group=workers) for o in optimizers]
        for step in range(3, 6):
            loss_of(model, workers.worker, step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert [each.communication_stats()["steps"] for each in attached] == [3, 3]
        return parameters(model)

    assert all_equal(together(program))


MODEL = Model()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: (MODEL, torch.optim.LBFGS(MODEL.parameters())), NotImplementedError, "loss"),
        (lambda: (MODEL, torch.optim.SparseAdam(MODEL.parameters())), NotImplementedError, "dense"),
        (lambda: (MODEL, PowerSGDOptimizer(MODEL.parameters())), TypeError, "leave attach out"),
        (lambda: (MODEL, GradientAverager(MODEL.parameters())), TypeError, "leave attach out"),
        (lambda: (Model(), adamw(MODEL)), ValueError, "none of the model's parameters"),
        (lambda: (adamw(MODEL), MODEL), TypeError, "nn.Module"),
        (lambda: (MODEL, MODEL), TypeError, "torch.optim.Optimizer"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(
    make: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        attach(*make())


def test_attaching_twice_is_refused_until_it_is_detached() -> None:
    optimizer = adamw(MODEL)
    attached = attach(MODEL, optimizer)
    with pytest.raises(ValueError, match=r"detach\(\)"):
        attach(MODEL, optimizer)
    attached.detach()
    attach(MODEL, optimizer).detach()
    assert isinstance(attached, efsgd.Attached)


def test_a_bad_argument_leaves_no_hook() -> None:
    optimizer = adamw(MODEL)
    before = dict(vars(optimizer))
    with pytest.raises(ValueError, match="nonfinite"):
        attach(MODEL, optimizer, nonfinite="ignore")
    assert vars(optimizer) == before


def test_names_are_the_model_s_within_whatever_compiles_it() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.01)
    attached = attach(compiled, optimizer, COMPRESSOR)
    train(model, optimizer, 0)
    attached.metrics()
    train(compiled, optimizer, 0)
    layers = {"side.weight", "first.weight"}
    found = {name for name in attached.metrics(by_layer=True) if "relative_error/" in name}
    assert found == {f"efsgd/relative_error/{layer}" for layer in layers}


def test_nothing_is_kept_alive_by_the_model_s_parameters() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    averager = weakref.ref(attach(model, optimizer, scaler=scaler).averager)
    gone = weakref.ref(optimizer)
    assert averager() is not None  # the optimizer's hooks have it
    del optimizer
    gc.collect()
    assert (gone(), averager()) == (None, None)


def test_a_model_with_a_wrapped_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper(nn.Linear):
        pass

    module = sys.modules["efsgd.integrations.attach"]
    monkeypatch.setattr(module, "DistributedDataParallel", Wrapper)
    model = nn.Sequential(Wrapper(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="A part of the model is a DistributedDataParallel"):
        attach(model, torch.optim.AdamW(model.parameters(), lr=0.01))


def test_gradients_of_a_step_that_raised_do_not_come_back() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach(model, optimizer, nonfinite="skip")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    (model(torch.ones(2, 8)) * torch.nan).sum().backward()
    hook = optimizer.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    hook.remove()
    optimizer.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
