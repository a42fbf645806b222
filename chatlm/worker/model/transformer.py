"""`Transformer`: one forward for every family of models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence as Seq
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.hub.stamps import refuse_changed_adapter
from chatlm.worker.arrays.kinds import AdapterMatrix, Device, address_of, as_kind, floats, kind_of
from chatlm.worker.arrays.rotary import query_scales
from chatlm.worker.model.batch import Inputs, RowAdapters, Sequences, token_places
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.model import DISTANCE_BUCKETS
from chatlm.worker.model.blocks.norms import LayerNorm
from chatlm.worker.model.blocks.step import BlockStep, Buffers
from chatlm.worker.model.padding import padded_adapter, padded_tensors
from chatlm.worker.model.pages import PageLayout, group_layers
from chatlm.worker.model.tensors import MappedRows, Unread, read_ahead

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress
    from chatlm.common.hub.stamps import Stamp
    from chatlm.worker.model.batch import Batch
    from chatlm.worker.model.blocks.mixers import Mixer
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.kernels.kernels import Kernels
    from chatlm.worker.model.pages import KvType, LayerGroups


ShownPictures = Seq[tuple[int, numpy.ndarray, numpy.ndarray | None]]


class Transformer:
    """A model's packed weights, KV pages, slots of states and activation buffers, all allocated here once.

    `tensors` has the names and shapes of `model.tensors()`. It is emptied while weights are packed, so that
    each is held once, in the layout of the kernels. A step has at most `max_tokens` tokens and `max_rows`
    logit rows. Matrices become `dtype`; None: they keep the types of their files, or get close ones. Keys and
    values have the type `kv`; None: that of activations.
    """

    def __init__(self, model: Model, tensors: dict, kernels: Kernels, *, num_pages: int, max_tokens: int,
                 max_rows: int | None = None, device: str = "cpu", dtype: str | None = None,
                 num_slots: int = 1, groups: LayerGroups | None = None, kv: KvType | None = None,
                 read_adapter: Callable[[Path], dict[str, AdapterMatrix]] | None = None,
                 shared: Mapping[str, Any] = {}, buffers: dict[str, Any] | None = None,
                 progress=lambda activity, fraction: None):
        """shared: packed weights of another Transformer, which replace those of the same names. buffers:
        those of a Transformer of equal sizes that always computes just before this one."""
        self.unpadded = model
        self.kernels = kernels
        if kernels.pads:
            tensors = padded_tensors(model, tensors)
            model = model.padded()
        self.model = model
        self.read_adapter = read_adapter   # folder -> matrices, named after those they change
        self.adapters: dict[int, Any] = {}  # slot, from 1 on -> the adapter as the kernels read it
        self.device = Device(device)
        self.dtype = kernels.activation_dtype(dtype)
        self.arrays = kernels.arrays_on(self.device)
        self.kv = kv or kernels.kv_type("auto", dtype)
        # the type in which references attend: float32 for packed keys, whose precision is above 8 bits
        self.kv_dtype = "float32" if self.kv.packed else self.kv.floats
        self.groups = groups or group_layers(model.by_layer, 0, apart=False, kv=self.kv)
        self.layout = page_layout(model, self.groups, self.kv)
        self.windows = model.windows
        self.num_slots = num_slots
        with self.arrays.computing():
            self.weights = self._pack(tensors, dtype, shared, progress)
            self.layers = [self._arranged(number) for number in range(len(model.layers))]
            self.rope_tables = self._rope_tables(max_tokens)
            self.cache, self.layer_caches = kernels.make_cache(
                model, self.layout, num_pages + self.groups.holes, self.device)
            self.states = [self._state_slots(mixer) for mixer in model.mixers]
            sizes = model.buffer_sizes(max_tokens, min(max_rows or max_tokens, max_tokens),
                                       kernels.backend.activations or self.dtype)
            self.of_logits = {name for name, buffer in model.scratch().items() if buffer.of_logits}
            self.buffers = buffers or {name: self.arrays.empty((rows, columns), kind)
                                       for name, (rows, columns, kind) in sizes.items()}
            self.q_scales = self._q_scales()
            self.distances = None
            if model.distances:
                buckets = self.arrays.numpy(self.weights["buckets"])
                self.distances = self.arrays.of(distance_biases(buckets, model))
            self.steps = [self._layer_step(number) for number in range(len(model.layers))]
            self.outer_step = self._outer_step(dtype)
            self.shown = model.sees  # does their buffer hold rows of pictures? at first it holds anything
            self.show_pictures(())
            if model.sees and not kernels.backend.tensors:
                for name in model.picture_buffers:
                    kernels.backend.program.given(self.buffers[name])
            self.recorded = kernels.backend.record(self)

    def _pack(self, tensors: dict, dtype: str | None, shared: Mapping[str, Any], progress: Progress) -> dict:
        """Read each weight that is not shared, and move it to the device. Kernels lay out matrices.

        A tied head is the embedding."""
        weights = {**shared}
        expected = self.model.tensors()
        names = [name for name in expected if name not in shared]
        tied = self.model.tied
        self.layer_embed: MappedRows | None = None
        if tied:
            names.remove("head")
            tensors.pop("head", None)
        if "layer_embed" in names:  # this table stays in the file
            names.remove("layer_embed")
            self.layer_embed = tensors.pop("layer_embed")
        for name, tensor, read in read_ahead(tensors, names):
            progress("loading weights", len(weights) / len(names))
            parts = read if isinstance(read, tuple) else (read,)
            stated = expected[name]
            target = "float32" if stated.columns is None or stated.exact else dtype
            moved = [part if hasattr(part, "parts") else self.arrays.of(part, target) for part in parts]
            is_laid_out = stated.packed or hasattr(moved[0], "parts")  # a table may be packed in its file
            weights[name] = weight = self.kernels.pack(name, *moved) if is_laid_out else moved[0]
            if isinstance(tensor, Unread) and not getattr(weight, "finite", False):  # nothing has proved it
                tensor.refuse_faults(read, packed=hasattr(weight, "finite"))
            if weight is moved[0] and hasattr(weight, "dtype") and self.device.type == "cpu":
                mapped = getattr(tensor, "mapped", ())
                if any(address_of(part) == address_of(weight) for part in mapped):
                    weights[name] = self.arrays.copy(weight)  # the file may change while it is in use
        if tied:
            weights["head"] = weights["embed"]
        return weights

    def cut(self, T: int, R: int) -> Buffers:
        """The first T rows of each buffer, or the first R rows of those used after the last layer."""
        return Buffers(**{name: buffer[:R if name in self.of_logits else T]
                          for name, buffer in self.buffers.items()})

    @property
    def weights_bytes(self) -> int:
        return sum({id(weight): weight.nbytes for weight in self.weights.values()}.values())

    @property
    def mapped_bytes(self) -> int:
        """Bytes of weights that stay in the file, of which a token reads one row."""
        return self.layer_embed.file_bytes if self.layer_embed else 0

    def token_bytes(self, lasting: bool = False) -> int:
        """Bytes that this rank's layers cache per token; `lasting`: once it is outside all windows."""
        units = 0
        for attn, group in zip(self.model.by_layer, self.layout.group):
            if attn and not (lasting and self.groups.windows[group]):
                units += self.kv.slot_size(attn)
        return units * self.layout.unit

    @property
    def matrix_types(self) -> list[str]:
        """The types of the matrices, most common first: ["q4_1", "q8_0"]."""
        matrices = [w for w in self.weights.values() if getattr(w, "kind", None) or w.ndim > 1]
        types = Counter(map(kind_of, matrices))
        return [name for name, _ in types.most_common()]

    @property
    def weight_types(self) -> str:
        """The types of the matrices and the memory of all weights: "q4_1, q8_0 (93 MiB)"."""
        return f"{', '.join(self.matrix_types)} ({self.weights_bytes / 2**20:,.0f} MiB)"

    def forward(self, batch: Batch):
        """Run a step's new tokens through the model -> logits (R, V) float32, valid until the next step."""
        buffers = self.cut(len(batch.token_ids), len(batch.logit_rows))
        if self.recorded:
            self.recorded(batch)
            return buffers.logits
        with self.arrays.computing():
            self.compute(self.inputs(batch), buffers)
        return buffers.logits

    def hidden_states(self, first: int, last: int, buffer: str = "x") -> numpy.ndarray:
        """The hidden states of the last step, rows [first, last), after the final norm -> (rows, C) float64.

        The step's batch must have had `states`. With the buffer "last" the rows are those that had logits.
        The norm is computed here, row by row, so it is the same in any batch and with all kernels.
        """
        C = self.unpadded.width
        norm = self.model.norm
        x = self.arrays.numpy(self.buffers[buffer][first:last]).astype(numpy.float64)
        if norm is None:
            return x[:, :C]
        if isinstance(norm, LayerNorm):
            x = x[:, :C] - x[:, :C].mean(axis=1, keepdims=True)
        x = x / numpy.sqrt((x * x).mean(axis=1, keepdims=True) + norm.eps)
        x = x[:, :C]
        if isinstance(norm, LayerNorm) or norm.weights:
            x = x * self._final("final_norm", C)
        return x + self._final("final_norm_bias", C)

    def _final(self, name: str, C: int) -> numpy.ndarray | float:
        """The first C numbers of a vector of the final norm, float64; 0.0 if the model has none."""
        vector = self.weights.get(name)
        return 0.0 if vector is None else self.arrays.numpy(vector)[:C].astype(numpy.float64)

    def inputs(self, batch: Batch) -> Inputs:
        """A batch as the ops read it."""
        columns = (batch.token_ids, batch.previous_token_ids, *token_places(batch), batch.logit_rows)
        tensors = [self.arrays.of(numpy.array(column, numpy.int64)) for column in columns]
        turns = self.arrays.of(numpy.array(batch.turns, numpy.int64)) if batch.turns else tensors[2]
        count = len(self.groups.windows)
        parts = []
        for group in range(count):
            of_group = batch
            if count > 1:
                of_group = batch._replace(tables=[pages[group::count] for pages in batch.tables])
                tensors[3] = self.arrays.of(numpy.array(token_places(of_group)[1], numpy.int64))
            windows = {attn.window for l, attn in enumerate(self.model.by_layer)
                       if attn and self.layout.group[l] == group}
            plan = self.kernels.plan_attention(of_group, tensors[2], windows, self.kv_dtype)
            parts.append(Inputs(*tensors, attention=plan, turns=turns))
        adapters = RowAdapters.of(batch, self.adapters) if any(batch.adapters) else RowAdapters()
        return parts[0]._replace(parts=tuple(parts), sequences=Sequences.of(batch), adapters=adapters)

    def compute(self, inputs: Inputs, b: SimpleNamespace):
        """Compute the model: T new tokens -> b.logits (R, V).

        Every op writes into a given buffer, so that a step can be recorded, or captured as a CUDA graph."""
        model = self.model
        outer = self.outer_step
        buffers = Buffers(**vars(b))
        for step in (outer, *self.steps):
            step.begin(self.kernels, buffers, inputs)
        if model.input:
            model.input.compute(outer)
        for layer, step in zip(model.layers, self.steps):
            layer.compute(step)
        if model.head and model.norm:
            model.head.compute(outer, model.norm)

    def passed_on(self, layer: int) -> list[str]:
        """The buffers that layers from `layer` on need from earlier ones."""
        return self.model.passed_on(layer)

    # ---- what steps bring: pictures and adapters

    def show_pictures(self, rows: ShownPictures):
        """Put rows of pictures into the next step; () takes them away. No other step may be under way.

        Each run of rows is (its first row in the step, values (n, C * (1 + deep_rows)), and time, row and
        column (n, 3) of each row, or None if rows turn by their positions)."""
        if not (rows or self.shown):
            return
        model = self.model
        put = self.arrays.put
        C = self.unpadded.width
        self.shown = bool(rows)
        for number, name in enumerate(model.picture_buffers):
            buffer = self.buffers[name]
            put(numpy.full(tuple(buffer.shape), -0.0, numpy.float32), buffer)  # -0.0 changes no sum
            for first, values, _ in rows:
                scaled = values[:, number * C:(number + 1) * C] / numpy.float32(model.residual_scale)
                put(scaled, buffer[first:first + len(values), :C])
        tables = {attn.rope: tables for attn, tables in zip(model.by_layer, self.rope_tables) if attn}
        for first, values, places in rows:
            if places is None:
                continue
            begin = first_turn(model) + first
            for rope, of_rope in tables.items():
                for turned, table in zip(rope.rows(model.rope_axes, places), of_rope):
                    put(turned, table[begin:begin + len(values)])

    def load_adapter(self, slot: int, folder: Path, stamp: Stamp = ()) -> int:
        """Compute the rows of a slot with this adapter from the next step on; returns its bytes.

        ConfigError if it does not fit this model, or if its files no longer match the stamp."""
        if self.read_adapter is None:
            raise ConfigError(f"{folder}: this model does not support adapters")
        refuse_changed_adapter(folder, stamp)
        matrices = self.read_adapter(folder)
        refuse_changed_adapter(folder, stamp)
        return self.pack_adapter(slot, matrices)

    def pack_adapter(self, slot: int, matrices: dict[str, AdapterMatrix]) -> int:
        """Compute the rows of a slot with these matrices, which are named after those they change; returns
        their bytes."""
        if self.kernels.pads:
            matrices = padded_adapter(self.unpadded, matrices)
        packed = self.kernels.backend.pack_adapter(matrices, self.device)
        self.adapters[slot] = packed
        own_bytes = sum(tensor.nbytes for matrix in matrices.values() for tensor in matrix)
        return getattr(packed, "nbytes", own_bytes)  # decode_core leaves out zeros and has pages of its own

    # ---- what steps are computed with, made once

    def _arranged(self, number: int) -> dict[str, Any]:
        """Name in a layer -> weight, in the form that the layer's blocks read."""
        own = {name.partition(".")[2]: weight for name, weight in self.weights.items()
               if name.startswith(f"{number}.")}
        changed = self.model.layers[number].arranged(own, self.arrays, self.model.width)
        self.weights |= {f"{number}.{name}": weight for name, weight in changed.items() if name != "clamps"}
        return own | changed

    def _rope_tables(self, max_tokens: int) -> list[tuple[Any, ...]]:
        """cos and sin of each layer that attends, () for the others. Layers that turn alike share them."""
        # the rows after the last position are for the rows of pictures in a step
        positions = self.model.max_positions + (max_tokens if self.model.rope_axes else 0)
        ropes = [attn.rope for attn in self.model.attentions]
        tables = {rope: tuple(map(self.arrays.of, rope.tables(positions))) for rope in dict.fromkeys(ropes)}
        return [tables[attn.rope] if attn else () for attn in self.model.by_layer]

    def _q_scales(self) -> dict[tuple[float, ...], Any]:
        """Growth of scores -> the factor of q at each position."""
        growths = dict.fromkeys(attn.scores.growth for attn in self.model.attentions if attn.scores.growth)
        return {growth: self.arrays.of(query_scales(growth, self.model.max_positions)) for growth in growths}

    def _state_slots(self, mixer: Mixer | None) -> tuple[Any, ...]:
        """The arrays (slots, ..) of a layer's states, () for a layer without any."""
        shapes = mixer.states(self.model.width) if mixer else ()
        return tuple(self.arrays.zeros((self.num_slots, *shape), "float32") for shape in shapes)

    def _layer_step(self, number: int) -> BlockStep:
        model = self.model
        attn = self.model.by_layer[number]
        w = self.weights
        step = BlockStep(self.layers[number], number, model.vocab_size)
        step.states = self.states[number]
        step.resid_lambdas = w.get("resid_lambdas")
        step.x0_lambdas = w.get("x0_lambdas")
        if attn:
            step.group = self.layout.group[number]
            step.cache = self.layer_caches[number]
            step.rope = self.rope_tables[number]
            step.q_scale = self.q_scales.get(attn.scores.growth)
            step.distances = self.distances
            step.pauses = model.waits
        return step

    def _outer_step(self, dtype: str | None) -> BlockStep:
        """The BlockStep of the parts before and after all layers."""
        model = self.model
        w = dict(self.weights)
        scale = model.head.scale if model.head else 1.0
        for name in ("final_norm", "final_norm_bias"):
            norm = w.get(name)
            w[name.replace("final", "logit")] = norm if norm is None or scale == 1 else norm * scale
        step = BlockStep(w, None, model.vocab_size)
        step.layer_embed = self.layer_embed
        if isinstance(model.input, Input):
            rounded = as_kind(numpy.array([model.input.scale], numpy.float32), dtype or "float32")
            step.embedding_scale = floats(rounded).item() / model.residual_scale
        return step


def first_turn(model: Model) -> int:
    """The row of the rotary tables by which the first row of a step turns, if rows of pictures turn by their
    places in the picture; 0 if they turn by their positions."""
    return model.max_positions if model.rope_axes else 0


def distance_biases(buckets: numpy.ndarray, model: Model) -> numpy.ndarray:
    """What text_attention adds to scores, (H, 2 * reach): each distance key - query has its bucket's value.

    Below 8 each distance has a bucket of its own. From there to 128, buckets grow by a constant factor
    (transformers' MPNetEncoder.relative_position_bucket, in its arithmetic)."""
    reach = model.max_positions + PAGE_SIZE
    exact = DISTANCE_BUCKETS // 4
    half = DISTANCE_BUCKETS // 2
    distance = numpy.arange(-reach, reach)
    size = numpy.abs(distance).astype(numpy.float32)
    with numpy.errstate(divide="ignore"):
        far = numpy.log(size / numpy.float32(exact)) / numpy.float32(math.log(128 / exact)) * (half - exact)
    far = numpy.minimum(exact + numpy.maximum(far, 0).astype(numpy.int64), half - 1)
    bucket = numpy.where(size < exact, numpy.abs(distance), far) + half * (distance > 0)
    return buckets.reshape(DISTANCE_BUCKETS, model.distances)[bucket].T.astype(numpy.float32).copy()


def page_layout(model: Model, groups: LayerGroups, kv: KvType) -> PageLayout:
    """Where the keys and values of a model lie in pages: in those of a cache or, with texts, of a step."""
    layout = PageLayout.of(groups, model.by_layer, kv)
    return layout.shared if model.of_texts else layout
