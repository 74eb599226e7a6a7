"""Searches of efsgd.audit beside those of breaching 0.1.2, on the same gradients.

    python3 -m venv .venv-peers
    .venv/bin/python -c 'import site; print(*site.getsitepackages())' \\
        > "$(.venv-peers/bin/python -c 'import site; print(*site.getsitepackages())')/efsgd.pth"
    .venv-peers/bin/python -m pip install --constraint constraints.txt breaching==0.1.2
    .venv-peers/bin/python -m benchmarks.audit_peers

The first commands make an environment in which breaching and what it needs lie beside the packages
of the one that is there, with its torch; nothing is added to that one.

An optimizer of the package takes a step with one face, and what receivers make of its message is
the gradient that both attack, naively: breaching knows no compressor. Both have the same starts,
labels, and iterations of Adam or evaluations of L-BFGS, no term for smoothness, and take the start
with the least distance. They are not the same program: breaching's L-BFGS has no line search, and
ours weighs each tensor by its size. They agree where their mean similarities differ by no more than
the standard deviations over images, or 0.01. About five minutes of one core.
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import logging
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.results import describe_machine, show, write_results
from efsgd import ErrorFeedbackSGD
from efsgd.audit import DLG, INVERTING_GRADIENTS, Message, invert, observe, psnr, ssim
from examples.audit_cases import COMPRESSORS, MODELS, images

NEGLIGIBLE = 0.01
METHODS = ("SGD", "Rank 1", "Rank 4", "Top-K 10 %")
#: By name iterations of breaching, of each start, and how many starts there are.
ATTACKS = {"DLG": (60, 4), "Inverting Gradients": (1000, 1)}
#: Evaluations of an iteration of each, of L-BFGS: torch's, without and with a line search.
PEER_EVALUATIONS, OWN_EVALUATIONS = 20, 2


@dataclass(frozen=True)
class Task:
    """One message of one image; its number is the seed of all that is drawn."""

    model: nn.Module
    message: Message
    image: Tensor
    label: Tensor
    number: int

    def starts(self, attack: str) -> list[Tensor]:
        """Those that `invert` draws."""
        generator = torch.Generator().manual_seed(self.number)
        draw = torch.randn if attack == "DLG" else torch.rand
        return [draw(self.image.shape, generator=generator) for _ in range(ATTACKS[attack][1])]


@dataclass(frozen=True)
class Score:
    """How close one attack came to one image."""

    ssim: float
    psnr: float
    mse: float

    @classmethod
    def of(cls, image: Tensor, found: Tensor) -> "Score":
        """Of what was found, within the bounds of images."""
        found = found.detach().clamp(0, 1)
        error = float((image - found).square().mean())
        return cls(ssim(image, found).item(), psnr(image, found).item(), error)


def task(model_name: str, method: str, number: int) -> Task:
    """A step of an optimizer of the package, and its message."""
    image, label = images("faces")[number : number + 1], torch.tensor([number % 10])
    torch.manual_seed(number)
    model = MODELS[model_name](image.shape[-1])
    optimizer = ErrorFeedbackSGD(
        model.parameters(), lr=0.0, momentum_form="sgd", compressor=COMPRESSORS[method]
    )
    cross_entropy(model(image), label).backward()
    with observe(optimizer) as recording:
        optimizer.step()
    (message,) = recording
    optimizer.zero_grad()
    return Task(model, message, image, label, number)


def own(attack: str, task: Task) -> Tensor:
    """What this package finds."""
    iterations, restarts = ATTACKS[attack]
    settings, bounds = INVERTING_GRADIENTS, (0.0, 1.0)
    if attack == "DLG":
        settings, bounds = DLG, None
        iterations = iterations * PEER_EVALUATIONS // OWN_EVALUATIONS
    found = invert(
        task.message, task.model, task.image.shape, task.label, bounds=bounds, seed=task.number,
        attack=replace(settings, iterations=iterations, restarts=restarts, total_variation=0.0),
    )  # fmt: skip
    return found.inputs


def breaching(attack: str, task: Task) -> Tensor:
    """What breaching finds."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        package, OmegaConf = _load_breaching()
        name = {"DLG": "deepleakage", "Inverting Gradients": "invertinggradients"}[attack]
        config = package.get_config(overrides=["case=0_sanity_check", f"attack={name}"]).attack
    OmegaConf.set_struct(config, False)
    config.attack_type = "optimization"  # with labels that are known
    config.optim.max_iterations, config.optim.callback = ATTACKS[attack][0], 10**9
    if "total_variation" in (config.regularization or {}):
        config.regularization.total_variation.scale = 0.0
    setup = {"device": torch.device("cpu"), "dtype": torch.float}
    attacker = package.attacks.prepare_attack(task.model, nn.CrossEntropyLoss(), config, setup)
    metadata = OmegaConf.create(
        {
            "shape": list(task.image.shape[1:]), "mean": [0.0], "std": [1.0],
            "modality": "vision", "classes": 10, "task": "classification",
        }
    )  # fmt: skip
    payload = {"parameters": list(task.model.parameters()), "buffers": [], "metadata": metadata}
    shared = {
        "gradients": [seen.decompressed.clone() for seen in task.message.parameters],
        "buffers": None,
        "metadata": _Attributes(
            num_data_points=len(task.image), labels=task.label, local_hyperparams=None,
            data_key="inputs",
        ),
    }  # fmt: skip
    found = []
    for start in task.starts(attack):
        inputs, statistics_of = attacker.reconstruct([payload], [shared], {}, initial_data=start)
        found.append((statistics_of["opt_value"], inputs["data"]))
    return min(found, key=lambda each: each[0])[1]


class _Attributes(dict[str, Any]):
    """A dictionary that is asked for attributes."""

    __getattr__ = dict.get


def _load_breaching() -> tuple[Any, Any]:
    try:
        is_installed = importlib.metadata.version("breaching") == "0.1.2"
    except importlib.metadata.PackageNotFoundError:
        is_installed = False
    if not is_installed:
        raise SystemExit(f"breaching 0.1.2 is not installed. {__doc__}")
    logging.disable(logging.CRITICAL)
    is_for_cpus = "+cpu" in importlib.metadata.version("torchvision")
    if torch.version.cuda is None and not is_for_cpus and not _OPERATORS:
        # That of PyPI is compiled for CUDA. Without its operators, which nothing here uses, it is
        # imported once it finds them declared.
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)
    import breaching as package
    from omegaconf import OmegaConf

    return package, OmegaConf


_OPERATORS: list[Any] = []


def agree(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether the means are as near as standard deviations make them, or the least that counts."""
    spread = math.hypot(statistics.stdev(ours), statistics.stdev(theirs))
    return abs(statistics.mean(ours) - statistics.mean(theirs)) <= max(spread, NEGLIGIBLE)


def spread(values: Sequence[float], form: str) -> str:
    """The mean and the standard deviation."""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


COLUMNS = ("SSIM", "breaching", "agree", "PSNR (dB)", "breaching", "MSE", "breaching")


def row_of(method: str, ours: Sequence[Score], theirs: Sequence[Score]) -> list[str]:
    """Of one message, in the order of `COLUMNS`."""
    row = [method]
    for name, form in (("ssim", ".2f"), ("psnr", ".1f"), ("mse", ".1e")):
        both = [[getattr(each, name) for each in found] for found in (ours, theirs)]
        row += [spread(each, form) for each in both]
        if name == "ssim":
            row.append("yes" if agree(*both) else "no")
    return row


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit_peers", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--images", type=int, default=3, help="from 2 to 50")
    parser.add_argument("--models", nargs="+", default=["MLP"], choices=list(MODELS))
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores there")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(1)
    found = {}
    for model, attack in itertools.product(arguments.models, ATTACKS):
        rows = []
        for method in METHODS:
            tasks = [task(model, method, number) for number in range(arguments.images)]
            both = [
                [Score.of(each.image, find(attack, each)) for each in tasks]
                for find in (own, breaching)
            ]
            rows.append(row_of(method, *both))
            found[f"{model}, {attack}, {method}"] = [[asdict(s) for s in each] for each in both]
        show(f"{attack}, {model}, one face, {arguments.images} times", ["", *COLUMNS], rows)
    settings = {"images": arguments.images, "models": arguments.models}
    write_results(arguments.output, "audit_peers", describe_machine(1), settings, {"scores": found})


if __name__ == "__main__":
    main()
