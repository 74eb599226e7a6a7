"""Trains an image classifier on any number of workers, with compressed gradients.

    torchrun --standalone --nproc-per-node 4 examples/image_classification.py --rank 4

Without further arguments: a small CNN on scikit-learn's scans of handwritten digits. With
`--data DIR`: the ResNet18 and the schedule of the PowerSGD paper on CIFAR-10, read from the files
of its binary version in DIR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from efsgd import PowerSGDOptimizer
from examples.baseline import sgd
from examples.builtin import DIGITS, digits_task
from examples.command_line import parse_arguments, save_run
from examples.distributed import join_workers
from examples.downloaded import cifar10_task
from examples.reporting import progress_bar
from examples.tasks import CIFAR10
from examples.training import Training, parameter_groups, prepare, seed_worker


def main() -> None:
    """Entry point."""
    arguments = parse_arguments(__doc__, "CIFAR-10's binary files")
    settings = arguments.override(CIFAR10 if arguments.data else DIGITS)
    with join_workers() as workers:
        prepare(workers, arguments.seed)
        if arguments.data:
            task, model = cifar10_task(settings.batch_size, workers, directory=arguments.data)
        else:
            task, model = digits_task(settings.batch_size, workers)
        if arguments.rank is None:
            model, optimizer = sgd(model, settings, arguments.seed, workers)
        else:
            groups = parameter_groups(model, settings.weight_decay)
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
