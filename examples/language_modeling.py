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
from examples.baseline import data_parallel_sgd
from examples.command_line import parse_arguments, save_run
from examples.data import text
from examples.distributed import join_workers
from examples.models import LSTMLanguageModel
from examples.reporting import progress_bar
from examples.tasks import TOPICS, WIKITEXT2, WINDOW, LanguageModeling, topics_model
from examples.training import Training, parameter_groups, prepare, seed_worker


def main() -> None:
    """Entry point."""
    arguments = parse_arguments(__doc__, "WikiText-2's token files")
    settings = arguments.override(WIKITEXT2 if arguments.data else TOPICS)
    with join_workers() as workers:
        prepare(workers, arguments.seed)
        if arguments.data:
            corpus, window = text.load_wikitext2(arguments.data), 30
            model = LSTMLanguageModel(len(corpus.vocabulary), 650, 650, 3, dropout=0.4)
        else:
            corpus, window = text.load_topics(), WINDOW
            model = topics_model(corpus)
        model = model.to(workers.device)
        task = LanguageModeling(corpus, settings.batch_size, window, workers)
        groups = parameter_groups(model, settings.weight_decay)
        if arguments.rank is None:
            model, optimizer = data_parallel_sgd(model, groups, workers, **settings.of_sgd())
        else:
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
