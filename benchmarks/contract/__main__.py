"""Asks every row of every candidate, and writes the answers.

    python -m benchmarks.contract --epfml DIR --dion DIR --output docs/benchmarks/contract.json

Later, what has changed here can be asked by itself, with the same version of torch:

    python -m benchmarks.contract --candidates efsgd --update --output docs/benchmarks/contract.json
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import use_epfml
from benchmarks.contract.peers import CANDIDATES
from benchmarks.contract.rows import rows
from benchmarks.contract.runner import ask_all
from benchmarks.results import ROOT, commit_of, describe_machine, show, write_results
from examples.reporting import save_json

MARKS = {"yes": "yes", "no": "no", "not applicable": "–", "not probed": "?"}


def parsed() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contract", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--epfml", type=Path, metavar="DIR", help="a clone of epfml/powersgd")
    parser.add_argument("--dion", type=Path, metavar="DIR", help="a clone of microsoft/dion")
    parser.add_argument("--rows", nargs="+", choices=rows(), metavar="KEY", help="only these")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="questions that are asked at a time")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument(
        "--update", action="store_true", help="leave the other answers in the file as they are"
    )
    arguments = parser.parse_args()
    if arguments.update and arguments.output is None:
        parser.error("--update needs the file: --output docs/benchmarks/contract.json")
    return arguments


def update(path: Path, answers: dict[str, dict[str, Any]]) -> None:
    """Puts some answers into a file of answers that another run has written."""
    content = json.loads(path.read_text())
    if content["machine"]["torch"] != torch.__version__:
        raise SystemExit(
            f"The answers in {path} are of torch {content['machine']['torch']}, these of "
            f"{torch.__version__}. Ask all candidates again, without --update."
        )
    for key, found in answers.items():
        content["answers"][key].update(found)
    content["commit"] = commit_of(ROOT)
    save_json(path, content)


def main() -> None:
    """Entry point."""
    arguments = parsed()
    use_epfml(arguments.epfml)
    clones = {"epfml": arguments.epfml, "dion": arguments.dion}
    names = [n for n in arguments.candidates or CANDIDATES if clones.get(n, ".") is not None]
    keys = arguments.rows or list(rows())
    paths = [str(path.resolve()) for path in clones.values() if path is not None]
    answers = ask_all(keys, names, paths, arguments.jobs)
    table = [[key, *(MARKS[answers[key][name].answer] for name in names)] for key in keys]
    show("The contract", ["row", *names], table)
    found = {key: {n: asdict(answer) for n, answer in row.items()} for key, row in answers.items()}
    if arguments.update:
        update(arguments.output, found)
        return
    commits = {n: commit_of(path) for n, path in clones.items() if path is not None}
    write_results(
        arguments.output,
        "contract",
        describe_machine(1),
        {"candidates": names},
        {"commits": commits, "answers": found},
    )


if __name__ == "__main__":
    main()
