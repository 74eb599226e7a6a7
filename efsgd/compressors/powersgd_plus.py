"""PowerSGD+ as a compressor: PowerSGD whose subspace is found anew every so many steps."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from efsgd.algorithms.interfaces import Aggregator, Claims, Placement, Settings
from efsgd.algorithms.low_rank.products import rank_of
from efsgd.algorithms.powersgd_plus import RefreshedPowerIteration
from efsgd.checks import require_choice, require_integer
from efsgd.compressors.powersgd import PowerSGD, options_of, start_of
from efsgd.layout import Batch, Layout

_CHOICES = {"svd": ("exact", "randomized"), "refresh_update": ("low_rank", "exact")}


@dataclass(frozen=True)
class PowerSGDPlus(PowerSGD):
    """Rank-r compression with a periodic SVD (Xie, Chen, Yuan 2025, arXiv 2509.11254).

    In the first compressed step and every `refresh_every` steps after it, the workers average their
    whole matrices and take the subspace of the mean's largest singular values. All other steps are
    PowerSGD's. It leaves no subspace unseen, as PowerSGD may where its first Q misses one exactly;
    the price is a step at the full size of the gradients. Of a rank-1 ResNet18, a refresh every 50
    steps sends 5.9 times the bytes of PowerSGD, one every 1000 steps 1.2 times (docs/volumes.md).

    The settings that are not described here are those of `PowerSGD`.

    Attributes:
        refresh_every: τ, the number of steps from one refresh to the next, at least 1.
        svd: "exact", by LAPACK, or "randomized", by two steps of power iteration on r + 8 columns.
            An exact one of a large matrix takes as long as many ordinary steps, a randomized one
            a few products. Take "randomized" where 1 / `refresh_every` of the exact time is
            much. Where singular values hardly decay it finds a slightly worse subspace.
        refresh_update: what a refresh applies: "low_rank", the best approximation of rank r, the
            rest of which stays in the errors; or "exact", the mean itself, which has been sent
            anyway. Errors then are zero.

    Example:
        >>> from efsgd import ErrorFeedbackSGD, PowerSGDPlus
        >>> model = torch.nn.Linear(64, 32)
        >>> compressor = PowerSGDPlus(rank=2, refresh_every=100)
        >>> optimizer = ErrorFeedbackSGD(
        ...     model.parameters(), lr=0.1, momentum_form="sgd", compressor=compressor
        ... )
        >>> shapes = [p.shape for p in model.parameters()]
        >>> [compressor.payload_bytes(shapes, step=step) for step in (0, 1)]
        [8832, 896]
    """

    # Not a choice: what would alternate is found by the refresh.
    alternating: bool = field(default=False, init=False, repr=False)
    refresh_every: int = 50
    svd: str = "exact"
    refresh_update: str = "low_rank"

    def shared_settings(self) -> tuple[str, ...]:
        return (*super().shared_settings(), "refresh_every", *_CHOICES)

    def validate(self, settings: Settings) -> None:
        super().validate(settings)
        never = "For steps without any refresh, use efsgd.PowerSGD."
        require_integer("refresh_every", settings["refresh_every"], 1, remedy=never)
        for name, choices in _CHOICES.items():
            require_choice(name, settings[name], choices)
        if settings["alternating"]:
            raise ValueError(
                "Invalid alternating: True. Must be False, since a refresh of PowerSGD+ begins a "
                "step of both sides; use efsgd.PowerSGD(alternating=True)."
            )

    def claims(self) -> Claims:
        """Those of `PowerSGD`; a randomized SVD is random as well."""
        is_random = not self.warm_start or self.svd == "randomized"
        return replace(super().claims(), is_random=is_random)

    def step_kind(self, step: int, settings: Settings) -> Hashable:
        """Either "refresh" or "ordinary"."""
        since = step - start_of(settings)
        is_refresh = since >= 0 and since % settings["refresh_every"] == 0
        return "refresh" if is_refresh else "ordinary"

    def _floats_of(self, batch: Batch, step: int) -> int:
        if step % self.refresh_every != 0:
            return super()._floats_of(batch, step)
        sends_Q = self.refresh_update == "low_rank"
        return batch.columns * (batch.rows + (rank_of(batch) if sends_Q else 0))

    def aggregator(self, layout: Layout, settings: Settings, placement: Placement) -> Aggregator:
        return RefreshedPowerIteration(
            layout,
            placement,
            refresh_every=settings["refresh_every"],
            start=start_of(settings),
            svd=settings["svd"],
            is_exact=settings["refresh_update"] == "exact",
            **options_of(settings, placement.device),
        )
