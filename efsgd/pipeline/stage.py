"""A stage of torch's pipeline engine whose links carry payloads."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from efsgd.algorithms.reading import Packet
from efsgd.pipeline.codec import Reader
from efsgd.pipeline.ends import End, Masks
from efsgd.pipeline.handshake import Handshake
from efsgd.pipeline.link import Link
from efsgd.pipeline.memory import SampleMemory, split_ids

#: How long a stage waits for its neighbors to begin their first step.
PATIENCE = timedelta(minutes=5)


class CompressedStage(PipelineStage):
    """A `torch.distributed.pipelining.PipelineStage` that compresses what it sends its neighbors.

    Schedules, inference of shapes and autograd are torch's; a tensor is replaced by its payload as
    it is handed to a send, and decoded into the buffer that torch receives into. All stages must
    have the same links. Between stages in one process nothing is compressed.

    A step that fails leaves memories as they were on all stages that have not come to its end. Make
    a new schedule of the same stages after it, since torch's keeps losses of what has failed.

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
        forwards, backwards = activations or Link(), gradients or Link()
        self._masks: list[Masks | None] = [None, None]
        if backwards.reuse_mask:
            _require_same_top_k(forwards, backwards)
            self._masks = [{}, {}]
        elif forwards.reuse_mask:
            raise ValueError("reuse_mask is for gradients: activations come first.")
        before, after = self._masks  # of the links to the stage before, and to the one after
        number = stage_index
        self._ends = {
            "activations sent": End(forwards, 2 * number, f"{number}.sent", after),
            "activations received": End(forwards, 2 * number - 2, f"{number}.received", before),
            "gradients sent": End(backwards, 2 * number - 1, f"{number}.back.sent", before),
            "gradients received": End(backwards, 2 * number + 1, f"{number}.back.received", after),
        }
        self.scaler, self._step, self._scale = scaler, 0, 1.0
        self._announced: list[list[int]] | None = None
        self._handshake = Handshake(self.group, stage_index)
        self._is_compared = self._is_running = self._trains = False
        self._done = [0, 0]  # microbatches of this step that were computed forwards, backwards

    # ---- what torch's schedules call ------------------------------------------------------------

    def clear_runtime_states(self) -> None:
        """A step begins: what the last one has changed is kept, if it came to its end."""
        self._settle()
        super().clear_runtime_states()
        self._trains = self.has_backward
        scaler = self.scaler if self._trains else None
        self._scale = 1.0 if scaler is None else scaler.get_scale()  # of a disabled one it is 1
        self._compare_ends()
        for end in self._ends.values():
            end.begin()
            if self._trains and isinstance(end.memory, SampleMemory):
                if self._announced is None:
                    raise RuntimeError(
                        "memory='samples', but nobody has said which samples come next. Call "
                        "stage.announce(sample_ids, n_microbatches) before each step, on every "
                        "stage."
                    )
                end.memory.announce(self._announced)
        self._announced, self._is_running = None, True
        self._step += 1
        self._done = [0, 0]

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
        self._done[0] += 1
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        """Decodes what has arrived, and computes backwards."""
        self._unpack("gradients received", bwd_chunk_id, self._scale)
        result = super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
        self._done[1] += self._trains
        return result

    def _pack(self, name: str, ops: list[Any], chunk: int, scale: float = 1.0) -> list[Any]:
        return self._ends[name].pack(ops, chunk, self._step, trains=self._trains, scale=scale)

    def _unpack(self, name: str, chunk: int, scale: float = 1.0) -> None:
        self._ends[name].unpack(chunk, self._step, trains=self._trains, scale=scale)

    # ---- between steps --------------------------------------------------------------------------

    def _settle(self) -> None:
        """Keeps what the last step has changed, or, where it has failed, nothing of it."""
        chunks = len(self.args_recv_info)
        is_whole = self._is_running and self._done == [chunks, chunks if self._trains else 0]
        # Neighbors may have come to the end of a step that has failed here: compare once more.
        self._is_compared = self._is_compared and (is_whole or not self._is_running)
        for end in self._ends.values():
            if end.memory is not None and is_whole and end.is_done(chunks):
                end.memory.commit()
            elif end.memory is not None:
                end.memory.discard()
        self._is_running = False

    def _compare_ends(self) -> None:
        """Before the first step, and after loading: neighbors must have the same links."""
        if self._is_compared:
            return
        sides = {
            "previous": ("activations received", "gradients sent"),
            "next": ("activations sent", "gradients received"),
        }
        ranks, own = self.stage_index_to_group_rank, self.stage_index
        neighbors = {"previous": own - 1, "next": own + 1}
        for side, neighbor in neighbors.items():
            if neighbor not in ranks or ranks[neighbor] == ranks[own]:
                del sides[side]  # there is none, or it is in this process
        said = {side: self._describe(names) for side, names in sides.items()}
        for side, lines in said.items():
            self._handshake.tell(side, lines)
        for side, lines in said.items():
            self._handshake.compare(side, lines, PATIENCE)
        self._is_compared = True

    def _describe(self, names: Sequence[str]) -> list[str]:
        """What a neighbor must have as well."""
        lines = []
        for name in names:
            direction, end = name.partition(" ")[0], self._ends[name]
            is_scaled = self.scaler is not None and self.scaler.is_enabled()
            if is_scaled and direction == "gradients" and end.codec is not None:
                direction += " with a scaler"
            lines.append(f"{direction}: {', '.join(end.describe())}")
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
        """Shows all that this stage hands to sends to a function: see `efsgd.audit.observe`.

        Returns a function that ends it.
        """

        def show(
            direction: str, place: tuple[int, int], shape: torch.Size, buffer: Tensor, read: Reader
        ) -> None:
            name = f"{direction}, microbatch {place[0]}, output {place[1]}"
            listener(Packet(name, self._step - 1, self.stage_index, shape, buffer, read))

        ends = []
        for direction in ("activations", "gradients"):
            listeners, own = self._ends[f"{direction} sent"].listeners, partial(show, direction)
            listeners.append(own)
            ends.append(partial(listeners.remove, own))

        def end() -> None:
            for each in ends:
                each()

        return end

    def communication_stats(self) -> dict[str, int]:
        """What this stage has handed to sends since its construction, counted from the buffers.

        Returns:
            `forward_bytes_sent` and `backward_bytes_sent`; `forward_bytes_uncompressed` and
            `backward_bytes_uncompressed`, what they would have been; `steps` that were begun.
            What torch sends once, to infer shapes, is not in them.
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
        """The memories of this stage's ends, as plain data and tensors; not the submodule's."""
        self._settle()
        ends = {name: end.memory.state() for name, end in self._ends.items() if end.memory}
        return {"step": self._step, "ends": ends}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` has returned for the same stage, on all stages.

        Raises:
            ValueError: it is of other links.
        """
        own = {name: end.memory for name, end in self._ends.items() if end.memory is not None}
        if set(own) != set(state_dict["ends"]):
            raise ValueError(
                f"The state_dict has memories of {sorted(state_dict['ends'])}, and this stage has "
                f"{sorted(own)}. Load it with the links that it was saved with."
            )
        for name, memory in own.items():
            memory.load(state_dict["ends"][name], self.device)
        self._step, self._is_running, self._is_compared = state_dict["step"], False, False


def _require_same_top_k(forwards: Link, backwards: Link) -> None:
    kinds = [(link.compressor, link.per) for link in (forwards, backwards)]
    if kinds[0] != kinds[1] or "samples" in (forwards.memory, backwards.memory):
        raise ValueError(
            f"reuse_mask=True needs the same compressor and the same per in both links, whose "
            f"positions are reused, and no memory='samples', whose first visits have none. Given "
            f"are activations={forwards} and gradients={backwards}."
        )
