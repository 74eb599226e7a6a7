"""Asks every row of every candidate, and writes the answers.

python -m benchmarks.contract --epfml DIR --dion DIR --output docs/benchmarks/contract.json
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from benchmarks.candidates import use_epfml
from benchmarks.contract.peers import CANDIDATES
from benchmarks.contract.rows import rows
from benchmarks.contract.runner import ask_all
from benchmarks.results import commit_of, describe_machine, show, write_results

MARKS = {"yes": "yes", "no": "no", "not applicable": "–", "not probed": "?"}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contract", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--epfml", type=Path, metavar="DIR", help="a clone of epfml/powersgd")
    parser.add_argument("--dion", type=Path, metavar="DIR", help="a clone of microsoft/dion")
    parser.add_argument("--rows", nargs="+", metavar="KEY", help="only these rows")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="questions that are asked at a time")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    use_epfml(arguments.epfml)
    clones = {"epfml": arguments.epfml, "dion": arguments.dion}
    names = [n for n in arguments.candidates or CANDIDATES if clones.get(n, ".") is not None]
    keys = arguments.rows or list(rows())
    paths = [str(path.resolve()) for path in clones.values() if path is not None]
    answers = ask_all(keys, names, paths, arguments.jobs)
    table = [[key, *(MARKS[answers[key][name].answer] for name in names)] for key in keys]
    show("The contract", ["row", *names], table)
    write_results(
        arguments.output,
        "contract",
        describe_machine(1),
        {"candidates": names},
        {
            "commits": {n: commit_of(path) for n, path in clones.items() if path is not None},
            "answers": {
                key: {name: asdict(answer) for name, answer in found.items()}
                for key, found in answers.items()
            },
        },
    )


if __name__ == "__main__":
    main()
