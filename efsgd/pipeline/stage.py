"""A stage of torch's pipeline engine whose links carry payloads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from efsgd.algorithms.reading import Packet
from efsgd.pipeline.codec import Reader
from efsgd.pipeline.ends import End, Masks, listen
from efsgd.pipeline.handshake import Handshake, Said
from efsgd.pipeline.link import Link, link_of
from efsgd.pipeline.memory import SampleMemory, split_ids
from efsgd.wire.compare import digest_of

#: The ends of the links to the stage before, and to the one after.
_SIDES = {
    -1: ("activations received", "gradients sent"),
    1: ("activations sent", "gradients received"),
}


class CompressedStage(PipelineStage):
    """A `torch.distributed.pipelining.PipelineStage` that compresses what it sends its neighbors.

    Schedules, inference of shapes and autograd are torch's; a tensor is replaced by its payload as
    it is handed to a send, and decoded into the buffer that torch receives into. All stages must
    have the same links. Between stages in one process nothing is compressed.

    Each step begins with a handshake of neighbors, by the store in which the processes have met.
    What a step changes in memories counts once both ends of a link have come to its end; of a step
    that has failed at one of them nothing is kept at either. Make a new schedule of the same stages
    after it, since torch's keeps losses of what has failed.

    Args:
        submodule: of this stage.
        stage_index: of this stage, from 0.
        num_stages: of the pipeline.
        device: of the submodule.
        activations: what travels forwards; None sends activations as they are.
        gradients: what travels backwards; None sends gradients as they are.
        scaler: of the loss, on all stages. Memories of gradients are then kept in units of the
            loss, whatever its scale. Stages without the loss call `scaler.scale(torch.zeros(()))`
            before `scaler.step`, which makes the scale.
        options: of `PipelineStage`.

    Raises:
        ValueError: the links do not go together.

    Example, of two processes::

        stage = CompressedStage(
            layers[rank], rank, 2, device,
            activations=Link(UniformQuantized(bits=4)),
            gradients=Link(SymmetricQuantized(bits=8)),
        )
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss)
        schedule.step(inputs) if rank == 0 else schedule.step(target=targets)

    Source: Rudakov et al., arXiv 2401.07788, sections 2 and 3.
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        *,
        activations: Link | None = None,
        gradients: Link | None = None,
        scaler: "torch.amp.GradScaler | None" = None,
        **options: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, **options)
        forwards, backwards = link_of(activations), link_of(gradients)
        self._masks: list[Masks | None] = [None, None]  # of the links before and after this stage
        if backwards.reuse_mask:
            _require_same_top_k(forwards, backwards)
            self._masks = [{}, {}]
        elif forwards.reuse_mask:
            raise ValueError("reuse_mask is for gradients: activations come first.")
        # Replicas of a pipeline draw different numbers, so that their average has less noise.
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        self._ends = {}
        for side, names in _SIDES.items():
            boundary = first * num_stages + stage_index + min(side, 0)
            for name, link, number in zip(
                names, (forwards, backwards), (2 * boundary, 2 * boundary + 1), strict=True
            ):
                masks = self._masks[side > 0]
                self._ends[name] = End(link, number, f"stage {stage_index}, {name}", masks)
        self.scaler, self._step, self._scale = scaler, 0, 1.0
        self._announced: list[list[int]] | None = None
        self._inferred: Any = None  # what torch has made of the shapes that it has inferred
        # Of the last step: whether it trains, how many microbatches were computed forwards, and
        # whether the last one was computed backwards.
        self._trains, self._forwards, self._is_over = False, 0, False

    # ---- what torch's schedules call ------------------------------------------------------------

    def clear_runtime_states(self) -> None:
        """A step begins: what the last one has changed is kept, if both ends came to its end."""
        super().clear_runtime_states()
        self._step = self._agree()
        trains, announced, self._announced = self.has_backward, self._announced, None
        for end in self._ends.values():
            if trains and isinstance(end.memory, SampleMemory):
                if announced is None:
                    raise RuntimeError(
                        "memory='samples', but nobody has said which samples come next. Call "
                        "stage.announce(sample_ids, n_microbatches) before each step, on every "
                        "stage."
                    )
                end.memory.announce(announced)
        scaler = self.scaler if trains else None
        self._scale = 1.0 if scaler is None else scaler.get_scale()  # of a disabled one it is 1
        self._trains, self._forwards, self._is_over = trains, 0, False

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Sends of payloads to the next stage."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        return self._pack("activations sent", ops, fwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Sends of payloads to the stage before."""
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        return self._pack("gradients sent", ops, bwd_chunk_id, self._scale)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Receives of payloads from the stage before."""
        ops = super().get_fwd_recv_ops(fwd_chunk_id)
        return self._ends["activations received"].expect(ops, fwd_chunk_id, trains=self._trains)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Receives of payloads from the next stage."""
        ops = super().get_bwd_recv_ops(bwd_chunk_id)
        return self._ends["gradients received"].expect(ops, bwd_chunk_id, trains=self._trains)

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        """Decodes what has arrived, and computes forwards."""
        self._unpack("activations received", fwd_chunk_id)
        output = super().forward_one_chunk(fwd_chunk_id, *arguments, **options)
        self._forwards += 1
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        """Decodes what has arrived, and computes backwards."""
        self._unpack("gradients received", bwd_chunk_id, self._scale)
        result = super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
        self._is_over |= options.get("last_backward", False)
        return result

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        """Computes the gradients of parameters, where a schedule does so by itself."""
        result = super().backward_weight_one_chunk(bwd_chunk_id, *arguments, **options)
        self._is_over |= options.get("last_backward", False)
        return result

    def _pack(self, name: str, ops: list[Any], chunk: int, scale: float = 1.0) -> list[Any]:
        if self._inferred is not self.act_send_info:
            self._inferred = self.act_send_info
            for end in self._ends.values():
                end.forget_shapes()
        return self._ends[name].pack(ops, chunk, trains=self._trains, scale=scale)

    def _unpack(self, name: str, chunk: int, scale: float = 1.0) -> None:
        self._ends[name].unpack(chunk, trains=self._trains, scale=scale)

    # ---- between steps --------------------------------------------------------------------------

    def _is_whole(self) -> bool:
        """Whether the last step has come to its end here; one that only evaluates always has."""
        is_done = all(end.is_done(self._forwards) for end in self._ends.values())
        return not self._trains or (self._is_over and is_done)

    def _agree(self) -> int:
        """Settles with neighbors what the last step has changed, and the number of this one.

        Raises:
            WorkerMismatchError: the ends of a link differ in what must be equal.
            CollectiveError: a neighbor does not take part.
        """
        ranks, own = self.stage_index_to_group_rank, self.stage_index
        begun = []
        for side, names in _SIDES.items():
            neighbor = own + side
            if neighbor in ranks and ranks[neighbor] != ranks[own]:  # not in this process
                handshake = Handshake(self.group, own, neighbor)
                said = Said(self._step + 1, self._is_whole(), self._describe(names))
                handshake.tell(said)
                begun.append((handshake, said, names))
        heard = [handshake.hear() for handshake, *_ in begun]
        step = self._step + 1
        for (_, said, names), theirs in zip(begun, heard, strict=True):
            step = max(step, theirs.step)  # one stage may have begun a step that others have not
            for name in names:
                self._ends[name].settle(is_kept=said.is_whole and theirs.is_whole)
                self._ends[name].begin(max(said.step, theirs.step))
        for (handshake, said, _), theirs in zip(begun, heard, strict=True):
            handshake.compare(said, theirs)
        return step

    def _describe(self, names: Sequence[str]) -> list[str]:
        """What a neighbor must have as well."""
        lines, ends = [], [self._ends[name] for name in names]
        for name, end in zip(names, ends, strict=True):
            direction = name.partition(" ")[0]
            is_scaled = self.scaler is not None and self.scaler.is_enabled()
            if is_scaled and direction == "gradients" and end.codec is not None:
                direction += " with a scaler"
            lines.append(f"{direction}: {end.description}")
        lines.append("training" if self.has_backward else "evaluation")
        if self.has_backward and any(isinstance(end.memory, SampleMemory) for end in ends):
            ids = self._announced
            said = "none" if ids is None else f"digest {digest_of(repr(ids).encode()):x}"
            lines.append(f"samples announced: {said}")
        return lines

    def announce(self, sample_ids: Tensor | Sequence[int], n_microbatches: int) -> None:
        """Says which samples the next step has: for links with memory="samples".

        Every stage must call it before each training step.

        Args:
            sample_ids: of the whole batch, in its order, integers: [samples].
            n_microbatches: that of the schedule.
        """
        self._announced = split_ids(sample_ids, n_microbatches)

    def listen(self, listener: Callable[[Packet], None]) -> Callable[[], None]:
        """Shows all that this stage hands to sends to a function, until what it returns is called.

        See `efsgd.audit.observe`.
        """

        def show(name: str, shape: torch.Size, buffer: Tensor, read: Reader) -> None:
            listener(Packet(name, self._step - 1, self.stage_index, shape, buffer, read))

        return listen(self._ends, show)

    def communication_stats(self) -> dict[str, int]:
        """What this stage has handed to sends since its construction, counted from the buffers.

        Returns:
            `forward_bytes_sent` and `backward_bytes_sent`; `forward_bytes_uncompressed` and
            `backward_bytes_uncompressed`, what they would have been; `steps` that were begun.
            What torch sends to infer shapes is not in them.
        """
        forwards, backwards = self._ends["activations sent"], self._ends["gradients sent"]
        return {
            "forward_bytes_sent": forwards.sent,
            "forward_bytes_uncompressed": forwards.plain,
            "backward_bytes_sent": backwards.sent,
            "backward_bytes_uncompressed": backwards.plain,
            "steps": self._step,
        }

    def state_dict(self) -> dict[str, Any]:
        """The memories of this stage's ends, as plain data and tensors.

        The last step is counted if it has come to its end here. Save `submod` apart.
        """
        if not self._is_whole():
            for end in self._ends.values():
                end.settle(is_kept=False)
        ends = {name: end.memory.state() for name, end in self._ends.items() if end.memory}
        return {"step": self._step, "ends": ends}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` has returned for the same stage, on all stages.

        Raises:
            ValueError: it is of other links.
        """
        own = {name: end for name, end in self._ends.items() if end.memory is not None}
        if set(own) != set(state_dict["ends"]):
            raise ValueError(
                f"The state_dict has memories of {sorted(state_dict['ends'])}, and this stage has "
                f"{sorted(own)}. Load it with the links that it was saved with."
            )
        self._step, self._trains = state_dict["step"], False
        for name, end in own.items():
            end.load(state_dict["ends"][name], self._step, self.device)


def _require_same_top_k(forwards: Link, backwards: Link) -> None:
    kinds = [(link.compressor, link.per) for link in (forwards, backwards)]
    if kinds[0] != kinds[1] or "samples" in (forwards.memory, backwards.memory):
        raise ValueError(
            f"reuse_mask=True needs the same compressor and the same per in both links, whose "
            f"positions are reused, and no memory='samples', whose first visits have none. Given "
            f"are activations={forwards} and gradients={backwards}."
        )
