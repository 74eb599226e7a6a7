"""Is a compressor linear? Two of them, and a property that says so."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from your_own_compressor import Sketch

from efsgd import ErrorFeedbackSGD, TopK
from efsgd.testing import step_together
from efsgd.testing.strategies import gradients, shape_lists

KINDS = ["gaussian", "rank_deficient", "sparse", "scaled", "huge", "tiny"]
some_gradients = gradients(shape_lists(max_size=2), st.integers(1, 3), kinds=KINDS)
some_factor = st.sampled_from([-3.0, 1e-9, 1e9])
examples = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def updates(compressor, made):
    """What a first step makes of all workers' gradients, made[worker][parameter]."""
    optimizers = []
    for own in made:
        parameters = [torch.zeros_like(gradient, requires_grad=True) for gradient in own]
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient.clone()
        options = {"lr": 1.0, "momentum_form": "sgd", "compressor": compressor}
        optimizers.append(ErrorFeedbackSGD(parameters, **options))
    step_together(optimizers)
    return [-parameter.detach() for parameter in optimizers[0].param_groups[0]["params"]]


def assert_linear(compressor, made, factor):
    mean = [torch.stack(each).mean(dim=0) for each in zip(*made, strict=True)]
    multiple = [[factor * gradient for gradient in own] for own in made]
    found = updates(compressor, made)
    # Of the largest number: in float64, sums lose 1e-16 or so.
    slack = 1e-12 * max([g.abs().max().item() for own in made for g in own if g.numel()], default=0)
    for update, other in zip(found, updates(compressor, [mean]), strict=True):
        assert torch.allclose(update, other, rtol=0, atol=slack), (
            f"{len(made)} workers do not end where one worker with their mean ends"
        )
    for update, other in zip(found, updates(compressor, multiple), strict=True):
        assert torch.allclose(factor * update, other, rtol=0, atol=abs(factor) * slack), (
            f"{factor} times the gradients do not give {factor} times the update"
        )


@examples
@given(some_gradients, some_factor)
def test_the_sketch_is_linear(made, factor):
    assert_linear(Sketch(bin_size=4), made, factor)


@examples
@given(some_gradients, some_factor)
def test_top_k_is_linear(made, factor):
    assert_linear(TopK(density=0.25), made, factor)


def main():
    for test in (test_the_sketch_is_linear, test_top_k_is_linear):
        try:
            test()
            print(f"{test.__name__}: yes")
        except AssertionError as error:
            print(f"{test.__name__}: no, {error}")


if __name__ == "__main__":
    main()
