"""Poisson sampling of each worker's shard, with the same number of steps on every worker."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from opacus.data_loader import wrap_collate_with_empty
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from efsgd.checks import plain, require_integer
from efsgd.privacy.accounting import require_sample_rate
from efsgd.privacy.noise import secret_uniforms


def poisson_batches(
    shard: Dataset[Any],
    rate: float,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> DataLoader[Any]:
    """Batches in which each record of a worker's shard takes part with the same probability.

    Batches differ in size, and some may be empty: their tensors then have a first dimension of
    length 0. An empty batch is a step like any other; a worker that left it out would keep the
    others waiting, and tell them that it was empty.

    Args:
        shard: this worker's records, and no other worker's: a data set with a length.
        rate: the probability, above 0 and at most 1; the same on every worker.
        steps: the number of batches; the same on every worker.
        generator: decides who takes part, on the CPU; for tests. None, the default, draws as noise
            is drawn: who took part must stay unknown.
        options: of `torch.utils.data.DataLoader`, such as `num_workers` and `collate_fn`.

    Returns:
        A data loader; also for `opacus.utils.batch_memory_manager.BatchMemoryManager`.

    Raises:
        TypeError: it is no data set, but a loader or a sampler.
        ValueError: an argument is out of range, or the shard is empty.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from efsgd.privacy import poisson_batches
        >>> shard = TensorDataset(torch.arange(100.0))
        >>> batches = poisson_batches(shard, rate=0.02, steps=50)
        >>> len(batches), sum(len(x) for x, in batches) < 400
        (50, True)

    Source: Abadi et al., CCS 2016, arXiv 1607.00133, section 3.1.
    """
    if isinstance(shard, DataLoader | Sampler) or not isinstance(shard, Sized):
        raise TypeError(
            f"Invalid shard: {type(shard).__name__}. Must be this worker's records as a data set "
            f"with a length. Opacus's DistributedUniformWithReplacementSampler leaves out empty "
            f"batches, so that workers get out of step: give each worker its own part, for example "
            f"torch.utils.data.Subset(data, range(worker, len(data), world_size))."
        )
    require_sample_rate(rate, "rate")
    require_integer("steps", steps, 1)
    for name in ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"):
        if name in options:
            raise TypeError(
                f"Invalid {name}: {options[name]!r}. Poisson sampling decides who is in a batch, "
                f"and how many are. Leave it out."
            )
    if len(shard) == 0:
        raise ValueError("Invalid shard: it has no records. Give every worker at least one.")
    collate = wrap_collate_with_empty(collate_fn=options.pop("collate_fn", None) or default_collate)
    collate([shard[0]])  # shows it what an empty batch looks like
    kind = _SecretSampler if generator is None else UniformWithReplacementSampler
    sampler = kind(
        num_samples=len(shard), sample_rate=plain(rate), steps=plain(steps), generator=generator
    )
    return DataLoader(shard, batch_sampler=sampler, collate_fn=collate, **options)


class _SecretSampler(UniformWithReplacementSampler):  # type: ignore[misc]
    """Opacus's, which knows how to be split, with draws that cannot be computed from others."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            takes_part = secret_uniforms(self.num_samples) <= self.sample_rate
            yield takes_part.nonzero().flatten().tolist()
