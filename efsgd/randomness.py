"""Random numbers that are the same in every run, and on every worker where they must be."""

import hashlib

import torch

__all__ = ["generator_of"]


def generator_of(*path: int) -> torch.Generator:
    """A generator on the CPU that belongs to a tuple of integers.

    The global generator is not touched.

    Args:
        path: for example the seed of an optimizer, the index of a parameter, a step. A hash
            spreads neighbors over unrelated states.

    Example:
        >>> from efsgd.randomness import generator_of
        >>> torch.randint(100, (3,), generator=generator_of(0, 5)).tolist()
        [83, 0, 31]
    """
    digest = hashlib.blake2b("/".join(map(str, path)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
