"""Makes the page of the documentation from the answers.

    python -m benchmarks.contract.page

The page holds what docs/benchmarks/contract.json says and nothing else: it is not to be edited.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.contract.peers import CANDIDATES
from benchmarks.contract.questions import GROUPS, Row
from benchmarks.contract.rows import rows

DOCS = Path(__file__).parents[2] / "docs"
PAGE, RESULTS = DOCS / "contract.md", DOCS / "benchmarks" / "contract.json"
Result = Mapping[str, Any]

INTRODUCTION = """\
<!-- Made by `make bench-contract` from docs/benchmarks/contract.json, not to be edited. -->

# Swapping in for SGD

What a program expects of `torch.optim.SGD`, line by line, and what several workers expect besides.
Each line is asked of each candidate by a small program, in processes of its own. An answer is *no*
where that program meets an error, another result than SGD's, or does not end; *–* where the line
makes no sense for the candidate, *?* where this machine cannot tell. Below each table stands what
was asked, and why an answer is not a plain yes.

## The candidates

Each is used as its documentation says. What is no optimizer by itself is used with the SGD of its
documentation, and has all that this SGD has.
"""

USE = {
    "hook": """\
* **PyTorch's hook** is `powerSGD_hook` of torch {torch}, with `DistributedDataParallel` and
  `torch.optim.SGD`. Its state has `min_compression_rate=1`; `start_powerSGD_iter=2`, the least that
  it takes; and `orthogonalization_epsilon=1e-8`, which its documentation recommends where columns
  may be zero. Under gloo its callbacks run in other threads, where they stand still or mix with
  other collectives if there are several buckets or unused parameters; so that this is not what
  the table shows, all-reduces are waited for where they are started. It keeps its errors by bucket,
  and the first bucket of a new `DistributedDataParallel` is laid out in another way than the same
  bucket later: errors that are put back do not fit (D5 to D7).
""",
    "epfml": """\
* **epfml/powersgd** is the authors' package, commit {epfml}, with `torch.optim.SGD`, as in its
  README: `optimizer_step(optimizer, powersgd)` in place of `optimizer.step()`, and no `zero_grad`.
  `min_compression_rate=1`, `num_iters_per_step=2`, no steps without compression.
""",
    "dion": """\
* **Dion** is the class `dion.Dion` of microsoft/dion, commit {dion}: of the optimizers in that
  repository the one that compresses what workers exchange. Matrices go to Dion with
  `rank_fraction=0.25`, all else to its AdamW, under `DistributedDataParallel` with `no_sync()`. It
  does not promise SGD's rule. Functions that it hands to `torch.compile` run uncompiled, except
  in F7.
""",
    "efsgd": """\
* **efsgd** is `PowerSGDOptimizer`, commit {efsgd}, with `momentum_form="sgd"` and
  `nonfinite="skip"`.
""",
}

END_OF_USE = """\
Compression is at rank 1 unless a line says otherwise; learning rates are 0.1. All run on the CPU,
with gloo.
"""

MARKS = {"yes": "yes", "no": "**no**", "not applicable": "–", "not probed": "?"}


def render(result: Result) -> str:
    """The page.

    Args:
        result: of `python -m benchmarks.contract`.
    """
    shown = [name for name in result["settings"]["candidates"] if name != "sgd"]
    versions = {"torch": result["machine"]["torch"], "efsgd": result["commit"]}
    versions |= result["commits"]
    use = "".join(USE[name].format(**versions) for name in shown)
    parts = [INTRODUCTION, use, END_OF_USE, _control(result), "## The table\n"]
    parts += [_counts(result, shown)]
    for letter, title in GROUPS.items():
        listed = [row for row in rows().values() if row.key[0] == letter]
        listed = [row for row in listed if row.key in result["answers"]]
        if listed:
            parts += [f"### {letter}. {title}\n", _table(listed, result, shown)]
            parts += [_notes(listed, result, shown)]
    command = f"`{result['command']}`, {result['date']}"
    return "\n".join([*parts, f"{command}, torch {result['machine']['torch']}.\n"])


def _control(result: Result) -> str:
    """What SGD itself answers."""
    answers = {key: found["sgd"] for key, found in result["answers"].items() if "sgd" in found}
    asked = {k: a for k, a in answers.items() if a["answer"] in ("yes", "no")}
    refused = [key for key, answer in asked.items() if answer["answer"] == "no"]
    if not asked:
        return ""
    verdict = f"yes but for {', '.join(refused)}" if refused else "yes"
    return (
        "As far as they need one worker, the programs were tried on `torch.optim.SGD` itself. To "
        f"all\nof these {len(asked)} lines it says {verdict}.\n"
    )


def _counts(result: Result, shown: list[str]) -> str:
    found = {name: Counter[str]() for name in shown}
    for answers in result["answers"].values():
        for name in shown:
            found[name][answers[name]["answer"]] += 1
    lines = [
        [CANDIDATES[name].title, *(str(found[name][answer]) for answer in MARKS)] for name in shown
    ]
    return _markdown(["", "yes", "no", "–", "?"], lines)


def _table(listed: list[Row], result: Result, shown: list[str]) -> str:
    lines = []
    for row in listed:
        answers = result["answers"][row.key]
        marks = [MARKS[answers[name]["answer"]] for name in shown]
        lines.append([row.key, row.title, *marks])
    return _markdown(["", "", *(CANDIDATES[name].title for name in shown)], lines)


def _markdown(columns: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, rule, *lines]) + "\n"


def _notes(listed: list[Row], result: Result, shown: list[str]) -> str:
    lines = []
    for row in listed:
        workers = f" *{row.workers} workers.*" if row.workers > 1 else ""
        lines.append(f"* **{row.key}.** {row.meaning}{workers}")
        by_reason: dict[tuple[str, str], list[str]] = {}
        for name in shown:
            answer = result["answers"][row.key][name]
            if answer["reason"]:
                key = (answer["answer"], answer["reason"])
                by_reason.setdefault(key, []).append(CANDIDATES[name].title)
        for (answer, reason), names in by_reason.items():
            quoted = reason.replace("`", "'")
            lines.append(f"  * {', '.join(names)}: {answer}. `{quoted}`")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry point."""
    PAGE.write_text(render(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
