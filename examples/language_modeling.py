"""Trains an LSTM language model on any number of workers, with compressed gradients.

    torchrun --standalone --nproc-per-node 4 examples/language_modeling.py --rank 4

Without further arguments: a small LSTM on the help topics that come with Python, in words. With
`--data DIR`: the LSTM and the schedule of the PowerSGD paper on WikiText-2, read from the token
files in DIR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from efsgd import PowerSGDOptimizer
from examples.baseline import sgd
from examples.builtin import TOPICS, topics_task
from examples.command_line import parse_arguments, save_run
from examples.distributed import join_workers
from examples.downloaded import wikitext2_task
from examples.reporting import progress_bar
from examples.tasks import WIKITEXT2
from examples.training import Training, parameter_groups, prepare, seed_worker


def main() -> None:
    """Entry point."""
    arguments = parse_arguments(__doc__, "WikiText-2's token files")
    settings = arguments.override(WIKITEXT2 if arguments.data else TOPICS)
    with join_workers() as workers:
        prepare(workers, arguments.seed)
        if arguments.data:
            task, model = wikitext2_task(settings.batch_size, workers, directory=arguments.data)
        else:
            task, model = topics_task(settings.batch_size, workers)
        if arguments.rank is None:
            model, optimizer = sgd(model, settings, arguments.seed, workers)
        else:
            groups = parameter_groups(model, settings.weight_decay)
            optimizer = PowerSGDOptimizer(groups, **settings.of_ours(), rank=arguments.rank)
        seed_worker(arguments.seed, workers.worker)
        steps = settings.epochs * task.steps_per_epoch
        with progress_bar("text", steps, visible=workers.is_first) as report:
            checkpoints = arguments.checkpoints("language_modeling", settings, workers)
            training = Training(task, model, optimizer, settings, workers, arguments.seed)
            history = training.run(report, checkpoints)
        if workers.is_first:
            save_run("language_modeling", task.quality, history, settings, arguments)


if __name__ == "__main__":
    main()
