"""What a plan needs to know of a machine, measured: compressing, passes, the link."""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efsgd.optimizers.error_feedback_sgd import ErrorFeedbackSGD
from efsgd.planning.alpha_beta import Link
from efsgd.planning.sending import Echo, Sending
from efsgd.planning.tensors import Trained
from efsgd.wire.collectives import AllReduceMean, Exchange, run
from efsgd.wire.measuring import Clock, all_reduce_seconds, seconds_now
from efsgd.wire.transports import Alone, Workers, transport_of

#: What is all-reduced at first, and at most, to measure a bandwidth.
SMALL_BYTES, LARGE_BYTES, LARGEST_BYTES = 1024, 2**20, 2**26
#: The larger all-reduce must take so many times as long as the small one.
_MUCH_LONGER = 10


@dataclass(frozen=True)
class Work:
    """What a worker computes in a step besides forward and backward passes: seconds.

    Attributes:
        step: exchange and update of one worker by itself, without what is sent.
        each_payload: to decompress what one more worker has sent, where payloads are gathered.
    """

    step: float
    each_payload: float = 0.0

    def seconds(self, workers: int) -> float:
        """With so many workers."""
        return self.step + (workers - 1) * self.each_payload


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of one worker.

    Attributes:
        forward: seconds.
        backward: seconds.
        arrivals: when each gradient was there, as parts of the time of the backward pass.
    """

    forward: float
    backward: float
    arrivals: tuple[float, ...]


def measure_passes(
    parameters: list[Tensor], loss: Callable[[], Tensor], repeats: int = 3
) -> Passes:
    """Times forward and backward passes: the medians, without the first one.

    Args:
        parameters: those that are trained; their gradients are replaced.
        loss: computes a loss of them.
        repeats: how many are timed.
    """
    device, stamps = parameters[0].device, [0.0] * len(parameters)
    hooks = []
    for index, parameter in enumerate(parameters):

        def note(_: Tensor, index: int = index) -> None:
            stamps[index] = seconds_now(device)

        hooks.append(parameter.register_post_accumulate_grad_hook(note))
    found = []
    try:
        for _ in range(repeats + 1):
            for parameter in parameters:
                parameter.grad = None
            began = seconds_now(device)
            value = loss()
            middle = seconds_now(device)
            stamps[:] = [middle] * len(parameters)
            value.backward()
            ended = seconds_now(device)
            whole = max(ended - middle, 1e-9)
            arrivals = tuple((stamp - middle) / whole for stamp in stamps)
            found.append(Passes(middle - began, ended - middle, arrivals))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None
    columns = zip(*(each.arrivals for each in found[1:]), strict=True)
    return Passes(
        statistics.median(each.forward for each in found[1:]),
        statistics.median(each.backward for each in found[1:]),
        tuple(statistics.median(column) for column in columns),
    )


def measure_work(sending: Sending, *, momentum: float = 0.9, repeats: int = 5) -> Work:
    """Times steps of a real optimizer, on made-up gradients of the same shapes.

    On a CPU with one thread it is the thread's own time, else that on the wall; medians, without
    the first one. It takes about six times the memory of the parameters for a while.
    """

    def seconds(workers: int) -> float:
        transport = Alone() if workers == 1 else Echo(workers)
        parameters = _made(sending.trained)
        with warnings.catch_warnings():
            for known in ("All workers have bitwise equal gradients", "Compression saves"):
                warnings.filterwarnings("ignore", known)
            optimizer = ErrorFeedbackSGD(
                parameters,
                lr=1e-6,
                momentum=momentum,
                momentum_form="sgd",
                compressor=sending.compressor,
                process_group=transport,
            )
            return _median(optimizer.step, sending.trained.device, repeats)

    step = seconds(1)
    if not sending.gathers:
        return Work(step)
    return Work(step, max(0.0, (seconds(3) - step) / 2))


def measure_update(trained: Trained, *, momentum: float = 0.9, repeats: int = 5) -> Work:
    """The same for `torch.optim.SGD`, which sends nothing."""
    optimizer = torch.optim.SGD(_made(trained), lr=1e-6, momentum=momentum, foreach=True)
    return Work(_median(optimizer.step, trained.device, repeats))


def _made(trained: Trained) -> list[nn.Parameter]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    made = []
    for shape in trained.shapes:
        gradient = torch.randn(shape, generator=generator, dtype=trained.dtype, device="cpu")
        parameter = nn.Parameter(torch.zeros(shape, dtype=trained.dtype, device=trained.device))
        parameter.grad = gradient.to(trained.device)
        made.append(parameter)
    return made


def _median(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    is_one = device.type == "cpu" and torch.get_num_threads() == 1
    clock: Clock = time.thread_time if is_one else time.perf_counter
    durations = []
    for _ in range(repeats + 1):
        began = seconds_now(device, clock)
        step()
        durations.append(seconds_now(device, clock) - began)
    return statistics.median(durations[1:])


def measure_link(
    process_group: Workers = None,
    *,
    algorithm: str = "ring",
    device: torch.device | str = "cpu",
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> Link:
    """Measures the network between these workers by all-reduces. All of them must call it.

    It sends 1 KiB, and 1 MiB or, on fast networks, up to 64 MiB, several times each.

    Args:
        process_group: the workers; None is the default group.
        algorithm: of the backend's all-reduce: "ring" (gloo's) or "tree".
        device: of the buffers; NCCL's must be on an accelerator.
        repeats: how many all-reduces of each size are timed, at least 1.
        clock: tells seconds.

    Returns:
        The link, the same on every worker.

    Raises:
        ValueError: there is one worker, or a larger buffer was not slower.

    Example:
        Under torchrun, after ``torch.distributed.init_process_group()``::

            link = efsgd.planning.measure_link()
    """
    transport = transport_of(process_group)
    if transport.world_size == 1:
        raise ValueError(
            "There is no network to measure: this process is alone. Start several workers, with "
            "torchrun, and call init_process_group() first; or give workers, bandwidth and latency."
        )
    exchange = link_exchange(
        torch.device(device), transport.world_size, algorithm, repeats=repeats, clock=clock
    )
    return run(exchange, transport, "measure_link()")


def link_exchange(
    device: torch.device,
    workers: int,
    algorithm: str,
    *,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> Exchange[Link]:
    """`measure_link` as an exchange, for any driver."""
    nbytes = LARGE_BYTES
    while True:
        sizes = SMALL_BYTES, nbytes
        timed = yield from all_reduce_seconds(device, sizes, repeats=repeats, clock=clock)
        if timed[1] >= _MUCH_LONGER * timed[0] or nbytes >= LARGEST_BYTES:
            small, large = zip(sizes, timed, strict=True)
            return Link.measured(workers, small, large, algorithm)
        nbytes *= 4


def averaged(values: list[float], process_group: Workers = None) -> list[float]:
    """The mean of these numbers over the workers; where there is one, they are returned."""
    transport = transport_of(process_group)
    if transport.world_size == 1:
        return values

    def exchange() -> Exchange[list[float]]:
        own = torch.tensor(values, dtype=torch.float64)
        mean = yield AllReduceMean(own, "measured seconds")
        found: list[float] = mean.tolist()
        return found

    return run(exchange(), transport, "advise()")
