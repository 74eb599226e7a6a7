"""Sums of clipped gradients: Opacus computes gradients for each record, here they become one."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from efsgd.engine.parameters import compute_dtype
from efsgd.privacy.requirements import require_probable


class Records:
    """Sums of clipped gradients of the records in a step, of one backward pass or in several parts.

    Opacus leaves gradients of single records in `p.grad_sample`; with ghost clipping the sum of
    clipped ones in `p.grad`, and norms in `p._norm_sample`.

    Attributes:
        written: the gradients that the last step has set itself, by parameter.

    Args:
        is_ghost: whether gradients are clipped before they are there.
    """

    def __init__(self, is_ghost: bool) -> None:
        self._is_ghost, self.written = is_ghost, dict[Tensor, Tensor]()
        self._sums: dict[Tensor, Tensor] = {}
        self._in_batch = self._in_all = self._steps = 0
        # Between its two backward passes ghost clipping clears gradients: the norms it knew then.
        # Where others are there at the step it was no such pass, and gradients are not clipped.
        self._norms: dict[Tensor, Tensor] = {}

    def collect(self, named: Mapping[Tensor, str], max_grad_norm: float) -> None:
        """Adds what the last backward pass has left, and uses it up.

        Args:
            named: the names of the parameters that are trained.
            max_grad_norm: C.

        Raises:
            ValueError: names the parameter.
        """
        if self._is_ghost:
            count, sums = self._ghost_sums(named)
        else:
            found = {
                p: own for p in named if (own := per_sample_gradients(p, named[p])) is not None
            }
            count = require_per_sample(named, found, self.written)
            sums = clipped_sums(found, max_grad_norm) if found else {}
        for parameter, own in sums.items():
            self._sums[parameter] = self._sums[parameter] + own if parameter in self._sums else own
            _drop(parameter)
        self._norms.clear()
        self._in_batch += count

    def _ghost_sums(self, named: Mapping[Tensor, str]) -> tuple[int, dict[Tensor, Tensor]]:
        normed = [p for p in named if getattr(p, "_norm_sample", None) is not None]
        if normed and not all(map(self._is_clipped, named)):
            raise ValueError(
                "There are norms of gradients, but no clipped gradients. Make losses with Opacus's "
                "DPLossFastGradientClipping(model, optimizer, criterion), and this optimizer."
            )
        count = len(normed[0]._norm_sample) if normed else 0  # type: ignore[attr-defined]
        given = ((p, p.grad) for p in (named if normed else ()))
        return count, {p: g.to(compute_dtype(p)) for p, g in given if g is not None}

    def _is_clipped(self, parameter: Tensor) -> bool:
        norms = getattr(parameter, "_norm_sample", None)
        if norms is None:
            return parameter.grad is None
        return norms is self._norms.get(parameter)

    def end_batch(self, most_expected: float) -> None:
        """The step's records are complete: were they as many as may be expected?

        Raises:
            ValueError: there are far more of them, in this step or in all so far.
        """
        count, self._in_batch = self._in_batch, 0
        try:
            require_probable(count, most_expected, 1)
            require_probable(
                self._in_all + count, most_expected * (self._steps + 1), self._steps + 1
            )
        except ValueError:
            self._sums.clear()
            raise
        self._in_all, self._steps = self._in_all + count, self._steps + 1

    def take(self, parameter: Tensor) -> Tensor:
        """The sum for a parameter, which may be written to; zeros where no record has any."""
        own = self._sums.pop(parameter, None)
        dtype = compute_dtype(parameter)
        return (
            torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            if own is None
            else own
        )

    def clear(self) -> None:
        """Forgets the records of a step that will not be taken."""
        self._sums.clear()
        self._in_batch = 0

    def drop(self, parameters: Iterable[Tensor]) -> None:
        """The same, of a step that failed, and what was not collected for it."""
        self.clear()
        for parameter in parameters:
            _drop(parameter)

    def zero_grad(self, parameters: Iterable[Tensor]) -> None:
        """Clears gradients of records; norms stay between the two passes of ghost clipping."""
        self.written.clear()
        self._norms.clear()
        for parameter in parameters:
            norms = getattr(parameter, "_norm_sample", None)
            if norms is not None:
                self._norms[parameter] = norms
            if hasattr(parameter, "grad_sample"):
                parameter.grad_sample = None


def _drop(parameter: Tensor) -> None:
    """Gradients of records are large, and of use only once."""
    for name in ("grad_sample", "_norm_sample"):
        if hasattr(parameter, name):
            setattr(parameter, name, None)
    parameter.grad = None


def per_sample_gradients(parameter: Tensor, name: str) -> Tensor | None:
    """Those that Opacus has left in `p.grad_sample`, [records, *shape]; None where there are none.

    Raises:
        ValueError: they are of several backward passes, a list: a record that takes part in two of
            them would be clipped twice, and move the sum by twice the clipping norm.
    """
    found: Any = getattr(parameter, "grad_sample", None)
    if isinstance(found, list):
        raise ValueError(
            f"{name} has gradients of records from {len(found)} backward passes: a record that is "
            f"in two of them would count twice. Take a step after each backward pass; a batch that "
            f"is too large for one is split by Opacus's BatchMemoryManager. The batch is used up."
        )
    gradients: Tensor | None = found
    return gradients


def clipped_sums(gradients: Mapping[Tensor, Tensor], max_grad_norm: float) -> dict[Tensor, Tensor]:
    """The sum over records of g_i min(1, C / ‖g_i‖₂), the norm taken over all tensors together.

    A record whose gradient is NaN or infinite adds nothing. So no record moves the sum by more
    than C, whatever it is.

    Args:
        gradients: g_i by parameter, [records, *shape], of equally many records.
        max_grad_norm: C.

    Returns:
        Sums by parameter, float32 or float64, of the parameter's shape.

    Source: Abadi et al., arXiv 1607.00133, Algorithm 1; the flat norm and 1e-6 are Opacus's.
    """
    flat = {
        parameter: own.detach().reshape(len(own), parameter.numel()).to(compute_dtype(parameter))
        for parameter, own in gradients.items()
    }
    norms = _norms(flat.values(), None)
    if not bool(norms.isfinite().all()):  # a square may be too large where the norm is not
        norms = _norms(flat.values(), torch.float64)
    factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    finite = norms.isfinite()
    if not bool(finite.all()):
        kept = finite.nonzero().flatten()
        factors = factors[kept]
        flat = {parameter: own[kept.to(own.device)] for parameter, own in flat.items()}
    return {
        parameter: (factors.to(own.device, own.dtype) @ own).view(parameter.shape)
        for parameter, own in flat.items()
    }


def _norms(flat: Iterable[Tensor], dtype: torch.dtype | None) -> Tensor:
    """The norm of each record's gradient, on the device of the first tensor."""
    norms = [torch.linalg.vector_norm(own, dim=1, dtype=dtype) for own in flat]
    of_tensors = torch.stack([norm.to(norms[0]) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(of_tensors, dim=0)
    return total


def require_per_sample(
    named: Mapping[Tensor, str], found: Mapping[Tensor, Tensor], written: Mapping[Tensor, Tensor]
) -> int:
    """Checks that what is there are gradients of single records, and nothing else.

    Args:
        named: the names of the parameters that are trained.
        found: gradients of records.
        written: the gradients that the last step has set itself.

    Returns:
        The number of records.

    Raises:
        ValueError: names the parameter.
    """
    counts: dict[int, str] = {}
    is_stale = False
    for parameter, name in named.items():
        gradient = parameter.grad
        if parameter in found:
            if getattr(found[parameter], "_processed", False):
                raise ValueError(
                    f"The gradients of {name} have been clipped by an optimizer of Opacus already. "
                    f"PrivateOptimizer clips and adds noise itself: do without "
                    f"PrivacyEngine.make_private, and give the model to opacus.GradSampleModule."
                )
            counts.setdefault(len(found[parameter]), name)
        elif getattr(parameter, "_norm_sample", None) is not None:
            raise ValueError(
                f"{name} has norms of gradients, as with ghost clipping. Give module=, the model "
                f"that computes them: what it clips to must fit the noise."
            )
        elif gradient is not None and gradient is written.get(parameter):
            is_stale = True
        elif gradient is not None:
            raise ValueError(
                f"{name} has a gradient, but none of single records: nothing can be clipped. Wrap "
                f"the model in opacus.GradSampleModule, and train only layers that it supports."
            )
    if len(counts) > 1:
        said = " and ".join(f"{count} for {name}" for count, name in counts.items())
        raise ValueError(
            f"Gradients are there of different numbers of records: {said}. All parameters must be "
            f"trained on the same batch."
        )
    if is_stale and not counts:
        raise ValueError(
            "There are no gradients of records since the last step. Call zero_grad(), and the "
            "backward pass of a batch, before each step."
        )
    return next(iter(counts), 0)
