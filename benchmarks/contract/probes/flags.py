"""G: flags of torch.optim.SGD."""

import copy

import torch
from torch import Tensor, nn

from benchmarks.contract.adapters import Adapter, Loop
from benchmarks.contract.made import given, noise, same
from benchmarks.contract.questions import require, row

__all__: list[str] = []


@row(
    "G1",
    "`foreach=None`, `True`, `False`: the same numbers",
    "Five compressed steps with momentum and weight decay, to 1e-6; state has the same names.",
)
def foreach(adapter: Adapter) -> None:
    adapter.needs_sgd()
    loops = [_run(adapter, foreach=value) for value in (None, True, False)]
    for loop in loops[1:]:
        require(same(loop.model, loops[0].model, 1e-6), "parameters differ")
        names = [sorted(map(sorted, run.optimizer.state.values())) for run in (loop, loops[0])]
        require(names[0] == names[1], "names in the state differ")


def _run(adapter: Adapter, **settings: object) -> Loop:
    model = given()
    loop = adapter.loop(model, momentum=0.9, weight_decay=0.1, **settings)
    for step in range(5):
        loop.train(noise(model, step))
    return loop


@row(
    "G2",
    "`fused=True`",
    "On the CPU: the same steps as without, to 1e-6.",
)
def fused(adapter: Adapter) -> None:
    adapter.needs_sgd()
    loops = [_run(adapter, fused=value) for value in (True, None)]
    require(same(loops[0].model, loops[1].model, 1e-6), "parameters differ")


@row(
    "G3",
    "`differentiable=True`",
    "`torch.autograd.gradcheck` of two uncompressed steps of one worker, with respect to the "
    "parameter, its gradients, and the learning rate.",
)
def differentiable(adapter: Adapter) -> None:
    adapter.needs_sgd()

    def stepped(lr: Tensor, start: Tensor, *gradients: Tensor) -> Tensor:
        p = start.clone()
        settings = {"lr": lr, "weight_decay": 0.1, "differentiable": True}
        if adapter.name == "efsgd":
            settings["min_compression_rate"] = torch.inf
        optimizer = adapter.optimizer([p], **settings)
        step = adapter.step_of(optimizer, [p])
        for gradient in gradients:
            p.grad = gradient
            step()
        return p

    made = [p.detach().requires_grad_() for p in given((3, 4), (3, 4), (3, 4)).double().weights]
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(stepped, (rate, *made))


@row(
    "G4",
    "Sparse gradients",
    "An embedding with sparse=True and a dense layer, one worker: six steps are those of SGD, to "
    "1e-6, where the dense layer is not compressed; then six where it is.",
)
def sparse(adapter: Adapter) -> None:
    adapter.needs_sgd()
    for rank in (None, 1):
        model = _Tagger()
        twin = copy.deepcopy(model)
        loop = adapter.loop(model, rank=rank, momentum=0.9)
        sgd = Loop(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9))
        for step in range(6):
            words = torch.tensor([step, 2 * step, 3])
            for run in (loop, sgd):
                run.zero_grad()
                run.wrapped(words).backward()
                run.step()
        require(rank or same(model, twin, 1e-6), "other parameters than SGD's")


class _Tagger(nn.Module):
    """A dense layer on a sparse embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(20, 12, sparse=True), nn.Linear(12, 10)

    def forward(self, words: Tensor) -> Tensor:
        """A loss."""
        loss: Tensor = self.layer(self.embedding(words)).square().mean()
        return loss


@row(
    "G5",
    "`maximize=True`",
    "With compression: bit by bit what minimizing does with the gradients' negatives.",
)
def maximize(adapter: Adapter) -> None:
    adapter.needs_sgd()
    models = [given(), given()]
    up = adapter.loop(models[0], maximize=True, momentum=0.9)
    down = adapter.loop(models[1], momentum=0.9)
    for step in range(5):
        gradients = noise(models[0], step)
        up.train(gradients)
        down.train([None if gradient is None else -gradient for gradient in gradients])
    require(same(*models), "parameters differ")
