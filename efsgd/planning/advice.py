"""Whether compression pays, and which: predictions for each candidate, and what they say."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from efsgd.algorithms.interfaces import Compressor
from efsgd.checks import require_number
from efsgd.compressors import LQSGD, PowerSGD, SignNorm, TopK, UniformQuantized
from efsgd.planning.alpha_beta import Link
from efsgd.planning.measuring import (
    Work,
    averaged,
    measure_link,
    measure_passes,
    measure_update,
    measure_work,
)
from efsgd.planning.prediction import Setup, ranges_where
from efsgd.planning.report import Plan, Row, describe
from efsgd.planning.sending import Sending
from efsgd.planning.tensors import trained_of
from efsgd.wire.transports import Workers

#: The name of what SGD computes after the backward pass, among measured seconds.
UPDATE = "SGD"

# Where break-even points are looked for: 1 kB/s to 10 TB/s, and up to 100,000 workers.
_BANDWIDTHS = [10 ** (exponent / 8) for exponent in range(3 * 8, 13 * 8 + 1)]
_WORKERS = sorted({2, *(round(10 ** (exponent / 8)) for exponent in range(3, 5 * 8 + 1))})


def default_candidates(ranks: Iterable[int] = (1, 2, 4, 8)) -> dict[str, Compressor]:
    """What is compared where nothing else is asked for, by name.

    Args:
        ranks: of PowerSGD.
    """
    return {
        **{f"PowerSGD(rank={rank})": PowerSGD(rank) for rank in ranks},
        "TopK(density=0.01)": TopK(density=0.01),
        "SignNorm()": SignNorm(),
        "UniformQuantized(bits=8)": UniformQuantized(bits=8),
        "LQSGD(rank=4, bits=8)": LQSGD(rank=4, bits=8),
    }


def advise(
    model: nn.Module | Iterable[Tensor | Sequence[int]],
    *,
    workers: int | None = None,
    bandwidth: float | None = None,
    latency: float | None = None,
    algorithm: str = "ring",
    forward: float | None = None,
    backward: float | None = None,
    loss: Callable[[], Tensor] | None = None,
    compute: Mapping[str, float | Sequence[float]] | None = None,
    candidates: Mapping[str, Compressor] | None = None,
    process_group: Workers = None,
) -> Plan:
    """Predicts whole steps with and without compression, and says what to use.

    What is not given is measured: the network where bandwidth or latency are missing, by the
    workers of `process_group`, all of which must then make the call; passes by `loss`; and what
    compressing takes by steps of real optimizers on this machine, on the device of the model.

    Args:
        model: a module, its parameters, or shapes of what is trained, taken for float32 on the CPU.
        workers: how many there will be, at least 2; None: as many as are in the group.
        bandwidth: bytes per second of a worker's link, in each direction.
        latency: seconds of a round of a collective; see `Link`.
        algorithm: of the all-reduce: "ring", which is gloo's, or "tree".
        forward: seconds of a forward pass.
        backward: seconds of a backward pass.
        loss: runs a forward pass of the model and returns the loss; in place of the two, which
            are then measured, and with them when each gradient is there. Gradients of the
            model are None afterwards.
        compute: seconds by name of the candidate, and of "SGD", for its update: a number, or two,
            of a step and of decompressing what each further worker sent. As in `Plan.to_json`.
        candidates: compressors by name; None: `default_candidates()`.
        process_group: the workers, where something is measured; None is the default group.

    Raises:
        ValueError: a number is out of range; or it is missing, and cannot be measured.
        TypeError: the model is none.

    Example:
        >>> from efsgd.planning import advise
        >>> plan = advise(
        ...     [(4096, 1024), (1024,)],
        ...     workers=16,
        ...     bandwidth=125e6,  # 1 Gbit/s
        ...     latency=0.0002,
        ...     forward=0.02,
        ...     backward=0.04,
        ...     compute={"SGD": 0.004, "PowerSGD(rank=4)": 0.012},
        ...     candidates={"PowerSGD(rank=4)": efsgd.PowerSGD(rank=4)},
        ... )
        >>> plan.best, round(plan.ddp, 3), round(plan.rows[0].seconds, 3)
        ('PowerSGD(rank=4)', 0.316, 0.085)
    """
    model = model if isinstance(model, nn.Module) else list(model)
    trained = trained_of(model)
    chosen = default_candidates() if candidates is None else dict(candidates)
    given = {name: work_of(name, value) for name, value in (compute or {}).items()}
    _require_passes(forward, backward, loss, model)
    link = _link(workers, bandwidth, latency, algorithm, process_group, trained.device)
    if loss is not None:
        given_tensors = model.parameters() if isinstance(model, nn.Module) else model
        tensors = [t for t in given_tensors if isinstance(t, Tensor) and t.requires_grad]
        passes = measure_passes(tensors, loss)
        forward, backward = averaged([passes.forward, passes.backward], process_group)
        trained = dataclasses.replace(trained, arrivals=passes.arrivals)
    assert forward is not None and backward is not None
    sendings = {name: Sending(compressor, trained) for name, compressor in chosen.items()}
    work = dict(given)
    for name in (UPDATE, *sendings):
        if name not in work:
            own = measure_update(trained) if name == UPDATE else measure_work(sendings[name])
            work[name] = Work(*averaged(list(dataclasses.astuple(own)), process_group))
    setup = Setup(trained, forward, backward, work[UPDATE])
    return make_plan(setup, link, sendings, work)


def make_plan(
    setup: Setup, link: Link, sendings: Mapping[str, Sending], work: Mapping[str, Work]
) -> Plan:
    """The plan, once all that is measured is known."""
    rows = tuple(_row(name, setup, link, own, work[name]) for name, own in sendings.items())
    ddp, alone = setup.seconds_of_ddp(link), setup.seconds_alone()
    best = choose(rows, {name: own.compressor for name, own in sendings.items()})
    found = Plan(setup, link, dict(work), ddp, alone, rows, best, "")
    gathers = {name for name, own in sendings.items() if own.gathers}
    return dataclasses.replace(found, advice=describe(found, gathers))


def choose(rows: Sequence[Row], compressors: Mapping[str, Compressor]) -> str | None:
    """The candidate to use; None where none is faster than DDP.

    Of PowerSGD's ranks the highest that is hardly slower than the fastest, since quality grows with
    the rank; any other compressor only where no rank pays.
    """
    paying = [row for row in rows if row.speed_up > 1]
    ranks = {row: own.rank for row in paying if isinstance(own := compressors[row.name], PowerSGD)}
    if ranks:
        fastest = min(row.seconds for row in ranks)
        close = [row for row in ranks if row.seconds <= 1.05 * fastest]
        return max(close, key=lambda row: (ranks[row], -row.seconds)).name
    return min(paying, key=lambda row: row.seconds).name if paying else None


def work_of(name: str, value: float | Sequence[float]) -> Work:
    """Work from a number of seconds, or from two."""
    numbers = [value] if not isinstance(value, list | tuple) else value
    remedy = "It is in seconds; for what is gathered two numbers are given, [step, each payload]."
    for number in numbers:
        require_number(f"compute of {name!r}", number, remedy=remedy)
    if not 1 <= len(numbers) <= 2:
        raise ValueError(f"Invalid compute of {name!r}: {value!r}. Must be one or two. {remedy}")
    return Work(*map(float, numbers))


def _row(name: str, setup: Setup, link: Link, sending: Sending, work: Work) -> Row:
    def pays(at: Link) -> bool:
        return setup.seconds_of(sending, work, at) < setup.seconds_of_ddp(at)

    seconds = setup.seconds_of(sending, work, link)
    momentum = setup.trained.nbytes
    return Row(
        name,
        sending.nbytes(link.workers),
        sending.collectives(link.workers),
        work.seconds(link.workers),
        seconds,
        setup.seconds_of_ddp(link) / seconds,
        ranges_where(lambda b: pays(dataclasses.replace(link, bandwidth=b)), _BANDWIDTHS),
        ranges_where(
            lambda w: pays(dataclasses.replace(link, workers=int(w))), _WORKERS, integers=True
        ),
        momentum + sending.kept_bytes,
    )


def _require_passes(
    forward: float | None, backward: float | None, loss: Callable[[], Tensor] | None, model: Any
) -> None:
    if loss is not None and not (isinstance(model, nn.Module) or isinstance(model[0], Tensor)):
        raise ValueError("Passes of shapes cannot be measured. Give a module with loss=.")
    if loss is None:
        remedy = "It is in seconds; or give loss=, to have it measured."
        require_number("forward", forward, remedy=remedy)
        require_number("backward", backward, remedy=remedy)
    elif forward is not None or backward is not None:
        raise ValueError("Give either forward and backward, or loss, by which they are measured.")


def _link(
    workers: int | None,
    bandwidth: float | None,
    latency: float | None,
    algorithm: str,
    process_group: Workers,
    device: Any,
) -> Link:
    known = {"bandwidth": bandwidth, "latency": latency, "workers": workers}
    dummy = {"workers": 2, "latency": 0.0, "bandwidth": 1.0}
    own = {name: value for name, value in known.items() if value is not None}
    Link(**{**dummy, **own}, algorithm=algorithm)  # type: ignore[arg-type] # checks what is given
    if len(own) == len(known):
        return Link(**own, algorithm=algorithm)  # type: ignore[arg-type]
    measured = measure_link(process_group, algorithm=algorithm, device=device)
    return dataclasses.replace(measured, **own)  # type: ignore[arg-type]
