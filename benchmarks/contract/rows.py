"""The lines of the contract, one row of the table each: all that the probes ask for."""

import benchmarks.contract.probes  # noqa: F401 (its modules register the rows)
from benchmarks.contract.questions import REGISTERED, Row


def rows() -> dict[str, Row]:
    """All rows, by key, in the order of the table."""
    return dict(sorted(REGISTERED.items(), key=lambda item: (item[0][0], int(item[0][1:]))))
