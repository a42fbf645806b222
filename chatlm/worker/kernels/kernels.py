"""The ops that were chosen for a model (`Kernels`), what computes them (`Backend`), and how steps run
(`StepRunner`)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import typing
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError, require_library
from chatlm.common.processes.start import own_threads
from chatlm.worker.arrays.kinds import AdapterMatrix, Arrays, Device
from chatlm.worker.model.pages import KvType

if TYPE_CHECKING:
    from chatlm.common.answering import AnswerLease
    from chatlm.worker.model.batch import Batch
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ops.rows import SampleRow


class StepRunner(typing.Protocol):
    """Runs steps: EagerRunner here; decode_core has ProgramRunner (threads) and GraphRunner (CUDA graphs)."""

    ahead: bool  # may a step start before the previous one is finished?

    def prepare(self, progress: Callable[[float], None]):
        """Pay one-time costs before the first step; `progress` receives the fraction done."""

    def start(self, batch: Batch, rows: Seq[SampleRow]) -> object:
        """Compute a batch, and draw tokens as `rows` say for each row of logits -> a ticket for `finish`.

        ~i in the batch stands for the token that row i of the step before is still drawing."""
        ...

    def finish(self, ticket) -> list[int]:
        """Wait for the drawn tokens and return them."""
        ...

    def forward(self, batch: Batch) -> Any:
        """Compute a batch while no step is under way -> logits (R, V) float32, valid until the next step."""
        ...


class EagerRunner:
    """Runs a transformer op by op, on any device. `start` computes and draws; `finish` returns the tokens."""

    ahead = False

    def __init__(self, transformer: Transformer):
        self.transformer = transformer
        self.drawn: list[int] = []

    def start(self, batch: Batch, rows: Seq[SampleRow]) -> list[int]:
        batch.token_ids[:] = [self.drawn[~token] if token < 0 else token for token in batch.token_ids]
        logits = self.transformer.forward(batch)
        self.drawn = self.transformer.kernels.sample(logits, rows) if rows else []
        return self.drawn

    def finish(self, ticket: list[int]) -> list[int]:
        return ticket

    def forward(self, batch: Batch):
        return self.transformer.forward(batch)

    def prepare(self, progress: Callable[[float], None]):
        pass  # the first steps are as fast as later ones


class Backend:
    """Computes the steps of a model: here torch, op by op. CpuBackend and CudaBackend, which are
    decode_core's, have the same attributes."""

    name = "torch/reference"
    row_invariant = False
    quantizes = False
    groups_layers = True
    few_rows_invariant = False  # does a row keep its bits in any step of up to FREE_ROWS that all draw, also
                                # drafts?
    activations: str | None = None  # type of every activation buffer; None: the model's own
    faults: Mapping[str, str] = {}  # compiled op that its reference replaces -> why; complete once steps are
                                    # prepared
    # Loads a GGUF matrix in the file's type or one close to it; a tuple of matrices has its rows together.
    # None: all are dequantized
    as_stored: Callable | None = None
    stored_dtype: str | None = None  # of activations and pages with such matrices; None: float16
    short_floats = ""    # type of keys and values if weights are shorter than float32; "": as activations
    turns = True         # do rotations go by Batch.turns, if the batch has them?
    packs_kv = True      # does it read keys and values of the type q8_0?
    converted: Callable[[Mapping, Mapping], str]  # with as_stored: says which matrices change their type
    held_bytes: Callable[[Seq], int]  # with as_stored: bytes that the tensors of a matrix will take
    join = None          # makes ranks exchange through shared memory; None: torch.distributed is used

    tensors = True       # do its ops take torch's tensors? Else they take numpy's arrays

    def __init__(self, device: str):
        dtype = references().fastest_dtype(device)  # of float weights, if the user names none
        self.dtype = str(dtype).removeprefix("torch.")

    def ops(self, max_tokens: int, max_rows: int, quantize: str | None,
            fine: bool = False) -> dict[str, Callable]:
        """The ops that replace references. What `pack` returns may have `finite`: is there no NaN and no
        infinity in the weights, nor in what they became?"""
        return {}  # all ops are references

    def record(self, transformer: Transformer) -> Callable[[Batch], None] | None:
        """A function that runs a batch in place of Transformer.compute, which it may record; or None.

        If batch.states is true, buffer x then has the last layer's output of every row. Unless the model
        opens, another stage writes the buffers transformer.passed_on(0) before a step. There are no logits
        unless it closes, nor if it is of texts."""

    def make_runner(self, transformer: Transformer, max_batch: int, context_length: int) -> StepRunner:
        return EagerRunner(transformer)

    def pause_while(self, lease: AnswerLease, most_s: float):
        """From now on the op `pause` waits while by the lease answers are written, at most `most_s`."""
        references().pausing.update(lease=lease, most_s=most_s)

    def pack_adapter(self, matrices: Mapping[str, AdapterMatrix], device: str) -> Any:
        """An adapter in the form that ops read. Its matrices are named after those they change."""
        return {name: AdapterMatrix(*map(references().TorchArrays(device).of, matrix))
                for name, matrix in matrices.items()}


@functools.cache
def references() -> Any:
    """The module of references, which imports torch. ConfigError if torch is not installed."""
    require_library("torch", "computing without decode_core").set_num_threads(own_threads())
    return importlib.import_module("chatlm.worker.ops.references")


def missing_op(*_, **options):
    raise NotImplementedError("no op was chosen")


@dataclass(frozen=True)
class Kernels:
    """The op that was chosen for each name. `forward` and the engine use no other ops."""

    embed: Callable = missing_op
    gather_rows: Callable = missing_op
    rms_norm: Callable = missing_op
    layer_norm: Callable = missing_op
    pack: Callable = missing_op
    linear: Callable = missing_op
    experts: Callable = missing_op
    copy: Callable = missing_op
    mix: Callable = missing_op
    gated_add: Callable = missing_op
    look_up: Callable = missing_op
    layer_inputs: Callable = missing_op
    gate_input: Callable = missing_op
    smear: Callable = missing_op
    backout: Callable = missing_op
    softcap: Callable = missing_op
    make_cache: Callable = missing_op
    mean_squares: Callable = missing_op
    norm_qk: Callable = missing_op
    norm_heads: Callable = missing_op
    scale_rows: Callable = missing_op
    clamp: Callable = missing_op
    rope_append: Callable = missing_op
    plan_attention: Callable = missing_op
    paged_attention: Callable = missing_op
    text_attention: Callable = missing_op
    absorb: Callable = missing_op
    append_latents: Callable = missing_op
    by_head: Callable = missing_op
    pause: Callable = missing_op
    short_conv: Callable = missing_op
    delta_rule: Callable = missing_op
    mamba2: Callable = missing_op
    group_squares: Callable = missing_op
    norm_groups: Callable = missing_op
    split_gates: Callable = missing_op
    gate: Callable = missing_op
    sample: Callable = missing_op
    # Only if a model has several ranks:
    # (x, out, residual=None): residual + the sum of all ranks' x -> out
    all_reduce: Callable = None  # pyright: ignore[reportAssignmentType]  as stated above
    # (x, out): all ranks' x concatenated -> out, which may be shorter
    all_gather: Callable = None  # pyright: ignore[reportAssignmentType]  as stated above
    names: Mapping[str, str] = field(default_factory=dict)  # what computes each op, for /stats
    backend: Any = None

    def arrays_on(self, device: Device) -> Arrays:
        """Makes the arrays that the ops take."""
        return references().TorchArrays(device) if self.backend.tensors else Arrays()

    @property
    def pads(self) -> bool:
        """Must a model whose sizes are no multiples of 16 be padded with zeros for them?"""
        return not self.backend.tensors

    def computed(self, model: Model) -> Model:
        """The model that a Transformer of this model computes: itself, or padded."""
        return model.padded() if self.pads else model

    @property
    def row_invariant(self) -> bool:
        """Are a row's bits the same whatever else is in the batch?"""
        return self.backend.row_invariant

    def activation_dtype(self, weights: str | None) -> str:
        """The type of activations that may be short, for matrices of this type; None: of the file's."""
        return weights or self.backend.stored_dtype or "float16"

    def kv_type(self, choice: str, weights: str | None) -> KvType:
        """The type of keys and values with such matrices, if --kv-cache-dtype is `choice`.

        ConfigError if no kernel reads it."""
        own = self.activation_dtype(weights)
        floats = "float16" if self.backend.short_floats == "float16" and own != "float32" else own
        if choice == "q8_0" and not self.backend.packs_kv:
            raise ConfigError(f"--kv-cache-dtype q8_0: {self.backend.name} has no kernels that read it; "
                              "auto, bfloat16 and float32 are possible")
        return KvType(floats if choice in ("auto", "q8_0") else choice, packed=choice == "q8_0")


OPS = tuple(op.name for op in dataclasses.fields(Kernels) if op.default is missing_op)
