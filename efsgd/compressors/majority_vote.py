"""The majority vote as a compressor: one bit for each element of each worker's momentum."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.majority_vote import LOCAL_FORM, GroupMomentum, Voting, sign_format
from efsgd.layout import Entry, Layout


@dataclass(frozen=True)
class MajorityVote:
    """Compresses to one bit per element (arXiv 1810.05291), for `efsgd.Signum` alone.

    Tensors of every shape are compressed. It has no settings; the momentum is that of a parameter
    group. What is decompressed is a vote and no estimate of the gradient, so it makes no sense with
    error feedback.

    Example:
        >>> from efsgd.compressors.majority_vote import MajorityVote
        >>> MajorityVote().payload_bytes([(64, 32), (7,)])  # 2055 bits in 65 words
        260
    """

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def shared_settings(self) -> tuple[str, ...]:
        """None."""
        return ()

    def validate(self, settings: Mapping[str, Any]) -> None:
        """Checks that the group is one of a `Signum`.

        Raises:
            ValueError: it is not.
        """
        form = settings.get("momentum_form")
        if form != LOCAL_FORM:
            raise ValueError(
                f"Invalid momentum_form for a majority vote: {form!r}. Must be {LOCAL_FORM!r}, as "
                f"in the groups of efsgd.optimizers.signum.Signum: use that instead of another "
                f"optimizer."
            )

    def claims(self) -> Claims:
        """It is gathered."""
        return Claims(averages=False)

    def payload_bytes(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
        step: int = 0,
        world_size: int = 1,
    ) -> int:
        """One bit for each element of all tensors, in whole words of four bytes.

        Args:
            shapes: of all tensors.
            dtype: makes no difference.
            step: makes no difference.
            world_size: makes no difference.
        """
        return sign_format(sum(map(math.prod, shapes))).nbytes

    def step_kind(self, step: int, settings: Mapping[str, Any]) -> None:
        """All steps are alike."""

    def level(self, shape: Sequence[int], settings: Mapping[str, Any]) -> GroupMomentum | None:
        """The momentum parameter of the group; None for empty tensors."""
        return GroupMomentum(settings) if math.prod(shape) > 0 else None

    def initial_state(self, entry: Entry, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """{"local_momentum": zeros, "momentum_started": False}."""
        # Zeros that share their memory, which are copied to where they are needed.
        return {
            "local_momentum": torch.zeros((), device="cpu").expand(entry.shape),
            "momentum_started": torch.tensor(False, device="cpu"),
        }

    def aggregator(
        self,
        layout: Layout,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        worker: int = 0,
        world_size: int = 1,
    ) -> Voting:
        """The vote on the tensors of one layout."""
        return Voting(layout, dtype, device)
