"""Trains an image classifier on any number of workers, with compressed gradients.

    torchrun --standalone --nproc-per-node 4 examples/image_classification.py --rank 4

Without further arguments: a small CNN on scikit-learn's scans of handwritten digits. With
`--data DIR`: the ResNet18 and the schedule of the PowerSGD paper on CIFAR-10, read from the files
of its binary version in DIR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn
from torch.optim import SGD

from efsgd import PowerSGDOptimizer
from examples.baseline import data_parallel
from examples.builtin import DIGITS, digits_task
from examples.command_line import parse_arguments, save_run
from examples.data import cifar10
from examples.distributed import join_workers
from examples.models import CifarResNet18
from examples.reporting import progress_bar
from examples.tasks import CIFAR10, ImageClassification
from examples.training import Training, parameter_groups, prepare, seed_worker


def main() -> None:
    """Entry point."""
    arguments = parse_arguments(__doc__, "CIFAR-10's binary files")
    settings = arguments.override(CIFAR10 if arguments.data else DIGITS)
    with join_workers() as workers:
        prepare(workers, arguments.seed)
        if arguments.data:
            model: nn.Module = CifarResNet18().to(workers.device)
            data = cifar10.load(arguments.data)
            task = ImageClassification(data, settings.batch_size, workers, padding=4, flip=True)
        else:
            task, model = digits_task(settings.batch_size, workers)
        groups = parameter_groups(model, settings.weight_decay)
        if arguments.rank is None:
            model, optimizer = data_parallel(model, SGD(groups, **settings.of_sgd()), workers)
        else:
            optimizer = PowerSGDOptimizer(groups, **settings.of_ours(), rank=arguments.rank)
        seed_worker(arguments.seed, workers.worker)
        steps = settings.epochs * task.steps_per_epoch
        with progress_bar("images", steps, visible=workers.is_first) as report:
            checkpoints = arguments.checkpoints("image_classification", settings, workers)
            training = Training(task, model, optimizer, settings, workers, arguments.seed)
            history = training.run(report, checkpoints)
        if workers.is_first:
            save_run("image_classification", task.quality, history, settings, arguments)


if __name__ == "__main__":
    main()
