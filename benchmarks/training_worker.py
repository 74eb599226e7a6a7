"""One worker of `benchmarks.training`: trains one model with one method.

`namespaces.Network` starts it. Its only argument is a JSON file::

    task          a key of `TASKS`
    method        a key of `METHODS`
    seed          of the model, the batches and the compressor
    epochs        null: those of the task's settings
    lr            learning rate of one worker; null: that of the task's settings
    cifar10       a directory with CIFAR-10's binary files, or null
    epfml         a clone of epfml/powersgd, or null
    timeout       seconds, for every wait
    output        where worker 0 writes what came of it
"""

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.candidates import HOOK_STARTS_AT, ONE_BUCKET_MB, use_epfml
from benchmarks.worker import work
from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGD, TopK
from efsgd.algorithms.interfaces import Compressor
from efsgd.rank import Accordion, LGreCo, RankScheduler
from examples.adamw_quality import Hooked, adamw
from examples.baseline import data_parallel
from examples.builtin import DIGITS, digits_task
from examples.data import text
from examples.distributed import Workers
from examples.downloaded import cifar10_task
from examples.models import GPTLanguageModel, LSTMLanguageModel
from examples.optimizers import AveragedOptimizer, Optimizer, Scheduler, Wrapped
from examples.settings import Settings
from examples.tasks import CIFAR10, LanguageModeling
from examples.training import Task, Training, parameter_groups, prepare, seed_worker

WORDS = 4000  # more than the text has
# For four workers. The learning rates are the best of a few for what they are compared with.
LSTM = Settings(epochs=5, batch_size=8, lr=3.0, warmup_epochs=1, decay_at=(0.6, 0.85),
                windows_per_epoch=4)  # fmt: skip
GPT = Settings(epochs=5, batch_size=4, lr=1e-3, warmup_epochs=1, decay_at=(0.6, 0.85),
               windows_per_epoch=4)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What is trained, and by which optimizer.

    Attributes:
        settings: hyper-parameters, the same for all methods.
        make: the task and a fresh model, of the batch size, the workers and a directory with data.
        is_adamw: by AdamW; otherwise by SGD.
    """

    settings: Settings
    make: Callable[[int, Workers, Path | None], tuple[Task, nn.Module]]
    is_adamw: bool = False


def lstm_task(batch_size: int, workers: Workers) -> tuple[Task, nn.Module]:
    """The help topics of Python with all of their words, and an LSTM."""
    corpus = text.load_topics(WORDS)
    model = LSTMLanguageModel(len(corpus.vocabulary), 128, 128, 1, dropout=0.2)
    return LanguageModeling(corpus, batch_size, 16, workers), model


def gpt_task(batch_size: int, workers: Workers) -> tuple[Task, nn.Module]:
    """The same text, and a small GPT."""
    corpus = text.load_topics(WORDS)
    model = GPTLanguageModel(len(corpus.vocabulary), 128, 2, 4, 32, dropout=0.1)
    return LanguageModeling(corpus, batch_size, 32, workers), model


TASKS = {
    "digits": Trained(DIGITS, lambda size, workers, _: digits_task(size, workers)),
    "lstm": Trained(LSTM, lambda size, workers, _: lstm_task(size, workers)),
    "gpt": Trained(GPT, lambda size, workers, _: gpt_task(size, workers), is_adamw=True),
    "cifar10": Trained(
        CIFAR10, lambda size, workers, data: cifar10_task(size, workers, directory=data)
    ),
}

Made = tuple[nn.Module, Optimizer]
Method = Callable[[nn.Module, Trained, int, Workers], Made]


def torch_optimizer(model: nn.Module, trained: Trained) -> torch.optim.Optimizer:
    """That of torch.optim, for methods which average gradients before it."""
    if trained.is_adamw:
        return adamw(model.parameters(), trained.settings)
    groups = parameter_groups(model, trained.settings.weight_decay)
    return torch.optim.SGD(groups, **trained.settings.of_sgd())


def plain(model: nn.Module, trained: Trained, seed: int, workers: Workers) -> Made:
    """Under DistributedDataParallel, uncompressed."""
    return data_parallel(model, torch_optimizer(model, trained), workers)


def torch_hook(
    model: nn.Module, trained: Trained, seed: int, workers: Workers, *, rank: int
) -> Made:
    """torch's own hook, with one bucket: with several it stands still on gloo."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET_MB)
    state = PowerSGDState(
        None,
        matrix_approximation_rank=rank,
        start_powerSGD_iter=HOOK_STARTS_AT,
        min_compression_rate=1,  # compresses the same tensors as efsgd
        random_seed=seed,
    )
    ddp.register_comm_hook(state, powerSGD_hook)
    return ddp, Hooked(torch_optimizer(model, trained), state)


class Epfml(Wrapped):
    """An optimizer after epfml's aggregator, which keeps errors in `p.grad`."""

    def __init__(self, optimizer: torch.optim.Optimizer, aggregator: Any, nbytes: int) -> None:
        super().__init__(optimizer)
        self._powersgd = importlib.import_module("powersgd")
        self._aggregator, self._nbytes, self._steps = aggregator, nbytes, 0

    def zero_grad(self) -> None:
        """Leaves the errors where they are; the next gradient is added to them."""

    def step(self) -> Any:
        """Averages what `p.grad` has, and updates the parameters."""
        self._steps += 1
        return self._powersgd.optimizer_step(self.optimizer, self._aggregator)

    def communication_stats(self) -> dict[str, Any]:
        """What the same factors and vectors come to, which the aggregator does not count."""
        return {"total_bytes_sent": self._nbytes * self._steps, "check_bytes_sent": 0}


def epfml(model: nn.Module, trained: Trained, seed: int, workers: Workers, *, rank: int) -> Made:
    """epfml/powersgd, both factors in each step."""
    parameters = list(model.parameters())
    config = importlib.import_module("powersgd").Config(
        rank=rank,
        min_compression_rate=1,
        num_iters_per_step=2,
        start_compressing_after_num_steps=0,
    )
    aggregator = importlib.import_module("powersgd").PowerSGD(parameters, config=config)
    nbytes = PowerSGD(rank).payload_bytes([p.shape for p in parameters])
    return model, Epfml(torch_optimizer(model, trained), aggregator, nbytes)


def ours(
    model: nn.Module,
    trained: Trained,
    seed: int,
    workers: Workers,
    *,
    compressor: Compressor,
) -> Made:
    """efsgd: SGD in its optimizer, AdamW after its averager."""
    if "seed" in compressor.settings():
        compressor = replace(cast(Any, compressor), seed=seed)
    named = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [(named[p], p) for p in group["params"]]}
        for group in parameter_groups(model, trained.settings.weight_decay)
    ]
    if trained.is_adamw:
        averager = GradientAverager(groups, compressor)
        return model, AveragedOptimizer(torch_optimizer(model, trained), averager)
    return model, ErrorFeedbackSGD(groups, **trained.settings.of_ours(), compressor=compressor)


PLAIN = "DDP"
METHODS: dict[str, Method] = {
    PLAIN: plain,
    **{f"torch's hook, rank {rank}": partial(torch_hook, rank=rank) for rank in (1, 4)},
    **{f"epfml, rank {rank}": partial(epfml, rank=rank) for rank in (1, 4)},
    **{f"rank {rank}": partial(ours, compressor=PowerSGD(rank)) for rank in (1, 2, 4)},
    "Top-K, bytes of rank 4": partial(ours, compressor=TopK(rank=4)),
    "Accordion, ranks 1 and 4": partial(ours, compressor=PowerSGD(4)),
    "L-GreCo, error of rank 4": partial(ours, compressor=PowerSGD(4)),
}
POLICIES: dict[str, Callable[[], Any]] = {
    "Accordion, ranks 1 and 4": lambda: Accordion(1, 4, interval=4, sketch=256),
    "L-GreCo, error of rank 4": lambda: LGreCo(4, interval=5, shrink=0.25, gradients="worker 0"),
}


def scheduler_of(method: str, optimizer: Any) -> Scheduler | None:
    """Of methods whose ranks change."""
    if method not in POLICIES:
        return None
    if isinstance(optimizer, AveragedOptimizer):
        policy = POLICIES[method]()
        return RankScheduler(optimizer.averager, policy, lr_of=optimizer.optimizer)
    return RankScheduler(optimizer, POLICIES[method]())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains, and says how good the model was after how many seconds and bytes."""
    use_epfml(None if job["epfml"] is None else Path(job["epfml"]))
    workers = Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    changes = {name: job[name] for name in ("epochs", "lr") if job[name] is not None}
    trained = TASKS[job["task"]]
    trained = replace(trained, settings=replace(trained.settings, **changes))
    settings, seed = trained.settings, job["seed"]
    prepare(workers, seed)
    data = None if job["cifar10"] is None else Path(job["cifar10"])
    task, model = trained.make(settings.batch_size, workers, data)
    model, optimizer = METHODS[job["method"]](model, trained, seed, workers)
    scheduler = scheduler_of(job["method"], optimizer)
    seed_worker(seed, workers.worker)
    training = Training(task, model, optimizer, settings, workers, seed, scheduler)
    history = training.run()
    elapsed = [0.0, *itertools.accumulate(training.progress.seconds)]
    return {
        "quality": [value if math.isfinite(value) else None for value in history.quality],
        "seconds": [elapsed[steps] for steps in history.steps],
        "bytes": history.bytes_sent,
        "steps": history.steps,
        "is": task.quality,
    }


if __name__ == "__main__":
    work(run)
