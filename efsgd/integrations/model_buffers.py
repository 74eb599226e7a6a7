"""Buffers of a model, such as BatchNorm's statistics, which no optimizer knows of."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from efsgd.checks import plain, require_integer
from efsgd.layout import real_view
from efsgd.wire.collectives import AllReduceMean, Broadcast, Exchange, run
from efsgd.wire.compare import compare
from efsgd.wire.transports import Workers, transport_of

# What the normalization layers of torch call their statistics.
_STATISTICS = "running_mean", "running_var"


def average_buffers(
    module: nn.Module, process_group: Workers = None, *, also: Iterable[str] = ()
) -> None:
    """Gives all workers the mean of their running statistics, and worker 0's other buffers.

    Running statistics are the buffers named running_mean and running_var, as in BatchNorm. Means of
    other things would be nonsense: of the unit vectors of spectral_norm, of random features, of
    codebooks, of counters. So these are taken from worker 0. Every worker of the group must call
    it, for example before an evaluation or a checkpoint.

    Args:
        module: the model (its buffers are modified in place).
        process_group: the workers; None is the default group. Without torch.distributed no buffer
            changes.
        also: names of more buffers that are averaged, as `module.named_buffers()` has them. Means
            are computed in float32, those of float64 and complex128 in float64.

    Raises:
        ValueError: `also` has a name that no buffer has, or one of integers; or a buffer cannot be
            sent: it is expanded, sparse, quantized, float8, on the meta device or not initialized.
            Nothing has changed.
        WorkerMismatchError: the workers' models have different buffers; nothing has changed.
        CollectiveError: a collective failed; nothing has changed on this worker.

    Example:
        >>> from efsgd import average_buffers
        >>> average_buffers(torch.nn.BatchNorm1d(4))
    """
    run(buffer_exchange(module, also), transport_of(process_group), "average_buffers()")


def broadcast_buffers(model: nn.Module, source: int = 0, process_group: Workers = None) -> None:
    """Gives all workers the buffers of one, as `broadcast_parameters` does with the parameters.

    Every worker of the group must call it, for example before the first step, where workers have
    drawn buffers of their own: random features, the vectors of spectral_norm.

    Args:
        model: the model (its buffers are modified in place).
        source: the worker whose buffers are taken, counted within the group.
        process_group: the workers; None is the default group. Without torch.distributed no buffer
            changes.

    Raises:
        ValueError: there is no such worker; or a buffer cannot be sent: it is expanded, sparse,
            quantized, float8, on the meta device or not initialized. Nothing has changed.
        WorkerMismatchError: the workers' models have different buffers, or the workers name
            different sources; nothing has changed.
        CollectiveError: a collective failed; nothing has changed on this worker.

    Example:
        >>> from efsgd import broadcast_buffers
        >>> broadcast_buffers(torch.nn.BatchNorm1d(4))
    """
    transport = transport_of(process_group)
    require_integer("source", source, 0, transport.world_size - 1)
    exchange = buffer_exchange(model, source=plain(source), averages=False)
    run(exchange, transport, "broadcast_buffers()")


def buffer_exchange(
    module: nn.Module, also: Iterable[str] = (), source: int = 0, *, averages: bool = True
) -> Exchange[None]:
    """`average_buffers` as an exchange, for any driver; `broadcast_buffers` where it does not."""
    named, lines = dict(module.named_buffers()), [f"buffers of worker {source}"]
    names = [also] if isinstance(also, str) else list(also)
    error = next(_errors(named, module, names), None)
    averaged = _averaged(module, names) if averages else frozenset()
    for name, buffer in named.items() if error is None else ():
        how = "averaged" if id(buffer) in averaged else "taken from that worker"
        lines.append(f"buffer {name}, {list(buffer.shape)}, {buffer.dtype}, {how}")
    tensors = itertools.chain(named.values(), module.parameters())
    device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
    # An error is compared as well, so that no worker waits for one that has met it.
    yield from compare(lines if error is None else [error], device)
    if error is not None:
        raise ValueError(error)
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for buffer in named.values():
        dtype = _wide(buffer.dtype) if id(buffer) in averaged else torch.uint8
        kinds.setdefault((buffer.device, dtype), []).append(buffer)
    found: list[tuple[Tensor, Tensor]] = []
    for (_, dtype), buffers in kinds.items():
        parts = [_flat(buffer, dtype) for buffer in buffers]
        flat = torch.cat(parts)
        if dtype == torch.uint8:
            answer = yield Broadcast(flat, "buffers", source)
        else:
            answer = yield AllReduceMean(flat, "buffers")
        found += zip(buffers, answer.split([len(part) for part in parts]), strict=True)
    for buffer, values in found:  # only now that no collective can fail any more
        _write_(buffer, values)


def _errors(named: Mapping[str, Tensor], module: nn.Module, also: Iterable[str]) -> Iterator[str]:
    """What speaks against sending these buffers, and averaging those in `also`."""
    known = dict(module.named_buffers(remove_duplicate=False))
    for name in also:
        if name not in known:
            yield (
                f"Invalid also: {name!r}. Must be names of buffers, as module.named_buffers() has "
                f"them: {', '.join(known) or 'there are none'}."
            )
        elif not (known[name].is_floating_point() or known[name].is_complex()):
            yield (
                f"Invalid also: {name!r}. Must be names of floating-point or complex buffers, and "
                f"this one is {known[name].dtype}: leave it out to take it from worker 0."
            )
    for name, buffer in named.items():
        if reason := _obstacle(buffer):
            yield (
                f"Invalid module: its buffer {name} {reason}. Buffers that are sent must be dense "
                f"tensors with memory of their own, of a dtype that torch.distributed knows. "
                f"Register a copy of such a kind (buffer.clone()), or make it no buffer."
            )


def _obstacle(buffer: Tensor) -> str | None:
    """Why a buffer cannot be sent, if so."""
    if is_lazy(buffer):
        return "is not initialized: its first forward pass is yet to come"
    if buffer.is_meta:
        return "is on the meta device"
    if buffer.layout != torch.strided:
        return "is sparse"
    if buffer.is_quantized or hasattr(buffer, "__tensor_flatten__"):
        return f"is a quantized or wrapped tensor ({type(buffer).__name__})"
    if buffer.is_floating_point() and buffer.element_size() == 1:
        return f"is {buffer.dtype}"
    if any(n > 1 and step == 0 for n, step in zip(buffer.shape, buffer.stride(), strict=True)):
        return "is expanded: several elements share their memory"
    return None


def _averaged(module: nn.Module, also: Sequence[str]) -> frozenset[int]:
    """The ids of the buffers that are averaged."""
    return frozenset(
        id(buffer)
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if (buffer.is_floating_point() or buffer.is_complex())
        and (name in also or name.rpartition(".")[2] in _STATISTICS)
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _flat(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """Its values as real numbers of this dtype, or its bytes for torch.uint8; a copy."""
    values = real_view(buffer.resolve_neg()).reshape(-1)
    is_bytes = dtype == torch.uint8
    own = torch.empty(len(values), dtype=values.dtype if is_bytes else dtype, device=values.device)
    return own.copy_(values).view(dtype)


def _write_(buffer: Tensor, flat: Tensor) -> None:
    """Writes what `_flat` made of a buffer, or the mean of it, back into one like it."""
    if flat.dtype == torch.uint8:
        flat = flat.clone().view(buffer.dtype)  # bytes may lie anywhere, numbers may not
    elif buffer.is_complex():
        flat = torch.view_as_complex(flat.clone().view(-1, 2))  # pairs may not lie anywhere
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        buffer.copy_(flat.view(buffer.shape))
