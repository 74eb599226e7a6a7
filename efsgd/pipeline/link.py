"""What travels between two stages in one direction: which compressor, on what, with what memory."""

from dataclasses import dataclass
from typing import Literal

from efsgd.checks import require_choice, require_integer
from efsgd.compressors import Identity, TensorCompressor, TopK

PER = ("sample", "microbatch")
MEMORIES = ("none", "error", "difference", "samples")


@dataclass(frozen=True)
class Link:
    """How floating-point tensors are sent from one stage to a neighbor; all others go as they are.

    So do those that the compressor would not make smaller.

    Attributes:
        compressor: any `TensorCompressor`; None or `Identity` sends tensors as they are.
        per: what is compressed by itself: each "sample" of a microbatch, along its first dimension,
            or the "microbatch" as a whole.
        memory: what ends keep between steps, of each microbatch or sample:

            * "none": nothing.
            * "error": the sender what it has not sent (EF), C(x + e), e ← x + e − C(x + e).
            * "difference": both what has been sent so far (EF21), h ← h + C(x − h). The receiver's
              result is h.
            * "samples": the same for each sample (AQ-SGD), whose first visit goes whole. Needs
              `CompressedStage.announce` before each step.
        reuse_mask: for gradients, with the same Top-K on both links: values alone travel, at the
            positions that were sent forwards. All outputs that are compressed must have gradients.
        capacity: how many samples are kept at most; None keeps all.
        file: where samples are kept in place of memory, a path to which stage and side are added;
            another one for each replica of the pipeline. Needs `capacity`.

    Raises:
        TypeError: the compressor is of another kind.
        ValueError: an argument is out of range, or they do not go together.

    Example:
        >>> from efsgd import UniformQuantized
        >>> from efsgd.pipeline import Link
        >>> Link(UniformQuantized(bits=4), memory="samples").per
        'sample'

    Sources: EF21: Richtarik, Sokolov, Fatkhullin, arXiv 2106.05203; AQ-SGD: Wang et al., arXiv
    2206.01299; between stages: Rudakov et al., arXiv 2401.07788.
    """

    compressor: TensorCompressor | None = None
    per: Literal["sample", "microbatch"] = "sample"
    memory: Literal["none", "error", "difference", "samples"] = "none"
    reuse_mask: bool = False
    capacity: int | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, TensorCompressor | None):
            raise TypeError(
                f"Invalid compressor: {self.compressor!r}. Must be a TensorCompressor, which works "
                f"on one tensor at a time; PowerSGD and LQSGD take several exchanges."
            )
        require_choice("per", self.per, PER)
        require_choice("memory", self.memory, MEMORIES)
        if self.memory != "none" and self.codes is None:
            raise ValueError(
                f"memory={self.memory!r}, but nothing is compressed. Give a compressor as well."
            )
        if self.reuse_mask and not (isinstance(self.compressor, TopK)):
            raise ValueError("reuse_mask=True needs compressor=TopK(...) on both links.")
        if self.capacity is not None:
            require_integer("capacity", self.capacity, 1)
        if self.memory != "samples" and (self.capacity is not None or self.file is not None):
            raise ValueError("capacity and file are for memory='samples'. Leave them out.")
        if self.file is not None and self.capacity is None:
            raise ValueError("file needs capacity, the number of samples that it has room for.")

    @property
    def codes(self) -> TensorCompressor | None:
        """The compressor, where there is something to do."""
        return None if isinstance(self.compressor, Identity) else self.compressor


def link_of(given: Link | None) -> Link:
    """A link as it was given; None is one that compresses nothing."""
    if given is not None and not isinstance(given, Link):
        raise TypeError(
            f"Invalid link: {given!r}. Must be a Link, which says what is sent and what is kept: "
            f"write Link({type(given).__name__}(...))."
        )
    return Link() if given is None else given
