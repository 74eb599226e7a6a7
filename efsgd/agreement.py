"""Before the first step: do all workers hold the same parameters and the same settings?

Otherwise the first step would hang (buffers of different lengths), or the workers would drift
apart without a word. Both checks raise the same error on every worker.
"""

import functools
import hashlib
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from efsgd.collectives import AllGather, Broadcast, Exchange
from efsgd.errors import WorkerMismatchError

__all__ = ["broadcast_values", "check_schema", "check_values", "checksum"]

_CHUNK = 1 << 20


def check_schema(lines: Sequence[str], device: torch.device) -> Exchange[None]:
    """Compares a description of what will be exchanged, line by line.

    Only a digest of fixed size is gathered; the lines themselves only if the digests differ.

    Args:
        lines: this worker's description, without newlines within a line.
        device: where buffers may live.

    Raises:
        WorkerMismatchError: names the first line that differs, as each worker has it.
    """
    text = "\n".join(lines).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)
    summary = torch.tensor([digest, len(text)], dtype=torch.int64, device=device)
    summaries = yield AllGather(summary, "digest of the parameter list")
    if bool((summaries == summaries[0]).all()):
        return
    padded = torch.zeros(int(summaries[:, 1].max()), dtype=torch.uint8, device=device)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    gathered = yield AllGather(padded, "parameter lists")
    lengths = summaries[:, 1].tolist()
    texts = [
        bytes(row[:length].tolist()).decode().split("\n")
        for row, length in zip(gathered.cpu(), lengths, strict=True)
    ]
    raise WorkerMismatchError(_first_difference(texts))


def check_values(
    named: Mapping[str, Tensor], gradients: Sequence[Tensor | None], device: torch.device
) -> Exchange[None]:
    """Compares values, bit by bit through checksums.

    Warns where, on the contrary, all gradients are bitwise equal: then they have probably been
    averaged before, and there would be nothing left to do.

    Args:
        named: what must be equal on all workers, by names for the error message.
        gradients: what should not be.
        device: where buffers may live.

    Raises:
        WorkerMismatchError: names the first value that differs and the workers.
    """
    own = [checksum(value.detach()) for value in named.values()]
    own += [0 if gradient is None else checksum(gradient) for gradient in gradients]
    checksums = torch.tensor(own, dtype=torch.int64, device=device)
    gathered = (yield AllGather(checksums, "checksums of parameters and state")).cpu()
    values, of_gradients = gathered.split([len(named), len(gradients)], dim=1)
    for position, name in enumerate(named):
        differing = (values[:, position] != values[0, position]).nonzero().flatten().tolist()
        if differing:
            raise WorkerMismatchError(
                f"{name} differs between workers: its values on {_workers(differing)} are not "
                f"those of worker 0. All workers must start from the same values: call "
                f"optimizer.broadcast_parameters() before the first step, or load one "
                f"consolidated checkpoint everywhere."
            )
    is_equal = bool((of_gradients == of_gradients[0]).all())
    if len(gathered) > 1 and is_equal and bool(of_gradients.any()):
        warnings.warn(
            "All workers have bitwise equal gradients, as if they had already been averaged. "
            "Give this optimizer local gradients: use the plain model, or under "
            "DistributedDataParallel ddp.register_comm_hook(None, noop_hook), or forward and "
            "backward within ddp.no_sync().",
            stacklevel=2,
        )


def broadcast_values(tensors: Sequence[Tensor], source: int) -> Exchange[None]:
    """Gives every worker the values of worker `source`, one tensor after the other.

    Args:
        tensors: of equal shapes and dtypes on every worker (modified in place).
        source: the worker whose values all take.
    """
    for tensor in tensors:
        buffer = tensor.detach().contiguous()
        values = yield Broadcast(buffer, "parameters", source)
        tensor.detach().copy_(values)


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's elements and their order; 0 for all zero bits.

    Args:
        tensor: of any shape, dtype and memory format; sparse ones are made dense.

    Example:
        >>> from efsgd.agreement import checksum
        >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
        False
    """
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.reshape(-1).view(integers[tensor.element_size()])
    weights = _weights(flat.device)
    total = 0
    for chunk in flat.split(_CHUNK):
        part = int((chunk.long() * weights[: chunk.numel()]).sum())
        total = (total * 31 + part) & (2**64 - 1)
    return total - (1 << 64) if total >> 63 else total


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Random odd factors, [_CHUNK] int64: products and sums modulo 2**64 then tell values apart."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1 << 62, (_CHUNK,), generator=generator, device="cpu")
    return (drawn * 2 + 1).to(device)


def _first_difference(texts: Sequence[Sequence[str]]) -> str:
    longest = max(len(text) for text in texts)
    for position in range(longest):
        lines = [text[position] if position < len(text) else "nothing" for text in texts]
        groups: dict[str, list[int]] = {}
        for worker, line in enumerate(lines):
            groups.setdefault(line, []).append(worker)
        if len(groups) > 1:
            held = "; ".join(f"{_workers(who)}: {line}" for line, who in groups.items())
            return (
                f"Workers disagree about what they train. {held}. All workers must construct the "
                f"optimizer with the same parameters, in the same order, and the same settings; "
                f"and with compile=True all of them need a compiler."
            )
    raise AssertionError("equal texts have equal digests")


def _workers(workers: Sequence[int]) -> str:
    return ("worker " if len(workers) == 1 else "workers ") + ", ".join(map(str, workers))
