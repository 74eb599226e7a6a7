"""A comparison of all that workers must have in common, whenever it is asked for."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from efsgd.agreement import checksums, compare
from efsgd.collectives import Exchange
from efsgd.compressors import Compressor
from efsgd.members import members
from efsgd.plan import Groups, replicated
from efsgd.sections import describe
from efsgd.state import State

__all__ = ["compare_all"]


def compare_all(
    groups: Groups, state: Mapping[Tensor, State], compressor: Compressor, settings: Iterable[str]
) -> Exchange[None]:
    """Compares settings, parameters and replicated state, as they are now.

    Args:
        groups: parameter groups.
        state: of the parameters.
        compressor: decides what is compressed and how far.
        settings: names of the group entries that workers must agree on.

    Raises:
        WorkerMismatchError: names the first difference.
    """
    listed = list(members(groups))
    lines = describe(listed, compressor, settings)
    values = checksums(replicated(listed, state))
    yield from compare(lines, listed[0].parameter.device, values)
