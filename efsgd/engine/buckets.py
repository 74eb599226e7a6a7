"""From parameter groups to sections: one for each device and dtype, made anew when they change."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Section
from efsgd.algorithms.interfaces import Aggregator, Compressor
from efsgd.engine.parameters import Member, compute_dtype, frozen
from efsgd.engine.state import State, attach_, release_zero_errors_
from efsgd.layout import Entry, Layout
from efsgd.profiling import Phases
from efsgd.wire.control_words import ControlWords

__all__ = ["Kind", "make_sections", "memory_of", "signature"]

#: What the tensors of a section have in common.
Kind: TypeAlias = tuple[torch.device, torch.dtype]


def signature(
    groups: Iterable[Mapping[str, Any]],
    state: Mapping[Tensor, State],
    compressor: Compressor,
) -> Hashable:
    """All that sections depend on, except for what changes by itself on all workers alike.

    Args:
        groups: of the optimizer.
        state: of its parameters.
        compressor: whose settings are read from the groups.
    """
    settings = tuple(compressor.settings())
    return tuple(
        (
            id(group),
            tuple(group[name] for name in settings),
            frozen(group),
            group["error_feedback"],
            group.get("momentum", 0) != 0,
            group["start_compressing_at"],
            group["check_every"],
            tuple(
                (id(p), id(state.get(p)), p.requires_grad, p.dtype, p.device, p.shape)
                for p in group["params"]
            ),
        )
        for group in groups
    )


def memory_of(
    sections: Iterable[Section], members: Iterable[Member], compressor: Compressor
) -> dict[Kind, tuple[Tensor, Tensor]]:
    """Buffers of sections that those after them can have, as they compress the same tensors.

    Scratch becomes the new errors, into which `attach_` copies the old ones, and these become the
    new scratch: nothing is allocated, and nothing is written over that has not been copied.

    Args:
        sections: that are given up once new ones are made.
        members: the parameters of the new ones.
        compressor: decides what is compressed.

    Returns:
        By device and dtype, for errors and deltas; see `Section`.
    """
    kinds, found = _by_kind(members), {}
    for section in sections:
        kind, errors = (section.device, section.deltas.flat.dtype), section.errors
        own = [m for m in kinds.get(kind, []) if _entry(m, compressor).level is not None]
        if errors is None or not all(member.group["error_feedback"] for member in own):
            continue
        is_same = section.compressed == {member.index for member in own}
        is_same = is_same and all(section.parameters[m.index] is m.parameter for m in own)
        if is_same and errors.flat.numel() == sum(m.shape.numel() for m in own):
            found[kind] = section.deltas.flat, errors.flat
    return found


def _by_kind(members: Iterable[Member]) -> dict[Kind, list[Member]]:
    """The parameters that require a gradient."""
    kinds: dict[Kind, list[Member]] = {}
    for member in members:
        if member.parameter.requires_grad:
            kind = member.parameter.device, compute_dtype(member.parameter)
            kinds.setdefault(kind, []).append(member)
    return kinds


def make_sections(
    members: Iterable[Member],
    states: Mapping[int, State],
    compressor: Compressor,
    world_size: int,
    worker: int,
    phases: Phases,
    prepare: Callable[[Aggregator, list[Member]], None],
    memory: Mapping[Kind, tuple[Tensor, Tensor]],
) -> list[Section]:
    """Plans and fills the sections of all parameters that require a gradient.

    Args:
        members: the parameters, in order.
        states: of each, complete; errors and factors become views (modified in place).
        compressor: decides what is compressed and how far.
        world_size: the number of workers.
        worker: this worker.
        phases: names the phases of a step.
        prepare: called with each new aggregator and the parameters it works for, while the large
            buffers are not allocated yet.
        memory: of `memory_of`.
    """
    sections = []
    release_zero_errors_(states.values(), [buffer for pair in memory.values() for buffer in pair])
    for (device, dtype), alike in _by_kind(members).items():
        words = ControlWords.count(len(alike), world_size)
        layout = Layout.plan((_entry(member, compressor) for member in alike), words)
        options = alike[0].group
        aggregator = compressor.aggregator(layout, options, dtype, device, worker, world_size)
        prepare(aggregator, alike)
        section = Section(
            layout,
            {member.index: member.parameter for member in alike},
            aggregator,
            ControlWords([member.index for member in alike], world_size, worker),
            dtype,
            device,
            error_feedback=options["error_feedback"],
            phases=phases,
            memory=memory.get((device, dtype)),
        )
        attach_(section, states)
        sections.append(section)
    return sections


def _entry(member: Member, compressor: Compressor) -> Entry:
    is_compressing = member.group["step"] >= member.group["start_compressing_at"]
    return member.entry(compressor, is_compressing=is_compressing)
