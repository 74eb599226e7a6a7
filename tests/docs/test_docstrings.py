"""The examples in the docstrings of the package run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import efsgd

MODULES = ["efsgd", *(each.name for each in pkgutil.walk_packages(efsgd.__path__, "efsgd."))]


@pytest.mark.filterwarnings("ignore")  # of other libraries; other tests are about ours
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    found = doctest.DocTestFinder(exclude_empty=True).find(
        module, globs={"efsgd": efsgd, "torch": torch}
    )
    for test in found:
        torch.manual_seed(0)
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
