"""Every broken compressor, with the law that it breaks."""

from collections.abc import Callable
from typing import Any, TypeVar

from efsgd.algorithms.powersgd import PowerIteration
from efsgd.algorithms.tensorwise import Tensorwise
from tests.testing.good_compressors import LowRankOf, TensorwiseOf

Kind = TypeVar("Kind", bound=type)

#: The law that each breaks, and the options of `check_compressor` with which it does.
BROKEN: list[tuple[str, Any, dict[str, Any]]] = []


def breaks(
    law: str, *, options: dict[str, Any] | None = None, **settings: Any
) -> Callable[[Kind], Kind]:
    """Lists a compressor in `BROKEN`, made with some settings: of this class, or around one of
    aggregators."""

    def listed(kind: Kind) -> Kind:
        made: Any = kind
        for around, of in ((LowRankOf, PowerIteration), (TensorwiseOf, Tensorwise)):
            if issubclass(kind, of):
                made = type(kind.__name__, (around,), {"kind": kind})
        BROKEN.append((law, made(**settings), options or {}))
        return kind

    return listed
