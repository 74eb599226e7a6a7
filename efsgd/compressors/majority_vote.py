"""The majority vote as a compressor: one bit for each element of each worker's momentum."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Aggregator, Claims, Compressor, Placement, Settings
from efsgd.algorithms.majority_vote import LOCAL_FORM, Voting, sign_format
from efsgd.layout import Entry, Layout


@dataclass(frozen=True)
class MajorityVote(Compressor):
    """Compresses to one bit per element (arXiv 1810.05291), for `efsgd.Signum` alone.

    Tensors of every shape are compressed. It has no settings; the momentum is that of a parameter
    group. What is decompressed is a vote and no estimate of the gradient, so it makes no sense with
    error feedback.

    Example:
        >>> from efsgd.compressors.majority_vote import MajorityVote
        >>> MajorityVote().payload_bytes([(64, 32), (7,)])  # 2055 bits in 65 words
        260
    """

    local_state = ("local_momentum",)

    def validate(self, settings: Settings) -> None:
        """Checks that the group is one of a `Signum`."""
        form = settings.get("momentum_form")
        if form != LOCAL_FORM:
            raise ValueError(
                f"Invalid momentum_form for a majority vote: {form!r}. Must be {LOCAL_FORM!r}, as "
                f"in the groups of efsgd.optimizers.signum.Signum: use that instead of another "
                f"optimizer."
            )

    def claims(self) -> Claims:
        return Claims(averages=False)

    def compressed_bytes(self, layout: Layout, placement: Placement, step: int) -> int:
        """One bit for each element of all tensors, in whole words of four bytes."""
        return sign_format(layout.matrix_floats).nbytes

    def level(self, shape: Sequence[int], settings: Settings) -> str | None:
        """One bit for each element; None for empty tensors."""
        return "one bit" if math.prod(shape) > 0 else None

    def initial_state(self, entry: Entry, settings: Settings) -> dict[str, Tensor]:
        """{"local_momentum": zeros, "momentum_started": False}."""
        # Zeros that share their memory, which are copied to where they are needed.
        return {
            "local_momentum": torch.zeros((), device="cpu").expand(entry.shape),
            "momentum_started": torch.tensor(False, device="cpu"),
        }

    def aggregator(self, layout: Layout, settings: Settings, placement: Placement) -> Aggregator:
        return Voting(layout, placement)
