"""Running statistics are averaged, all other buffers are those of one worker."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from efsgd import WorkerMismatchError, average_buffers, broadcast_buffers
from efsgd.integrations.model_buffers import buffer_exchange
from efsgd.testing import lockstep
from efsgd.testing.gradients import made_up
from tests.simulation import bits

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]


def module_of(**buffers: Tensor) -> nn.Module:
    module = nn.Module()
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def drawn(shape: tuple[int, ...], dtype: torch.dtype, *path: int) -> Tensor:
    values = 100 * made_up("gaussian", shape, *path)
    if dtype.is_complex:
        return torch.complex(values, made_up("gaussian", shape, *path, 1)).to(dtype)
    return values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


def exchanged(modules: list[Any], *arguments: Any, **options: Any) -> Any:
    return lockstep([buffer_exchange(module, *arguments, **options) for module in modules]).trace


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
            st.sampled_from(["running_mean", "running_var", "codebook", "chosen"]),
            st.sampled_from(["plain", "strided", "conjugated"]),
        ),
        max_size=6,
    ),
    st.integers(0, 3),
)
def test_statistics_are_means_and_all_else_is_of_one_worker(
    world_size: int, kinds: list[tuple[Any, Any, str, str]], source: int
) -> None:
    source %= world_size

    def a_module(worker: int) -> nn.Module:
        whole = nn.Module()
        for number, (dtype, shape, name, form) in enumerate(kinds):
            buffer = drawn(shape, dtype, worker, number)
            if form == "strided" and len(shape) > 1:
                buffer = buffer.transpose(0, 1)
            if form == "conjugated":
                buffer = buffer.conj()
            whole.add_module(f"layer{number}", module_of(**{name: buffer}))
        return whole

    modules = [a_module(worker) for worker in range(world_size)]
    before = [
        {name: b.resolve_conj().clone() for name, b in module.named_buffers()} for module in modules
    ]
    is_float = {name: b.is_floating_point() or b.is_complex() for name, b in before[0].items()}
    also = [name for name in before[0] if name.endswith("chosen") and is_float[name]]
    exchanged(modules, also, source)
    for name, own in before[source].items():
        expected = own
        if is_float[name] and (name in also or "running" in name):
            exact = torch.complex128 if own.is_complex() else torch.float64
            mean = torch.stack([each[name].to(exact) for each in before]).mean(0)
            # The sum is rounded in float32 at most, and what is returned in the buffer's dtype.
            expected = mean.to(own.dtype)
            for module in modules:
                torch.testing.assert_close(module.get_buffer(name), expected)
        else:
            for module in modules:
                assert bits(module.get_buffer(name).resolve_conj()) == bits(expected)
    found = [bits([b.resolve_conj() for b in module.buffers()]) for module in modules]
    assert found == [found[0]] * world_size


def test_sums_of_float16_do_not_overflow() -> None:
    modules = [module_of(running_var=torch.full((3,), 6e4, dtype=torch.float16)) for _ in range(4)]
    exchanged(modules)
    for module in modules:
        assert module.get_buffer("running_var").tolist() == [6e4] * 3


def test_a_weight_under_spectral_norm_stays_normalized() -> None:
    modules: list[Any] = []
    for worker in range(2):
        torch.manual_seed(0)
        layer = spectral_norm(nn.Linear(12, 10))
        # The same weight, and vectors of its own: they may even have opposite signs.
        for buffer in layer.buffers():
            buffer.mul_(-1.0 if worker else 1.0)
        modules.append(layer.eval())
    expected = bits(list(modules[0].buffers()))
    exchanged(modules)
    for module in modules:
        assert bits(list(module.buffers())) == expected
        norm = torch.linalg.matrix_norm(module.weight.detach(), 2)
        assert 0.9 < norm < 1.5  # power iteration has only begun; with the mean it divides by 0


def test_two_collectives_for_each_device_and_precision() -> None:
    trace = exchanged([nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(5)]) for _ in range(2)])
    kinds = [(each.kind, each.shape) for each in trace if each.purpose == "buffers"]
    assert kinds == [("AllReduceMean", (40,)), ("Broadcast", (40,))]


def test_buffers_that_are_the_same_tensor_are_sent_once() -> None:
    modules = []
    for worker in range(2):
        statistics = torch.full((4,), float(worker))
        modules.append(
            nn.Sequential(module_of(alias=statistics), module_of(running_mean=statistics))
        )
    trace = exchanged(modules, ["1.running_mean"])
    assert [each.shape for each in trace if each.purpose == "buffers"] == [(4,)]
    assert modules[1].get_buffer("0.alias").tolist() == [0.5] * 4


def test_buffers_of_inference_mode_are_written() -> None:
    modules = []
    for worker in range(2):
        with torch.inference_mode():
            modules.append(module_of(cache=torch.full((2,), float(worker))))
    exchanged(modules)
    assert modules[1].get_buffer("cache").tolist() == [0.0, 0.0]


REFUSED = {
    "expanded": lambda: torch.zeros(1).expand(4),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "float8": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    "meta device": lambda: torch.zeros(3, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "not initialized": lambda: nn.parameter.UninitializedBuffer(),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_sent_is_refused_before_anything_changes(kind: str) -> None:
    modules = [
        module_of(running_mean=torch.full((3,), float(worker)), odd=REFUSED[kind]())
        for worker in range(2)
    ]
    for options in ({}, {"averages": False}):
        with pytest.raises(ValueError, match=f"Invalid module: its buffer odd is .*{kind}"):
            exchanged(modules, **options)
        assert [m.get_buffer("running_mean").tolist() for m in modules] == [[0.0] * 3, [1.0] * 3]
    with pytest.raises(ValueError, match="Invalid module: its buffer odd"):
        average_buffers(modules[0])
    with pytest.raises(ValueError, match="Invalid module: its buffer odd"):
        broadcast_buffers(modules[0])


def test_a_name_in_also_must_be_of_a_buffer_of_numbers() -> None:
    module = nn.BatchNorm1d(3)
    for bad in ("running_means", "num_batches_tracked"):
        with pytest.raises(ValueError, match=f"Invalid also: '{bad}'"):
            average_buffers(module, also=[bad])
    average_buffers(module, also="running_mean")  # one name is no list of letters


def test_what_differs_between_workers_is_an_error_on_all() -> None:
    sources = [buffer_exchange(nn.BatchNorm1d(3), (), source) for source in (0, 1)]
    with pytest.raises(WorkerMismatchError, match=r"buffers of worker 0.*buffers of worker 1"):
        lockstep(sources)
    chosen = [module_of(codebook=torch.ones(2)) for _ in range(2)]
    with pytest.raises(WorkerMismatchError, match=r"codebook.*averaged.*codebook.*taken"):
        lockstep([buffer_exchange(chosen[0], ["codebook"]), buffer_exchange(chosen[1])])
    # One that has an error of its own says so to the others, who would wait for it otherwise.
    odd = [module_of(running_mean=torch.zeros(1).expand(size)) for size in (4, 1)]
    with pytest.raises(WorkerMismatchError, match="its buffer running_mean is expanded"):
        lockstep([buffer_exchange(module) for module in odd])


@pytest.mark.parametrize("source", [1, -1, 0.5, "0", True])
def test_a_source_must_be_a_worker(source: Any) -> None:
    with pytest.raises(ValueError, match="Invalid source"):
        broadcast_buffers(nn.BatchNorm1d(3), source)


def test_one_worker_keeps_its_buffers() -> None:
    module = module_of(
        running_mean=drawn((4,), torch.float16, 0), other=drawn((4,), torch.int16, 1)
    )
    before = bits(list(module.buffers()))
    average_buffers(module)
    broadcast_buffers(module)
    assert bits(list(module.buffers())) == before
