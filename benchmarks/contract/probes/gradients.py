"""B7, B13 to B15: what a step does with gradients, and what it leaves alone."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contract.adapters import Adapter, Loop
from benchmarks.contract.made import (
    Given,
    given,
    noise,
    require_equal_workers,
    require_finite,
    same,
    values,
)
from benchmarks.contract.questions import NotProbed, require, row

__all__: list[str] = []


def odd_layouts(step: int) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters that are not contiguous, and gradients that are laid out in other ways."""
    image, transposed, plain = values([(4, 3, 2, 2), (10, 12), (9, 14)], step)
    parameters = [image.contiguous(memory_format=torch.channels_last), transposed.T, plain]
    gradients = [image + step, transposed.T.contiguous(), torch.ones(1, 1).expand(9, 14)]
    return parameters, gradients


@row(
    "B7",
    "`step()` leaves `p.grad` as it is, in any layout",
    "Contiguous; then channels_last and transposed parameters, gradients in their layout, in "
    "another, and expanded. Gradients are the same objects afterwards, with the same values; "
    "parameters are where they were.",
)
def gradients_stay(adapter: Adapter) -> None:
    model = given()
    loop = adapter.loop(model)
    for step in range(4):
        loop.zero_grad()
        loop.backward(noise(model, step))
        require_untouched(loop)
    model = Given(odd_layouts(0)[0])
    loop = adapter.loop(model)
    places = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    for step in range(4):
        loop.zero_grad()
        made = odd_layouts(step)[1]
        if loop.takes_gradients and step:
            for p, gradient in zip(model.parameters(), made, strict=True):
                p.grad = gradient
        else:
            loop.backward(list(made))
        require_untouched(loop)
    require(places == [(p.data_ptr(), p.stride()) for p in model.parameters()], "p was moved")


def require_untouched(loop: Loop) -> None:
    """A step must leave the gradients as they are."""
    parameters = list(loop.model.parameters())
    handed = [p.grad for p in parameters]
    copies = [gradient.clone() for gradient in handed if gradient is not None]
    loop.step()
    for p, gradient, copied in zip(parameters, handed, copies, strict=True):
        require(p.grad is gradient, "p.grad was replaced")
        require(torch.equal(p.grad, copied), "p.grad was modified")


def guarded_step(loop: Loop) -> None:
    """All workers skip the step if a gradient of any of them is not finite."""
    if loop.skips_nonfinite:
        loop.step()
        return
    finite = all(bool(p.grad.isfinite().all()) for p in loop.model.parameters())
    verdict = torch.tensor(float(finite))
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    if verdict.item():
        loop.step()


@row(
    "B13",
    "A step with a NaN gradient can be skipped without a trace",
    "One worker has a NaN once. All workers skip that step: by themselves, or because the loop "
    "looks at `p.grad` on all workers. Five steps later all is finite, moves, and is equal.",
    workers=2,
)
def nan_gradient(adapter: Adapter) -> None:
    model = given()
    loop = adapter.loop(model)
    for step in range(10):
        if step == 5:
            before = copy.deepcopy(model)
        gradients = noise(model, step, dist.get_rank())
        if step == 4 and dist.get_rank() == 1:
            gradients[0] = torch.full_like(model.weights[0], torch.nan)
        loop.zero_grad()
        loop.backward(gradients)
        guarded_step(loop)
    require_finite(model, "in the parameters, five steps after the gradient")
    require(not same(model, before), "no step after the NaN was finite, so none was taken")
    require_equal_workers(model, "after a skipped step")


@row(
    "B14",
    "The global random state is left alone",
    "It is the same before and after five steps, and workers with different seeds stay equal.",
    workers=2,
)
def random_state(adapter: Adapter) -> None:
    torch.manual_seed(dist.get_rank())
    model = given()
    loop = adapter.loop(model)
    before = torch.get_rng_state()
    for step in range(5):
        loop.train(noise(model, step, dist.get_rank()))
    require_equal_workers(model, "when their seeds do")
    require(torch.equal(before, torch.get_rng_state()), "it was advanced by a step")


@row(
    "B15",
    "No step waits for the accelerator",
    "Nothing but an accelerator can tell.",
)
def host_synchronization(adapter: Adapter) -> None:
    raise NotProbed("these probes run on the CPU")
