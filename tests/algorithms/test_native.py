"""Native passes compute what the algorithm files say, to rounding, and the same bits everywhere."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import CollectiveError, GradientAverager, PowerSGD, WorkerMismatchError
from efsgd.algorithms.error_feedback import descend_
from efsgd.algorithms.interfaces import copy_
from efsgd.algorithms.low_rank.native import build
from efsgd.algorithms.low_rank.native.passes import Passes
from efsgd.algorithms.sgd import sgd_
from efsgd.layout import Blocks, Entry, Layout
from efsgd.testing import step_together
from tests.simulation import (
    bits,
    difference,
    make_workers,
    parameters_of,
    replicated,
    set_gradients,
    snapshot,
    step_with,
    unchanged,
)
from tests.strategies import LAYOUTS, examples, gaussian, with_layout

# Of each rank a library is made once, in seconds. Others differ in a number that is compiled in.
RANKS = (1, 4)
# More rows and more columns than one sum has, by a few; blocks of rows and columns and what is left
# of them; a stack of two matrices, a convolution, and a batch of several.
SHAPES = [(521, 12), (3, 4099), (2, 9, 21), (16, 8, 3, 3), (20, 9), (20, 9), (8,), (20, 9)]


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    try:
        build.require_processor()
        build.compiler_at_hand()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    yield


def layout_of(shapes: Sequence[tuple[int, ...]], rank: int) -> Layout:
    return Layout.plan(
        Entry(
            index,
            shape,
            None if len(shape) < 2 else min(rank, shape[-2], shape[-1]) if stacked else rank,
            int(stacked),
        )
        for index, shape in enumerate(shapes)
        if (stacked := shape == (2, 9, 21)) or True
    )


class Case:
    """Matrices and factors, and the same in float64."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], rank: int) -> None:
        layout = self.layout = layout_of(shapes, rank)
        self.deltas, self.errors = (
            Blocks(layout, torch.float32, torch.device("cpu")) for _ in range(2)
        )
        self.errors.flat.copy_(gaussian((layout.matrix_floats,), 1))
        self.gradients: dict[int, Tensor | None] = {
            e.index: gaussian(e.shape, 2, e.index).float() for e in layout.entries
        }
        sizes = [(len(b.matrices), b.rows, b.columns) for b in layout.batches]
        self.Q = [gaussian((b, rank, m), 3, k).float() for k, (b, _, m) in enumerate(sizes)]
        # One column after the other, or one row.
        self.P = [
            gaussian((b, rank, n) if k % 2 else (b, n, rank), 4, k).float()
            for k, (b, n, _) in enumerate(sizes)
        ]
        self.P = [P.mT if k % 2 else P for k, P in enumerate(self.P)]
        self.passes = Passes.of(layout, self.deltas.flat)
        assert self.passes.are_native
        self.all = frozenset(range(len(sizes)))

    def added(self, scale: float) -> list[Tensor]:
        g = Blocks(self.layout, torch.float64, torch.device("cpu"))
        for entry in self.layout.entries:
            gradient = self.gradients[entry.index]
            if entry.level is not None and gradient is not None:
                g.views[entry.index].copy_(gradient)
        e = self.errors.batches
        return [a.double() + scale * b for a, b in zip(e, g.batches, strict=True)]


def close(
    found: Sequence[Tensor], expected: Sequence[Tensor], magnitudes: Sequence[Tensor]
) -> None:
    """Within 2^-20 of sums of magnitudes: rounding in float32, 2^-24 each, in sums of sums."""
    for a, b, scale in zip(found, expected, magnitudes, strict=True):
        assert ((a.double() - b).abs() <= 2.0**-20 * scale + 1e-30).all()


SMALL = [shape for shape in SHAPES if shape[0] != 3]  # whose rank can be 4


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("scale", [1.0, 0.375])
def test_each_pass_is_that_of_float64(rank: int, scale: float) -> None:
    case = Case(SHAPES if rank < 4 else SMALL, rank)
    case.gradients[4] = None
    case.gradients[5] = with_layout(case.gradients[5], "transposed")  # type: ignore[arg-type]
    D, P = case.added(scale), [torch.full_like(P, torch.nan) for P in case.P]
    Q = [each.double() for each in case.Q]
    case.passes.lines_7_and_3(case.deltas, case.errors, case.gradients, scale, case.Q, P)
    assert case.passes.served == case.all
    close(case.deltas.batches, D, [M.abs() for M in D])
    close(P, [M @ q.mT for M, q in zip(D, Q, strict=True)],
          [M.abs() @ q.mT.abs() for M, q in zip(D, Q, strict=True)])  # fmt: skip

    D, P_hat = [M.double() for M in case.deltas.batches], [p.double() for p in case.P]
    floats = sum(q.numel() for q in Q)
    found, own = (torch.full((floats,), torch.nan) for _ in range(2))
    assert case.passes.line_6(case.deltas, case.P, found, own) == case.all
    assert torch.equal(found, own)
    parts = [part.view_as(q) for part, q in zip(found.split([q.numel() for q in Q]), Q)]  # noqa: B905
    close(parts, [p.mT @ M for p, M in zip(P_hat, D, strict=True)],
          [p.mT.abs() @ M.abs() for p, M in zip(P_hat, D, strict=True)])  # fmt: skip

    assert case.passes.line_9(case.deltas, case.P, case.Q) == case.all
    products = [p @ q for p, q in zip(P_hat, Q, strict=True)]
    sums = [M.abs() + p.abs() @ q.abs() for M, p, q in zip(D, P_hat, Q, strict=True)]
    close(case.deltas.batches, [M - pq for M, pq in zip(D, products, strict=True)], sums)


SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": False}
RULES: list[tuple[Any, dict[str, Any]]] = [
    (descend_, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (descend_, {"lr": 0.1, "momentum": 0.9, "maximize": True, "clip": 0.5}),
    (sgd_, {**SGD, "is_first": False, "nesterov": True, "weight_decay": 0.01}),
    (sgd_, {**SGD, "is_first": False, "dampening": 0.3, "maximize": True}),
    (sgd_, {**SGD, "is_first": True, "dampening": 0.3, "nesterov": False}),
    (sgd_, {**SGD, "is_first": True, "nesterov": True, "clip": 0.5}),
    (copy_, {"clip": 0.5}),
    (copy_, {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(("rule", "options"), RULES, ids=lambda v: getattr(v, "__name__", None))
def test_each_rule_is_that_of_float64(
    rule: Any, options: dict[str, Any], momentum: bool, dtype: torch.dtype
) -> None:
    case, wanted = Case(SMALL, 4), [1, 2, 4]  # all others stay as they are
    shapes = {entry.index: entry.shape for entry in case.layout.entries}
    operands = [
        {i: gaussian(shapes[i], 5, i, n).to(dtype) for i in shapes}
        for n in range(2 if momentum and rule is not copy_ else 1)
    ]
    ends = [{i: x.double() for i, x in own.items() if i in wanted} for own in operands]
    factors = zip(case.layout.batches, case.P, case.Q, strict=True)
    updates = {
        entry.index: part.reshape(entry.shape)
        for batch, P, Q in factors
        for entry, part in batch.split(P.double() @ Q.double())
    }
    own = [[each[i] for i in wanted] for each in ends]
    rule([updates[i].clone() for i in wanted], *own, **options)
    before = [{i: x.clone() for i, x in each.items()} for each in operands]
    versions = [x._version for x in operands[0].values()]
    given = [{i: x for i, x in each.items() if i in wanted} for each in operands]
    done = case.passes.lines_11_to_13(case.P, case.Q, rule, given, options)
    assert done == set(wanted)
    # Of bfloat16 the last of 8 bits; products of four terms, and a few sums, in float32.
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-20
    for each, expected, old in zip(operands, ends, before, strict=True):
        for i, x in each.items():
            if i in wanted:
                assert difference(x, expected[i]) < unit
            else:
                assert torch.equal(x, old[i])
    assert [x._version for x in operands[0].values()] == [
        version + (i in wanted) for i, version in enumerate(versions)
    ]


@pytest.mark.parametrize("rank", RANKS)
def test_threads_change_no_bit(rank: int) -> None:
    shapes = [(700, 300), (300, 700), (90, 4099), (20, 9)]  # several threads' worth
    ends = []
    for threads in (1, 2, 3):
        case = Case(shapes, rank)
        Q = torch.zeros(sum(q.numel() for q in case.Q))
        x, w = ({i: gaussian(s, 5 + n, i).float() for i, s in enumerate(shapes)} for n in (0, 1))
        torch.set_num_threads(threads)
        try:
            case.passes.lines_7_and_3(case.deltas, case.errors, case.gradients, 1.0, case.Q, case.P)
            case.passes.line_6(case.deltas, case.P, Q, torch.zeros_like(Q))
            case.passes.line_9(case.deltas, case.P, case.Q)
            options = {"lr": 0.1, "momentum": 0.9}
            case.passes.lines_11_to_13(case.P, case.Q, descend_, [x, w], options)
        finally:
            torch.set_num_threads(1)
        ends.append(bits([case.deltas.flat, case.P, Q, x, w]))
    assert ends[0] == ends[1] == ends[2]


FORMS: list[dict[str, Any]] = [
    {"momentum_form": "paper", "momentum": 0.9, "weight_decay": 0.01},
    {"momentum_form": "paper", "maximize": True, "warm_start": False},
    {"momentum_form": "paper", "momentum": 0.5, "alternating": True},
    {"momentum_form": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum_form": "sgd", "momentum": 0.9, "dampening": 0.3, "error_feedback": False},
    {"momentum_form": "sgd", "max_grad_norm": 1.0},
]
shapes = st.lists(
    st.sampled_from([(12, 10), (17, 9), (9, 4, 3, 3), (7,), (64, 40), (40, 64)]),
    min_size=1,
    max_size=5,
)


@examples(20)
@given(
    shapes,
    st.sampled_from(RANKS),
    st.sampled_from(FORMS),
    st.lists(st.sampled_from(LAYOUTS[:3]), min_size=5, max_size=5),
    st.frozensets(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 4)), max_size=3),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 1000),
)
def test_steps_are_eager_ones_to_rounding(
    shapes: list[tuple[int, ...]],
    rank: int,
    form: dict[str, Any],
    layouts: list[str],
    missing: frozenset[tuple[int, int, int]],
    skipped: int | None,
    seed: int,
) -> None:
    options = {"lr": 0.1, "rank": rank, "nonfinite": "skip", "cuts": [2], **form}
    start = [
        with_layout(gaussian(s, seed, i).float(), kind)
        for i, (s, kind) in enumerate(zip(shapes, layouts, strict=False))
    ]
    native = make_workers(start, 2, compile=True, **options)
    eager, exact = (make_workers([x.to(d) for x in start], 2, **options)
                    for d in (torch.float32, torch.float64))  # fmt: skip
    for step in range(4):
        given = [
            [
                None if (step, w, i) in missing else gaussian(s, seed, step, w, i).float()
                for i, s in enumerate(shapes)
            ]
            for w in range(2)
        ]
        if step == skipped and given[0][0] is not None:
            given[0][0][(0,) * given[0][0].dim()] = torch.nan
        for workers in (native, eager, exact):
            step_with(workers, given)
    assert replicated(native[0]) == replicated(native[1])
    for ours, theirs, best in zip(native, eager, exact, strict=True):
        assert ours.param_groups[0]["step"] == best.param_groups[0]["step"]
        for a, b, c in zip(*map(parameters_of, (ours, theirs, best)), strict=True):
            # Rounding of 2^-24 in each of some sums of each step; where P is nearly dependent it
            # grows, in eager steps as well.
            assert difference(a, c) < 4e-6 + 4 * difference(b, c)
            for key in {"error", "q", "momentum_buffer"} & ours.state[a].keys():
                own, usual, true = (o.state[p][key] for o, p in ((ours, a), (theirs, b), (best, c)))
                assert difference(own, true) < 4e-6 + 4 * difference(usual, true)


def a_team(number: int = 2, **options: Any) -> list[Any]:
    start = [gaussian(s, 1, i).float() for i, s in enumerate(SMALL)]
    own = {"lr": 0.1, "momentum": 0.9, "rank": 4, "compile": True, **options}
    return make_workers(start, number, **own)


def gradients(step: int, worker: int) -> list[Tensor]:
    return [gaussian(s, 2, step, worker, i).float() for i, s in enumerate(SMALL)]


@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_step_that_fails_changes_nothing(fail_at: int) -> None:
    failing, twins = a_team(), a_team()
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
    assert bits(snapshot(failing)) == bits(snapshot(twins))


def test_a_worker_that_fails_after_the_first_pass_takes_part_with_zeros() -> None:
    failing, twins = a_team(), a_team()
    for step in range(3):
        given = [gradients(step, worker) for worker in range(2)]
        if step == 1:
            set_gradients(failing, given)
            vector = parameters_of(failing[1])[5].grad
            assert vector is not None
            before, vector.data = bits(snapshot(failing)), torch.zeros(3)
            with pytest.raises(RuntimeError, match="size"):
                step_together(failing)
            vector.data = torch.zeros(8)
            assert bits(snapshot(failing)) == before
        step_with(failing, given)
        step_with(twins, given)
    assert bits(snapshot(failing)) == bits(snapshot(twins))


def test_powers_of_two_change_no_digit() -> None:
    ends = []
    for factor in (1.0, 2.0**-60, 2.0**40):
        [worker] = a_team(1, momentum=0.0)
        for x in parameters_of(worker):
            x.data.zero_()
        for step in range(3):
            step_with([worker], [[factor * g for g in gradients(step, 0)]])
        ends.append(bits([x.detach() / factor for x in parameters_of(worker)]))
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (520, 11), (260, 7)])
def test_what_is_not_finite_is_noticed(bad: float, place: tuple[int, int]) -> None:
    workers = a_team(nonfinite="skip")
    step_with(workers, [gradients(0, worker) for worker in range(2)])
    given = [gradients(1, worker) for worker in range(2)]
    given[1][0][place] = bad
    set_gradients(workers, given)
    with unchanged(workers):
        step_together(workers)


def test_an_averager_writes_gradients() -> None:
    ends = []
    for compile in (True, False):
        ps = [torch.zeros(s, requires_grad=True) for s in SMALL]
        averager = GradientAverager(ps, PowerSGD(rank=4, compile=compile))
        for step in range(2):
            for p, g in zip(ps, gradients(step, 0), strict=True):
                p.grad = with_layout(g, LAYOUTS[step])
            averager.average_()
        ends.append([p.grad for p in ps])
    for a, b in zip(*ends, strict=True):
        assert a is not None and b is not None and difference(a, b) < 4e-6


def test_other_ranks_and_dtypes_are_left_to_eager_code() -> None:
    for options, dtype in (({"rank": 9}, torch.float32), ({"rank": 1}, torch.float64)):
        start = [torch.ones(40, 30, dtype=dtype)]
        ends = []
        for compile in (True, False):
            workers = make_workers(start, 1, lr=0.1, compile=compile, **options)
            step_with(workers, [[gaussian((40, 30), 1)]])
            assert workers[0].engine.plan.numerics == ("eager",)
            ends.append(bits(snapshot(workers)[0][0]))
        assert ends[0] == ends[1]


def test_workers_of_which_one_has_no_passes_refuse_to_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers, answers = a_team(), itertools.cycle([Passes.of, lambda layout, _: Passes(layout, {})])
    with monkeypatch.context() as context, warnings.catch_warnings():
        context.setattr(Passes, "of", lambda *args: next(answers)(*args))
        warnings.simplefilter("ignore", UserWarning)
        set_gradients(workers, [gradients(0, 0)] * 2)
        words = r"0: .*, native; worker 1: .*, eager.*all of them need a compiler"
        with unchanged(workers), pytest.raises(WorkerMismatchError, match=words):
            step_together(workers)
