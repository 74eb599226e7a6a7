"""Do all workers hold the same parameters, the same settings, and the same values?

Otherwise a step would hang (buffers of different lengths), or the workers would drift apart without
a word. What is found is raised on every worker, with the same text.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Never, Self

import torch
from torch import Tensor

from efsgd.errors import WorkerMismatchError, warn_user
from efsgd.layout import is_fake, real_view
from efsgd.wire.collectives import AllGather, Broadcast, Exchange

# Causes that a difference itself does not show.
_COMPILER = "With compile=True all of them need a compiler."
_ZERO = (
    "torch's ZeroRedundancyOptimizer gives each worker other parameters: construct this optimizer "
    "directly, without it."
)

_CHUNK = 1 << 17  # of eight bytes: it and the weights stay in cache


def compare(
    lines: Sequence[str],
    device: torch.device,
    values: Mapping[str, int] | None = None,
    flags: Sequence[bool] = (),
) -> Exchange[list[bool]]:
    """Compares what workers train, and bit by bit what they hold, by one small collective.

    Only digests of fixed size are gathered; lines and checksums only if the digests differ.

    Args:
        lines: a description of what will be exchanged, without control characters.
        device: where buffers may live.
        values: checksums of what must be equal on all workers, by names for the error message.
        flags: anything that the workers want to know of each other, at most 32 of them.

    Returns:
        For each flag, whether it is set on any worker.
    """
    named = {} if values is None else values
    text = "\0".join(["\n".join(lines), "\n".join(f"there is {name}" for name in named)]).encode()
    own = list(named.values())
    word = sum(flag << position for position, flag in enumerate(flags))
    summary = [digest_of(text), len(text) << 32 | word, digest_of(repr(own).encode())]
    summaries = yield _gather(summary, device, "digests of settings, parameters and state")
    if is_fake(summaries):  # where nothing can be read, all workers are like this one
        return list(map(bool, flags))
    summaries = summaries.cpu()
    lengths = summaries[:, 1] >> 32
    if bool((summaries[:, 0] != summaries[0, 0]).any()) or bool((lengths != lengths[0]).any()):
        yield from _name_different_line(text, lengths.tolist(), device)
    if bool((summaries[:, 2] != summaries[0, 2]).any()):
        gathered = yield _gather(own, device, "checksums of parameters and state")
        _name_different_value(list(named), gathered.cpu())
    return [bool((summaries[:, 1] >> position & 1).any()) for position in range(len(flags))]


@dataclass(frozen=True)
class GradientSummary:
    """What workers need to know of each other before the first step, besides what must be equal.

    Attributes:
        digest: of all gradients' values; 0 where all are zero.
        is_sparse: of each gradient.
        threads: how many this worker computes with on a CPU.
        vector_units: of its CPU, a digest of the name that torch has for them.
    """

    digest: int
    is_sparse: tuple[bool, ...]
    threads: int = 1
    vector_units: int = 0

    @classmethod
    def of(cls, gradients: Sequence[Tensor | None]) -> Self:
        """Summarizes the gradients of all parameters, in order."""
        present = [gradient for gradient in gradients if gradient is not None]
        is_sparse = tuple(g is not None and g.layout != torch.strided for g in gradients)
        has_any = any(not is_fake(g) and bool(real_view(g).any()) for g in present)
        checksums = repr([checksum(gradient) for gradient in present])
        units = digest_of(torch.backends.cpu.get_cpu_capability().encode())
        digest = digest_of(checksums.encode()) if has_any else 0
        return cls(digest, is_sparse, torch.get_num_threads(), units)


def compare_gradients(summary: GradientSummary, device: torch.device) -> Exchange[frozenset[int]]:
    """Warns of gradients that are averaged already, and of workers that round differently.

    Returns the positions of the gradients that are sparse on any worker.
    """
    own, is_sparse = [summary.digest, int(any(summary.is_sparse))], summary.is_sparse
    own += [summary.threads, summary.vector_units]
    summaries = (yield _gather(own, device, "digests of gradients")).cpu()
    if is_fake(summaries):
        return frozenset(position for position, flag in enumerate(is_sparse) if flag)
    _warn_of_rounding(summaries[:, 2:], device)
    if len(summaries) > 1 and own[0] != 0 and bool((summaries[:, 0] == own[0]).all()):
        warn_user(
            "All workers have bitwise equal gradients, as if they had already been averaged. "
            "Give this optimizer local gradients: use the plain model, or under "
            "DistributedDataParallel ddp.register_comm_hook(None, noop_hook) with noop_hook from "
            "torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks, or forward and backward "
            "within ddp.no_sync(). With efsgd.attach, pass it the DistributedDataParallel."
        )
    if not bool(summaries[:, 1].any()):
        return frozenset()
    flags = yield _gather(list(map(int, is_sparse)), device, "which gradients are sparse")
    return frozenset(flags.cpu().any(dim=0).nonzero().flatten().tolist())


def _warn_of_rounding(arithmetic: Tensor, device: torch.device) -> None:
    """Warns where some workers' CPUs compute otherwise: QR and SVD of tall matrices show it."""
    if device.type != "cpu" or bool((arithmetic == arithmetic[0]).all()):
        return
    threads = arithmetic[:, 0].tolist()
    what = f"with {', '.join(map(str, threads))} threads (worker by worker)"
    if len(set(threads)) == 1:
        what = "on CPUs with different vector units"
    warn_user(
        f"The workers compute {what}, and round differently in QR and SVD of tall matrices: their "
        f"parameters may drift apart by rounding. Let all have the same number of threads "
        f"(OMP_NUM_THREADS=1, or torch.set_num_threads), on machines of one kind; or call "
        f"optimizer.broadcast_parameters() on all of them from time to time."
    )


def broadcast_values(tensors: Sequence[Tensor], source: int) -> Exchange[None]:
    """Gives every worker the values of worker `source`, one tensor after the other (in place)."""
    for tensor in tensors:
        own = real_view(tensor.detach())
        own.copy_((yield Broadcast(own.contiguous(), "parameters", source)))


def checksums(named: Mapping[str, Tensor]) -> dict[str, int]:
    """The checksum of each tensor, by its name."""
    return {name: checksum(value.detach()) for name, value in named.items()}


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's elements and their order; 0 for all zero bits.

    It is 0 as well where there are no values, as under FakeTensorMode.

    Example:
        >>> from efsgd.wire.compare import checksum
        >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
        False
    """
    if is_fake(tensor):
        return 0
    flat = real_view(tensor.resolve_neg()).contiguous().reshape(-1)
    # A single element may have any stride, and be contiguous all the same.
    if flat.storage_offset() * flat.element_size() % 8 != 0 or flat.stride() != (1,):
        flat = flat.new_empty(flat.shape).copy_(flat)  # so that eight bytes can be taken at a time
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = flat.view(integers[flat.element_size()])
    whole = words.numel() - words.numel() % (8 // words.element_size())
    total = _sum(words[:whole].view(torch.int64), 0)
    total = _sum(words[whole:], total)
    return total - (1 << 64) if total >> 63 else total


def _sum(integers: Tensor, total: int) -> int:
    """Goes on with a checksum, modulo 2**64."""
    weights = _weights(integers.device)
    parts = []
    for chunk in map(Tensor.long, integers.split(_CHUNK)):
        own = weights[: chunk.numel()]
        # On a CPU dot needs no memory for the products; elsewhere there is none for integers.
        parts.append(torch.dot(chunk, own) if chunk.is_cpu else (chunk * own).sum())
    for part in torch.stack(parts).tolist() if integers.numel() else ():
        total = (total * 31 + part) & (2**64 - 1)
    return total


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Random odd factors, [_CHUNK] int64: products and sums modulo 2**64 then tell values apart."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(1 << 62, (_CHUNK,), generator=generator, device="cpu")
    return (drawn * 2 + 1).to(device)


def digest_of(data: bytes) -> int:
    """64 bits, the same in all processes. Who can guess the data can check the guess."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _gather(numbers: Sequence[int], device: torch.device, purpose: str) -> AllGather:
    return AllGather(torch.tensor(numbers, dtype=torch.int64, device=device), purpose)


def _name_different_line(
    text: bytes, lengths: Sequence[int], device: torch.device
) -> Exchange[Never]:
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    gathered = yield AllGather(padded, "parameter lists")
    texts = [
        [part.split("\n") for part in bytes(row[:length].tolist()).decode().split("\0")]
        for row, length in zip(gathered.cpu(), lengths, strict=True)
    ]
    described, held = ([parts[n] for parts in texts] for n in (0, 1))
    raise WorkerMismatchError(_first_difference(described) or _first_difference(held))


def _name_different_value(names: Sequence[str], checksums: Tensor) -> Never:
    differs = checksums != checksums[0]
    position = int(differs.any(dim=0).nonzero()[0])
    differing = differs[:, position].nonzero().flatten().tolist()
    raise WorkerMismatchError(
        f"{names[position]} differs between workers: its values on {_workers(differing)} are not "
        f"those of worker 0. All workers must hold the same values: call "
        f"optimizer.broadcast_parameters() on all of them, or, for the state as well, load one "
        f"consolidated checkpoint everywhere. {_ZERO}"
    )


def _first_difference(texts: Sequence[Sequence[str]]) -> str | None:
    longest = max(len(text) for text in texts)
    for position in range(longest):
        lines = [text[position] if position < len(text) else "nothing" for text in texts]
        groups: dict[str, list[int]] = {}
        for worker, line in enumerate(lines):
            groups.setdefault(line, []).append(worker)
        if len(groups) > 1:
            held = "; ".join(f"{_workers(who)}: {line}" for line, who in groups.items())
            text = (
                f"Workers disagree about what they train. {held}. All workers must construct the "
                f"optimizer with the same parameters, in the same order, and the same settings, "
                f"and change them in the same way."
            )
            if any(word in line for word in (", native", ", compiled") for line in lines):
                return f"{text} {_COMPILER}"
            is_setting = all("=" in line.partition(" in the group of ")[0] for line in lines)
            return text if is_setting else f"{text} {_ZERO}"
    return None


def _workers(workers: Sequence[int]) -> str:
    return ("worker " if len(workers) == 1 else "workers ") + ", ".join(map(str, workers))
