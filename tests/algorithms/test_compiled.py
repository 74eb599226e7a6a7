"""Fusion by torch.compile: the same to rounding, compiled once, given up where it fails.

That is what `compile=True` does on accelerators. Here it is done on the CPU, where torch.compile
works just as well; what it does on CPUs otherwise has tests of its own, in `test_native.py`.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from efsgd import CollectiveError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.algorithms.low_rank.fusion import Fusion, has_compiler, shared_fusion
from efsgd.compressors import powersgd
from efsgd.testing import step_together
from tests.simulation import (
    bits,
    difference,
    make_workers,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
    unchanged,
)
from tests.strategies import gaussian

# The first two are large enough to be fused, see Fusion.gains. Rows of the first are not aligned,
# so that its errors are fused, too; the second has the form of a convolution.
SHAPES = [(420, 642), (256, 128, 3, 3), (640,), (24, 20)]
FORMS: list[dict[str, Any]] = [
    {"momentum_form": "paper", "momentum": 0.9, "weight_decay": 0.01},
    {"momentum_form": "paper"},
    {"momentum_form": "paper", "alternating": True},
    {"momentum_form": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum_form": "sgd", "momentum": 0.9, "dampening": 0.3, "maximize": True},
]


@pytest.fixture(autouse=True)
def _compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_there = has_compiler(torch.device("cpu"))
    if not is_there and "without_compiler" not in request.keywords:
        pytest.skip("torch.compile finds no C++ compiler here")
    with warnings.catch_warnings():  # torch's own compiler uses what torch has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.fixture(autouse=True)
def _fusion_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def options_of(settings: Any, device: torch.device) -> dict[str, Any]:
        fuses = settings["compile"] and powersgd.has_compiler(device)
        own = {name: settings[name] for name in ("seed", "warm_start")}
        return {**own, "fusion": powersgd.shared_fusion() if fuses else None}

    monkeypatch.setattr(powersgd, "options_of", options_of)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many products were fused, by function."""
    counted: Counter[str] = Counter()
    original = Fusion.apply_

    def apply_(self: Fusion, function: Any, *rest: Any) -> bool:
        done = original(self, function, *rest)
        counted[function.__name__] += done
        return done

    monkeypatch.setattr(Fusion, "apply_", apply_)
    return counted


def start(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [gaussian(shape, 1, i).to(dtype) for i, shape in enumerate(SHAPES)]


def gradients(step: int, worker: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [gaussian(shape, 2, step, worker, i).to(dtype) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(
    ("options", "foreach"), [(f, None) for f in FORMS] + [(f, True) for f in FORMS[::3]], ids=str
)
def test_results_are_those_of_eager_steps_to_rounding(
    options: dict[str, Any], foreach: bool | None, fused: Counter[str]
) -> None:
    shared = {"lr": 0.1, "rank": 2, "foreach": foreach, **options}
    compiled = make_workers(start(torch.float64), 2, compile=True, **shared)
    eager = make_workers(start(torch.float64), 2, **shared)
    for step in range(4):
        given = [gradients(step, worker, torch.float64) for worker in range(2)]
        step_with(compiled, given)
        before = fused.total()
        step_with(eager, given)
        assert fused.total() == before
    name = "sgd_" if options["momentum_form"] == "sgd" else "descend_"
    assert fused[name] >= 2 * 4 * 2 and fused["subtract_"] >= 2 * 4
    for ours, theirs in zip(compiled, eager, strict=True):
        for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
            assert difference(a, b) < 1e-12  # eager steps are within 1e-10 of the reference
            for key in ("error", "q", "momentum_buffer"):
                if key in ours.state[a]:
                    assert difference(ours.state[a][key], theirs.state[b][key]) < 1e-12
    for a, b in zip(*map(parameters_of, compiled), strict=True):
        assert torch.equal(a, b)  # workers never drift


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bfloat16 has 8 bits: where a sum rounds differently once, a unit of 2^-8 remains.
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("form", ["paper", "sgd"])
def test_other_dtypes_and_strides_are_served(
    dtype: torch.dtype, tolerance: float, form: str
) -> None:
    ends = []
    for compile in (True, False):
        ps = start(dtype)
        ps[0] = ps[0].T.contiguous().T
        ps[1] = ps[1].to(memory_format=torch.channels_last)
        options = {"lr": 0.1, "momentum": 0.9, "rank": 2, "momentum_form": form}
        workers = make_workers(ps, 1, compile=compile, **options)
        for step in range(3):
            step_with(workers, [gradients(step, 0, dtype)])
        ends.append(parameters_of(workers[0]))
    for a, b in zip(*ends, strict=True):
        assert difference(a.double(), b.double()) < tolerance


def test_a_number_is_not_rounded_to_a_parameter_s_dtype() -> None:
    ps = [torch.zeros(512, 640, dtype=torch.bfloat16)]
    ends = []
    for compile in (True, False):
        workers = make_workers(ps, 1, lr=2.0**-9, momentum=0.999, rank=1, compile=compile)
        for _ in range(8):  # 0.999 would be 1 in bfloat16
            step_with(workers, [[torch.ones(512, 640, dtype=torch.bfloat16)]])
        ends.append(workers[0].state[parameters_of(workers[0])[0]]["momentum_buffer"])
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("number", [float, np.float64])
def test_new_numbers_compile_nothing(number: Any, fused: Counter[str]) -> None:
    # Equal at first, then not; equal to another; zero, as in a warm-up.
    schedule = [
        (0.1, 0.9, 0.1),
        (0.05, 0.9, 0.1),
        (0.9, 0.9, 0.1),
        (0.0, 0.5, 0.2),
        (0.1, 0.0, 0.1),
    ]
    [worker] = make_workers(start(), 1, lr=0.1, momentum=0.9, weight_decay=0.1, compile=True)
    step_with([worker], [gradients(0, 0)])
    assert fused["descend_"] >= 2
    counters.clear()
    for step, (lr, momentum, weight_decay) in enumerate(schedule):
        group = worker.param_groups[0]
        group["lr"], group["weight_decay"] = number(lr), number(weight_decay)
        if momentum:  # to and from 0 the state is made anew
            group["momentum"] = number(momentum)
        fused.clear()
        step_with([worker], [gradients(step, 0)])
        assert fused["descend_"] == 2
    assert not counters["frames"]["total"]


@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_step_that_fails_changes_nothing(fail_at: int, fused: Counter[str]) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "rank": 2, "compile": True}
    failing, twins = (make_workers(start(), 2, **options) for _ in range(2))
    for step in range(3):
        given = [gradients(step, worker) for worker in range(2)]
        if step == 1:
            before = bits(snapshot(failing))
            set_gradients(failing, given)
            with pytest.raises(CollectiveError):
                step_together(failing, fail_at=fail_at)
            assert bits(snapshot(failing)) == before
        step_with(failing, given)
        step_with(twins, given)
    assert fused["descend_"]
    assert bits(snapshot(failing)) == bits(snapshot(twins))


def test_settings_that_toggle_compile_and_send_nothing_but_the_step() -> None:
    workers = make_workers(start(), 2, lr=0.1, momentum=0.9, compile=True)
    step_with(workers, [gradients(0, worker) for worker in range(2)])
    errors = [workers[0].state[parameters_of(workers[0])[0]]["error"]]
    for step, weight_decay in enumerate((0.1, 0.0, 0.2)):
        for worker in workers:
            worker.param_groups[0]["weight_decay"] = weight_decay
        trace = step_with(workers, [gradients(step, worker) for worker in range(2)])
        assert len(trace) == 2
        errors.append(workers[0].state[parameters_of(workers[0])[0]]["error"])
    assert len(set(map(id, errors))) == 2  # by turns: no buffer was made anew


def test_neither_a_second_optimizer_nor_missing_gradients_compile_anything() -> None:
    for number in range(2):
        [worker] = make_workers(start(), 1, lr=0.1, momentum=0.9, compile=True)
        if number:
            counters.clear()
        step_with([worker], [gradients(0, 0)])
    before = [p.detach().clone() for p in parameters_of(worker)]
    step_with([worker], [[None, *gradients(1, 0)[1:]]])
    assert torch.equal(parameters_of(worker)[0], before[0])
    assert not torch.equal(parameters_of(worker)[1], before[1])
    assert not counters["frames"]["total"]


class Failing(Fusion):
    """A compiler whose disk is full."""

    def _segment(self, *_: Any) -> Any:
        def segment(*_: Any) -> None:
            raise TorchDynamoException("no space left on device")

        return segment


def test_a_compiler_that_fails_later_is_given_up_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = Failing()
    monkeypatch.setattr("efsgd.compressors.powersgd.shared_fusion", lambda: failing)
    [ours] = make_workers(start(), 1, lr=0.1, momentum=0.9, compile=True)
    [theirs] = make_workers(start(), 1, lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="no space left on device") as record:
        for step in range(2):
            step_with([ours], [gradients(step, 0)])
    assert len([w for w in record if w.category is UserWarning]) == 1
    for step in range(2):
        step_with([theirs], [gradients(step, 0)])
    for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reason", ["no compiler", "a compiler that fails"])
def test_workers_of_which_one_cannot_compile_refuse_to_train(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = make_workers(start(), 2, lr=0.1, compile=True)
    if reason == "no compiler":
        answers = iter([True, False])
        monkeypatch.setattr("efsgd.compressors.powersgd.has_compiler", lambda _: next(answers))
    else:
        fusions = iter([shared_fusion(), Failing()])
        monkeypatch.setattr("efsgd.compressors.powersgd.shared_fusion", lambda: next(fusions))
    set_gradients(workers, [gradients(0, 0)] * 2)
    words = r"0: .*, compiled; worker 1: .*, eager"
    with warnings.catch_warnings(), unchanged(workers):
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(WorkerMismatchError, match=words):
            step_together(workers)


def test_an_error_that_is_not_the_compiler_s_is_raised() -> None:
    class Broken(Fusion):
        def _segment(self, *_: Any) -> Any:
            def segment(*_: Any) -> None:
                raise RuntimeError("half done")

            return segment

    x = torch.zeros(512, 640)
    with pytest.raises(RuntimeError, match="half done"):
        Broken().apply_(lambda *_: None, torch.zeros(512, 1), torch.zeros(1, 640), [x], {})


@pytest.mark.without_compiler
def test_settings_are_refused_and_kept_where_they_belong() -> None:
    with pytest.raises(ValueError, match=r"Invalid compile: 'yes'\. Must be a bool"):
        PowerSGDOptimizer([torch.zeros(3, requires_grad=True)], compile="yes")
    compiled, eager = (PowerSGDOptimizer([torch.zeros(3, requires_grad=True)], compile=c)
                       for c in (True, False))  # fmt: skip
    eager.load_state_dict(compiled.state_dict())  # of another machine, perhaps
    assert not eager.param_groups[0]["compile"]
