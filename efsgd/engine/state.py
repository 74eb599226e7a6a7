"""What is kept for each parameter in `optimizer.state`, and its way into buffers and back.

`state[p]` holds tensors only, complete from construction, with equal keys on all workers:

    momentum_buffer   m, shape, dtype and order of dimensions of p; where the group has momentum
    momentum_started  bool []: whether m was ever updated (torch.optim.SGD's first is undampened)
    error             e_w, shape of p, float32 or float64; for compressed tensors
    q                 PowerSGD's warm-started Q, [m, r], float32 or float64; for compressed tensors
    p                 with `alternating=True` the warm-started P, [n, r], of the same dtype
                      (both of a stack: first the dimensions that count matrices)
    local_momentum    Signum's m_w, shape of p, float32 or float64; has a momentum_started as well

Errors, and what the compressor declares as `local_state`, are each worker's own; all else is equal
on all workers.

A complex parameter is worked on as its real view, [..., 2], and that is its error's shape, and its
local momentum's.

During training `error`, `q`, `p` and `local_momentum` are live views of batched buffers. Like any
optimizer's state they change with the next step: copy a state_dict (torch.save, copy.deepcopy) to
keep it.
"""

from collections.abc import Hashable, Iterable, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.interfaces import Compressor
from efsgd.algorithms.low_rank.factors import resized
from efsgd.engine.parameters import ParameterInfo, compute_dtype, require_noise
from efsgd.engine.update import Method
from efsgd.layout import is_fake

#: What is kept for one parameter, by name.
State: TypeAlias = MutableMapping[str, Tensor]


def local_state(compressor: Compressor) -> tuple[str, ...]:
    """Names of what is each worker's own."""
    return ("error", *compressor.local_state)


def complete_(state: State, info: ParameterInfo, method: Method) -> None:
    """Adds to one parameter's state what is missing in it, and fits the rest (in place)."""
    compressor = method.compressor
    parameter, settings, entry = info.parameter, info.settings, info.entry(compressor)
    given: Mapping[str, object] = state
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_inference():  # later steps could not write to it
            state[name] = value.clone()
    if method.keeps_momentum:
        complete_momentum_(state, info)
    dtype, device = compute_dtype(parameter), parameter.device
    if "error" in state:
        require_tensor(state["error"], "error", info.name)
        require_shape(state["error"], info.shape, "error", info.name)
        state["error"] = state["error"].to(device=device, dtype=dtype)
    elif settings["error_feedback"] and entry.level is not None:
        state["error"] = torch.zeros(info.shape, dtype=dtype, device=device)
    if entry.level is None:
        return
    for name, initial in compressor.initial_state(entry, settings).items():
        kept = state.get(name)
        if kept is not None:
            require_tensor(kept, name, info.name)
        if kept is None or kept.shape != initial.shape:
            is_factor = name not in compressor.local_state
            state[name] = (
                initial if kept is None else _fitted(kept, initial, name, info.name, is_factor)
            )
        kind = (device, dtype) if initial.is_floating_point() else (initial.device, initial.dtype)
        state[name] = state[name].to(*kind).contiguous()


def _fitted(kept: Tensor, initial: Tensor, name: str, owner: str, is_factor: bool) -> Tensor:
    """A factor of another rank, or where other dimensions count matrices a new one.

    Anything else has the wrong shape.
    """
    is_factor = is_factor and min(kept.dim(), initial.dim()) >= 2 and kept.is_floating_point()
    if is_factor and kept.dim() != initial.dim():
        return initial
    if not is_factor or kept.shape[:-1] != initial.shape[:-1]:
        require_shape(kept, initial.shape, name, owner)
    pairs = zip(*(each.reshape(-1, *each.shape[-2:]) for each in (kept, initial)), strict=True)
    return torch.stack([resized(*pair) for pair in pairs]).view(initial.shape)


def validate_states(
    infos: Iterable[ParameterInfo],
    states: Mapping[Tensor, Mapping[str, Any]],
    compressor: Compressor,
) -> None:
    """Checks what users may have put into state and gradients, before anything is changed."""
    for info in (info for info in infos if info.is_trained):
        require_noise(info.parameter, info.name)
        shapes = {"momentum_buffer": info.parameter.shape}
        shapes |= dict.fromkeys(local_state(compressor), info.shape)
        for name, value in states.get(info.parameter, {}).items():
            if name in shapes:
                require_tensor(value, name, info.name)
                require_shape(value, shapes[name], name, info.name)


def complete_momentum_(state: State, info: ParameterInfo) -> None:
    """The part of `complete_` for m, which users may replace between steps (modified in place)."""
    parameter, present = info.parameter, state.get("momentum_buffer")
    has_started = state.get("momentum_started")
    if has_started is not None:
        require_tensor(has_started, "momentum_started", info.name)
        require_shape(has_started, torch.Size(), "momentum_started", info.name)
    if present is None:
        if has_started is None or has_started:  # it goes with the buffer
            state["momentum_started"] = torch.tensor(False, device="cpu")
        if info.group["momentum"] != 0:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        return
    require_tensor(present, "momentum_buffer", info.name)
    require_shape(present, parameter.shape, "momentum_buffer", info.name)
    # One that is there, without a word or in place of our zeros, was given by the user.
    if has_started is None or (not has_started and _is_nonzero(present)):
        state["momentum_started"] = torch.tensor(True, device="cpu")
    if not _is_like(present, parameter):
        state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        state["momentum_buffer"].copy_(present)


def _is_nonzero(tensor: Tensor) -> bool:
    """Whether any element is; False where there are no values."""
    return not (tensor.is_meta or is_fake(tensor)) and bool(tensor.any())


def _is_like(tensor: Tensor, parameter: Tensor) -> bool:
    return (
        tensor.shape == parameter.shape
        and tensor.dtype == parameter.dtype
        and tensor.device == parameter.device
        and not tensor.is_inference()
        and (tensor.stride() == parameter.stride() or tensor.stride() == _dense_strides(parameter))
    )


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Those of a tensor made like it, which leaves no gaps in memory."""
    return torch.empty_like(parameter, device="meta").stride()


class StateViews:
    """What `optimizer.state` shows of the buckets: the only way out of them, and back in.

    `states` are those of the parameters that are trained, by index (modified in place).
    """

    def __init__(
        self, infos: Iterable[ParameterInfo], states: Mapping[int, State], method: Method
    ) -> None:
        self._infos, self._states, self._method = list(infos), states, method
        # By index and name, the tensors that were last known to be in the state.
        self._shown: dict[int, dict[str, Tensor | None]] = {}
        self._momenta: _Momenta | None = None

    @property
    def steady_since(self) -> Hashable:
        """The same while states hold the same tensors, all momenta begun; None: unknown."""
        return self._momenta

    def release_zeros_(self, kept: Iterable[Tensor] = ()) -> None:
        """Frees the memory of local state that is zero, until `attach_`.

        A fresh optimizer then never has it twice, in its state and in its buckets. Nothing is
        gained by freeing parts of buffers that are `kept`.
        """
        memory = {buffer.untyped_storage()._cdata for buffer in kept}
        names = local_state(self._method.compressor)
        for state in self._states.values():
            for name in names:
                value = state.get(name)
                if value is None or value.untyped_storage()._cdata in memory:
                    continue
                if not _is_nonzero(value):
                    state[name] = value.new_zeros(()).expand(value.shape)

    def attach_(self, bucket: Bucket) -> None:
        """Moves errors and the compressor's state into a new bucket, and shows its views."""
        views = bucket.aggregator.state()
        for entry in bucket.layout.entries:
            state = self._states[entry.index]
            own = views.get(entry.index, {})
            self._shown[entry.index] = {**own}
            for name, view in own.items():
                view.copy_(state[name])
                state[name] = view
            if bucket.errors is not None and entry.level is not None:
                bucket.errors.views[entry.index].copy_(state["error"])
            elif "error" in state:
                state["error"] = _apart(state["error"]).contiguous()
                if _is_nonzero(state["error"]):
                    bucket.pending_errors[entry.index] = state["error"]
        self.show_errors_(bucket)

    def show_errors_(self, bucket: Bucket) -> None:
        """Makes each state's `error` a view of the buffer that is now the error memory."""
        if bucket.errors is not None:
            for index in bucket.compressed:
                view = bucket.errors.views[index]
                self._shown[index]["error"] = self._states[index]["error"] = view

    def adopt_replaced_(self) -> None:
        """Takes over tensors that users have put into a state in place of those it showed."""
        if self._momenta is not None and self._momenta.are_as_they_were and self._shows_its_own():
            return
        self._momenta, is_steady = None, True
        momenta: list[tuple[Tensor, Tensor, Tensor]] = []
        keeps_momentum = self._method.keeps_momentum
        for info in self._infos:
            state, shown = self._states[info.index], self._shown[info.index]
            for name, view in shown.items():
                if view is not None and (value := state.get(name)) is not view:
                    if name in ("momentum_buffer", "momentum_started") and keeps_momentum:
                        continue  # see below
                    if value is not None:
                        require_tensor(value, name, info.name)
                        require_shape(value, view.shape, name, info.name)
                        view.copy_(value)
                    state[name] = view
            if keeps_momentum:
                momentum, has_started = state.get("momentum_buffer"), state.get("momentum_started")
                is_known = momentum is shown.get("momentum_buffer") and (
                    has_started is not None and has_started is shown.get("momentum_started")
                )
                if momentum is not None and is_known:
                    is_known = bool(has_started) and momentum.stride() == info.parameter.stride()
                is_steady = is_steady and is_known
                if not is_known:
                    complete_momentum_(state, info)
                    shown["momentum_buffer"] = state.get("momentum_buffer")
                    shown["momentum_started"] = state["momentum_started"]
                elif momentum is not None and has_started is not None:
                    momenta.append((momentum, info.parameter, has_started))
                    is_steady = is_steady and not has_started.is_inference()
        if is_steady:
            self._momenta = _Momenta(momenta)

    def _shows_its_own(self) -> bool:
        """Whether nothing was replaced in a state."""
        for index, shown in self._shown.items():
            state = self._states[index]
            for name, view in shown.items():
                if view is not None and state.get(name) is not view:
                    return False
        return True


class _Momenta:
    """Momenta that were all begun, with parameters and flags: told without reading a value."""

    def __init__(self, momenta: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._momenta = momenta
        self._seen = self._look()

    @property
    def are_as_they_were(self) -> bool:
        return self._look() == self._seen

    def _look(self) -> list[object]:
        return [(m.stride(), p.stride(), flag._version) for m, p, flag in self._momenta]


def detach_from_buffer_(state: State) -> None:
    """Moves the state of a frozen parameter out of the buffers it shared with others."""
    for name, value in state.items():
        state[name] = _apart(value)


def _apart(value: Tensor) -> Tensor:
    """A tensor that keeps no memory alive but its own: a copy, if it is part of a larger one."""
    is_part = value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if is_part else value


def require_tensor(value: object, name: str, owner: str) -> None:
    """Raises TypeError unless an entry of the state of `owner` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Invalid {name} of {owner}: {value!r}. Must be a tensor, as state_dict() has it; or "
            f"delete all that optimizer.state has for the parameter, to start anew."
        )


def require_shape(value: Tensor, shape: torch.Size, name: str, owner: str) -> None:
    """Raises ValueError unless a tensor of the state of `owner` has this shape."""
    if value.shape != shape:
        raise ValueError(
            f"Invalid {name} of {owner}: its shape is {list(value.shape)} and must be "
            f"{list(shape)}. Load a state_dict of the same model, or delete all that "
            f"optimizer.state has for the parameter, to start anew."
        )
