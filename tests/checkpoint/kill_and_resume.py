"""Kills workers of small trainings at random points; the resumed ones must end as if nothing was.

    python -m tests.checkpoint.kill_and_resume [--runs 20] [--seed 1]

For each task and number of workers one training runs without interruption. Then each run is killed
once or twice by SIGKILL, at a random worker, step and point of it or of the writing of a
checkpoint; torchrun starts its workers anew, and they go on from their files. At the end all that
every worker holds is compared, bit by bit: parameters, momenta, errors, Q, BatchNorm's
statistics, random states, losses and results. The exit status is 1 if anything differs.
"""

import argparse
import itertools
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.checkpoint import killed_worker as script
from tests.checkpoint.killed_worker import EVERY, STEPS, Kill
from tests.launcher import Finished, environment, run_programs

LIMIT = 170  # seconds for a launch with all its lives, of which loading torch takes most

WORDS = {
    "step": "{amount} ms after step {step} began",
    "collective": "in step {step}, before collective {amount}",
    "writing": "checkpoint {step}, {amount} % written",
    "written": "checkpoint {step}, written but not renamed",
    "renamed": "checkpoint {step}, renamed, the old still there",
    "deleted": "checkpoint {step}, an old one deleted",
}


@dataclass(frozen=True)
class Ending:
    """How often workers were started, at which steps they resumed, and digests of all they hold."""

    lives: int
    resumed: list[int]
    states: list[dict[str, str]]


def launch(task: str, world_size: int, kills: Sequence[Kill], folder: Path) -> Ending:
    """Trains to the end, through all kills."""
    folder.mkdir()
    program = [script.__file__, task, str(folder), json.dumps([asdict(kill) for kill in kills])]
    done: Finished | subprocess.CompletedProcess[str]
    if kills:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world_size}", f"--max-restarts={len(kills)}", *program]
        given: Any = {"capture_output": True, "text": True, "timeout": LIMIT}
        done = subprocess.run(command, env=environment(), **given)
    else:  # none will be started anew
        first = {"TORCHELASTIC_RESTART_COUNT": "0"}
        done = run_programs(program, world_size, variables=first)
    if done.returncode != 0:
        raise RuntimeError(f"torchrun ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    found = [json.loads((folder / f"{w}.json").read_text()) for w in range(world_size)]
    resumed = [int(step) for step in re.findall(r"resumed at step (\d+)", done.stdout)]
    return Ending(found[0]["lives"], resumed, [each["state"] for each in found])


def differences(ending: Ending, whole: Ending) -> list[str]:
    """What is not bitwise equal, by worker and name."""
    return [
        f"{name} of worker {worker}"
        for worker, (own, expected) in enumerate(zip(ending.states, whole.states, strict=True))
        for name in sorted({*own, *expected})
        if own.get(name) != expected.get(name)
    ]


def draw(chance: random.Random, world_size: int) -> list[Kill]:
    """One kill, or two of which the second comes later in the training."""
    latest = chance.choice([[STEPS - EVERY]] * 3 + [[STEPS // 2, STEPS - EVERY]])
    kills: list[Kill] = []
    for life, last in enumerate(latest):
        # After the kill before, since the workers may have resumed as late as that.
        step = chance.randint(kills[-1].step + 1 if kills else 1, last)
        can_delete = step > 2 * EVERY  # the next checkpoint has two before it
        names = [name for name in WORDS if name != "deleted" or can_delete]
        point = chance.choice([*names, "step", "step", "collective"])
        if point not in ("step", "collective"):
            step = EVERY * math.ceil(step / EVERY)
        amount = chance.randrange({"step": 6, "collective": 2, "writing": 100}.get(point, 1))
        kills.append(Kill(life, chance.randrange(world_size), step, point, amount))
    return kills


def describe(kill: Kill) -> str:
    return f"worker {kill.worker} {WORDS[kill.point].format(**asdict(kill))}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20, help="trainings to kill (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the kills (default: 1)")
    arguments = parser.parse_args()
    started, failed = time.monotonic(), 0
    cases = list(itertools.product(("images", "text"), (2, 4)))
    whole: dict[tuple[str, int], Ending] = {}
    print(f"{STEPS} steps, a checkpoint every {EVERY}; seed {arguments.seed}", flush=True)
    print(f"{'run':>3}  {'task':<6} {'workers':>7}  {'resumed at':<11} {'end':<8} killed")
    with tempfile.TemporaryDirectory() as place:
        for run in range(arguments.runs):
            case = task, world_size = cases[run % len(cases)]
            if case not in whole:
                whole[case] = launch(task, world_size, [], Path(place, f"whole-{run}"))
            kills = draw(random.Random(f"{arguments.seed} {run}"), world_size)
            ending = launch(task, world_size, kills, Path(place, str(run)))
            apart = differences(ending, whole[case])
            if ending.lives != len(kills) + 1:
                apart.append(f"{ending.lives} lives with {len(kills)} kills")
            failed += bool(apart)
            resumed = ", ".join(map(str, ending.resumed)) or "the start"
            line = f"{run + 1:>3}  {task:<6} {world_size:>7}  {resumed:<11} "
            line += f"{'DIFFERS' if apart else 'equal':<8} {'; '.join(map(describe, kills))}"
            print("\n     differs: ".join([line, *apart[:5]]), flush=True)
    seconds = time.monotonic() - started
    print(f"{arguments.runs - failed} of {arguments.runs} bitwise equal; {seconds:.0f} s in all")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
