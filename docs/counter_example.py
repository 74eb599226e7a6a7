"""Where PowerSGD stays for ever, and PowerSGD+ does not.

f(X) = ½‖X − A‖², A = diag(1, ½), from X = 0, at rank 1. The first Q is e₁, an eigenvector of every
gradient that follows: PowerSGD sees nothing of the second direction, whose error grows and is never
sent. A refresh every 20 steps finds it. A Gaussian Q, which is what PowerSGD does start from, has
some part in each direction and converges without.

    python docs/counter_example.py

writes docs/images/counter-example.png.
"""

from pathlib import Path

import torch

from efsgd import ErrorFeedbackSGD, PowerSGD
from efsgd.compressors.powersgd_plus import PowerSGDPlus

TARGET = Path(__file__).parent / "images" / "counter-example.png"
A = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
E1 = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
EVERY = 20


def descend(
    compressor: PowerSGD, query: torch.Tensor | None = E1, steps: int = 200
) -> tuple[list[float], list[float]]:
    """Before each step and after the last: ‖X − A‖, and the error of the second direction.

    `query` is the first Q; None leaves the compressor's own, which is Gaussian."""
    x = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = ErrorFeedbackSGD([x], lr=0.3, momentum_form="sgd", compressor=compressor)
    if query is not None:
        optimizer.state[x]["q"] = query.clone()
    distances, errors = [], []
    for step in range(steps + 1):
        distances.append(float((x.detach() - A).norm()))
        errors.append(float(optimizer.state[x]["error"][1, 1]))
        if step < steps:
            x.grad = (x - A).detach()
            optimizer.step()
    return distances, errors


def runs() -> dict[str, tuple[list[float], list[float]]]:
    """The three runs of the plot, by name."""
    rank_1 = {"rank": 1, "min_compression_rate": 0.0}
    return {
        "PowerSGD, first Q = e₁": descend(PowerSGD(**rank_1)),
        f"PowerSGD+, a refresh every {EVERY} steps": descend(
            PowerSGDPlus(**rank_1, refresh_every=EVERY)
        ),
        "PowerSGD, Gaussian first Q": descend(PowerSGD(**rank_1), query=None),
    }


def main() -> None:
    """Entry point."""
    import matplotlib

    matplotlib.use("Agg")  # writes files, needs no screen
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, (distances, errors) in runs().items():
        left.semilogy([max(distance, 1e-16) for distance in distances], label=name)
        right.plot(errors, label=name)
    left.set(xlabel="step", ylabel="‖X − A‖")
    right.set(xlabel="step", ylabel="what is not sent, second direction")
    right.legend(fontsize=8)
    figure.savefig(TARGET, dpi=150)


if __name__ == "__main__":
    main()
