"""Attacks that look for inputs whose gradient fits a message: what they compare, how they search.

The sources of the two that others are variants of stand with them.
"""

from dataclasses import dataclass
from typing import Literal

from efsgd.checks import require_bool, require_choice, require_integer, require_number


@dataclass(frozen=True)
class Attack:
    """How inputs are looked for; `dataclasses.replace` makes variants.

    Attributes:
        adaptive: whether a candidate's gradient is compressed as the message was, and compared with
            what was sent. Otherwise the gradient itself is compared with what receivers make of
            the message, as if nothing had been compressed. An attacker who knows the compressor
            is adaptive: nothing of it is secret.
        distance: "l2", the squared error of each tensor in relation to its square, on average over
            the tensors, or "cosine", 1 - cos of the angle between all tensors together. Signs have
            no such distance: for an adaptive attacker each entry of the gradient counts by how far
            it is on the wrong side of zero.
        search: "l-bfgs", with a line search after Wolfe, or "adam", with signs of gradients and
            steps that shrink to a tenth after 3/8, 5/8 and 7/8 of the iterations.
        iterations: of each start. Those of L-BFGS whose line searches are long count as several.
        restarts: how many random starts there are; the one with the least distance is taken. They
            matter: one start often ends far from the best.
        lr: of the search.
        total_variation: how much the mean difference of neighboring pixels counts, in images.

    Raises:
        ValueError: a value that cannot be.
    """

    adaptive: bool = True
    distance: Literal["l2", "cosine"] = "l2"
    search: Literal["l-bfgs", "adam"] = "l-bfgs"
    iterations: int = 300
    restarts: int = 2
    lr: float = 1.0
    total_variation: float = 1e-4

    def __post_init__(self) -> None:
        require_bool("adaptive", self.adaptive)
        require_choice("distance", self.distance, ("l2", "cosine"))
        require_choice("search", self.search, ("l-bfgs", "adam"))
        require_integer("iterations", self.iterations, 1)
        require_integer("restarts", self.restarts, 1)
        require_number("lr", self.lr, above=0)
        require_number("total_variation", self.total_variation)

    def __str__(self) -> str:
        kind = "adaptive" if self.adaptive else "naive"
        return f"{kind}, {self.distance}, {'L-BFGS' if self.search == 'l-bfgs' else 'Adam'}"


#: Deep Leakage from Gradients, Zhu, Liu and Han, NeurIPS 2019, arXiv:1906.08935. Their squared
#: error is one sum over all tensors; here small tensors count as much as large ones.
DLG = Attack(adaptive=False, total_variation=0.0)

#: Inverting Gradients, Geiping, Bauermeister, Dröge and Moeller, NeurIPS 2020, arXiv:2003.14053,
#: with a tenth of their 24,000 iterations.
INVERTING_GRADIENTS = Attack(
    adaptive=False, distance="cosine", search="adam", iterations=2400, lr=0.1, total_variation=0.2
)
