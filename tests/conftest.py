"""Settings that hold for every test."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: machines are shared, and a test is about results, not time. derandomize makes CI
# repeatable, and 60 examples keep it short; HYPOTHESIS_PROFILE=explore looks for new examples, and
# for more of them, and HYPOTHESIS_PROFILE=quick has few.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("quick", settings.get_profile("ci"), max_examples=5)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed() -> None:
    torch.set_num_threads(1)  # several test processes share the cores
    torch.manual_seed(0)
