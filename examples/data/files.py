"""A check that the files of a data set are where the user says."""

from collections.abc import Sequence
from pathlib import Path


def require_files(directory: Path, names: Sequence[str], what: str) -> None:
    """Raises FileNotFoundError, naming all files expected, unless every one of them exists.

    Args:
        directory: the folder the user gave.
        names: names of the files expected in it.
        what: the data set, in words.
    """
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        state = "is not a directory" if not directory.is_dir() else f"lacks {', '.join(missing)}"
        raise FileNotFoundError(
            f"--data {directory} {state}: it must be the directory that holds {what}, "
            f"that is the files {', '.join(names)}"
        )
