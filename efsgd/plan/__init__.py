"""Whether compression pays for a model on a network, from the command line.

    python -m efsgd.plan --shapes resnet18 --forward 120ms --backward 280ms \
        --workers 16 --bandwidth 1gbit --latency 0.2ms

What compressing takes is measured on this machine, unless --compute says it. Under torchrun the
workers, bandwidth and latency that are not given are measured, too.
"""

import argparse
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from efsgd.planning import advise, default_candidates
from efsgd.planning.alpha_beta import ALGORITHMS
from efsgd.planning.tensors import KNOWN_SHAPES, shape_of

_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATES = {"bit": 1 / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "tbit": 1e12 / 8}


def number_with_unit(text: str, units: dict[str, float], least: float, example: str) -> float:
    """A number in the smallest terms, from one with a unit behind it.

    Example:
        >>> from efsgd.plan import number_with_unit
        >>> number_with_unit("500ms", {"ms": 1e-3, "s": 1.0}, 0, "1s")
        0.5
    """
    found = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?) ?([a-z]+)", text.strip().lower())
    try:
        value = float(found[1]) * units[found[2]] if found else math.nan
    except (ValueError, KeyError):
        value = math.nan
    if not least <= value < math.inf:
        bound = "above 0" if least > 0 else "of at least 0"
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number {bound} with one of the units {', '.join(units)}, "
            f"as {example}"
        )
    return value


def duration(text: str) -> float:
    """Seconds, from a text such as "470ms"."""
    return number_with_unit(text, _TIMES, 0, "0.2ms")


def rate(text: str) -> float:
    """Bytes per second, from a text such as "1gbit"."""
    return number_with_unit(text, _RATES, sys.float_info.min, "1gbit")


def count(least: int) -> Callable[[str], int]:
    """Reads integers of at least this."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
        return int(text)

    return read


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m efsgd.plan",
        description="Predicts whole steps with and without compression, and says what to use.",
    )
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="returns a module; or a module and a function that runs it and returns a loss, by "
        "which the passes are measured",
    )
    known = ", ".join(KNOWN_SHAPES)
    what.add_argument(
        "--shapes",
        metavar="NAME|FILE",
        help=f"in place of a model: {known}, or a JSON file with a list such as "
        "[[512, 256], [512]]",
    )
    made.add_argument("--forward", type=duration, metavar="TIME", help="of a pass, as 120ms")
    made.add_argument("--backward", type=duration, metavar="TIME", help="of a pass, as 280ms")
    made.add_argument("--workers", type=count(2), metavar="W", help="at least 2")
    made.add_argument("--bandwidth", type=rate, metavar="RATE", help="of a link, as 1gbit")
    made.add_argument("--latency", type=duration, metavar="TIME", help="of a message, as 0.2ms")
    made.add_argument("--algorithm", choices=ALGORITHMS, default="ring", help="of the all-reduce")
    made.add_argument("--ranks", type=count(1), nargs="+", default=[1, 2, 4, 8], metavar="R")
    made.add_argument(
        "--compute",
        type=Path,
        metavar="FILE",
        help="what --json has printed on the machine that it is for, in place of measuring here",
    )
    made.add_argument("--json", action="store_true", help="print everything as JSON")
    return made


def main(command_line: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = parser()
    given = arguments.parse_args(command_line)
    is_group = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" in os.environ
    try:
        model, loss = (
            loaded(given.model) if given.model is not None else (shapes_of(given.shapes), None)
        )
        compute = None if given.compute is None else compute_of(given.compute)
        if is_group:
            dist.init_process_group("gloo")
            torch.set_num_threads(1)  # workers may share a machine
        plan = advise(
            model,
            workers=given.workers,
            bandwidth=given.bandwidth,
            latency=given.latency,
            algorithm=given.algorithm,
            forward=given.forward,
            backward=given.backward,
            loss=None if given.forward is not None and given.backward is not None else loss,
            compute=compute,
            candidates=default_candidates(given.ranks),
        )
        if not is_group or dist.get_rank() == 0:
            print(json.dumps(plan.to_json(), indent=2) if given.json else plan)
    except (ValueError, TypeError) as error:
        arguments.error(str(error))
    finally:
        if dist.is_available() and dist.is_initialized() and is_group:
            dist.destroy_process_group()
    return 0


def loaded(name: str) -> tuple[nn.Module, Callable[[], torch.Tensor] | None]:
    """What a function of a module returns, and the function for a loss, if it has one."""
    module, _, function = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
        made = found()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"argument --model: cannot load {name!r}: {error}. Give it as package.module:function, "
            f"the function without arguments."
        ) from error
    model, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (loss is None or callable(loss)):
        raise ValueError(
            f"argument --model: {name!r} returned {type(made).__name__}. It must return a module, "
            f"or a module and a function without arguments that returns a loss."
        )
    return model, loss


def shapes_of(name: str) -> list[tuple[int, ...]]:
    """The shapes of a model that is known, or those in a file."""
    if name in KNOWN_SHAPES:
        return list(KNOWN_SHAPES[name]())
    content = json_of(name, "--shapes", f"one of {', '.join(KNOWN_SHAPES)}, or a JSON file")
    if not isinstance(content, list):
        raise ValueError(f"argument --shapes: {name} must have a list of shapes, as [[512, 256]].")
    return [shape_of(shape) for shape in content]


def compute_of(path: Path) -> dict[str, Any]:
    """Seconds by candidate, from what `--json` has printed or the part of it that says so."""
    content = json_of(str(path), "--compute", "a file that --json has written")
    content = content.get("compute", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ValueError(f"argument --compute: {path} must have seconds by name of the candidate.")
    return content


def json_of(path: str, argument: str, wanted: str) -> Any:
    """What is in a JSON file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"argument {argument}: {path!r} must be {wanted}: {error}") from error
