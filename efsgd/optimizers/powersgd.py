"""PowerSGD in place of torch.optim.SGD."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from efsgd.compressors import PowerSGD
from efsgd.optimizers.error_feedback_sgd import ErrorFeedbackSGD
from efsgd.wire.transports import Workers


class PowerSGDOptimizer(ErrorFeedbackSGD):
    r"""torch.optim.SGD that sends rank-r gradients: PowerSGD, Algorithms 1 and 2.

    Each worker calls `step()` with its own, local gradients. Two all-reduces per step carry
    all communication.

    **Two momentum forms.** `momentum_form="paper"` is Algorithm 2, with m ← λm + Δ' and
    x ← x − γ(Δ' + m). `momentum_form="sgd"` is torch.optim.SGD's rule, with its dampening and
    nesterov. They differ: a constant gradient moves x by γ(1 + 1/(1−λ)) times itself per step
    in the paper's form and by γ/(1−λ) in torch's, 11 against 10 times at λ = 0.9; without
    momentum the paper's form steps by 2γΔ'. To keep the learning rate of a run that was tuned
    with torch.optim.SGD, pass `momentum_form="sgd"`.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups. Names appear in errors.
            `rank`, `min_compression_rate` and `batch_dims` may be set per group, as well as SGD's
            arguments.
        lr: learning rate γ.
        momentum: λ.
        dampening: as in torch.optim.SGD; needs `momentum_form="sgd"`.
        weight_decay: multiple of the parameters that is added to the averaged update; never
            compressed.
        nesterov: as in torch.optim.SGD; needs `momentum_form="sgd"`.
        maximize: ascend instead of descending.
        foreach: whether many tensors share a kernel; None: on accelerators.
        differentiable: whether autograd goes through the step; for one worker that compresses
            nothing (`min_compression_rate=math.inf`).
        fused: as in torch.optim.SGD; needs `momentum_form="sgd"`.
        rank: r, at least 1. A tensor of two or more dimensions is seen as the matrix [n, m], n
            its first dimension, and compressed to rank min(n, m, rank).
        min_compression_rate: a matrix is compressed where n·m > rate·r·(n + m). 1.0: wherever
            fewer floats are sent, as in the paper's figures. 0.0: always. math.inf: never.
        momentum_form: "paper" or "sgd", see above.
        warm_start: whether power iteration starts from the last step's Q; else Q is drawn
            anew at each step.
        error_feedback: whether what was not sent is kept by each worker, and sent later.
        start_compressing_at: the number of steps that are sent uncompressed first.
        nonfinite: what all workers do when any of them has a NaN or infinite gradient: "raise"
            a `NonFiniteGradientError`, or "skip" the step. Either way nothing has changed. Under
            torch.amp.GradScaler steps are always skipped.
        max_grad_norm: the norm of all parameters' Δ' together is clipped to it, the same on every
            worker; None does not. With math.inf it is measured only.
        check_every: compare the workers' settings, parameters and replicated state every
            `check_every` steps; 0 does so before the first alone.
        bucket_bytes: gradients are exchanged in buckets of about so many bytes, the last parameters
            first, so that one is compressed while another travels; each costs collectives of its
            own. None: all together, which is fastest unless sending takes as long as compressing.
        seed: of the first Q, the same on every worker. The global generator is not touched.
        compile: for ranks up to 8, whether passes over memory are native code on CPUs, and products
            fused by torch.compile on accelerators. Results are the same to rounding. The same for
            all groups and on all workers, and not changed by loading a checkpoint. The first step
            takes longer; where there is no compiler, a warning says so and steps run as without.
        alternating: whether a step multiplies from one side only, by turns: one all-reduce per
            step in place of two, and half the bytes. See `efsgd.PowerSGD`.
        batch_dims: how many of a tensor's first dimensions count matrices. With 1, experts
            [E, n, m] are E matrices, trained and compressed as E parameters [n, m] would be, to the
            bit; with 0 one matrix, of n·m columns. Set it for a group of stacks, or for single
            parameters: a matrix [n, m] would be n vectors, which are sent as they are.
        process_group: the workers; None is the default group, looked up at each step. Without
            torch.distributed there is one worker, and nothing is communicated. Not pickled.

    Raises:
        ValueError: an argument is out of range, or two of them contradict each other.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = PowerSGDOptimizer(
        ...     model.parameters(), lr=0.1, momentum=0.9, rank=2, momentum_form="sgd"
        ... )
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.communication_stats()["collectives"]
        2

    Source: Vogels, Karimireddy, Jaggi, NeurIPS 2019, arXiv 1905.13727.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        rank: int = 4,
        min_compression_rate: float = 1.0,
        momentum_form: str = "paper",
        warm_start: bool = True,
        error_feedback: bool = True,
        start_compressing_at: int = 0,
        nonfinite: str = "raise",
        max_grad_norm: float | None = None,
        check_every: int = 0,
        bucket_bytes: int | None = None,
        seed: int = 0,
        compile: bool = False,
        alternating: bool = False,
        batch_dims: int = 0,
        process_group: Workers = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            compressor=PowerSGD(
                rank,
                min_compression_rate,
                warm_start,
                seed,
                compile,
                alternating,
                batch_dims=batch_dims,
            ),
            momentum_form=momentum_form,
            error_feedback=error_feedback,
            start_compressing_at=start_compressing_at,
            nonfinite=nonfinite,
            max_grad_norm=max_grad_norm,
            check_every=check_every,
            bucket_bytes=bucket_bytes,
            process_group=process_group,
        )
