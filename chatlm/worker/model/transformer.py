"""One forward for every family of models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.hub.stamps import refuse_changed_adapter
from chatlm.worker.arrays.kinds import (
    AdapterMatrix, Device, Norm, address_of, as_kind, floats, kind_of)
from chatlm.worker.arrays.rotary import query_scales, rope_frequencies, rope_rows, rope_tables
from chatlm.worker.model.clamps import Clamps
from chatlm.worker.model.padding import padded_adapter, padded_spec, padded_tensors
from chatlm.worker.model.spec import (
    DISTANCE_BUCKETS, DeltaRule, Inputs, Mamba2, NoMixer, PageLayout, RowAdapters, Sequences, ShortConv,
    expected_tensors, group_layers, token_places)
from chatlm.worker.model.tensors import MappedRows, Unread, read_ahead

if TYPE_CHECKING:
    from chatlm.common.hub.stamps import Stamp
    from chatlm.common.hub.local import Progress
    from chatlm.worker.model.kernels import Kernels
    from chatlm.worker.model.spec import Attention, Batch, KvType, LayerGroups, ModelSpec


class Transformer:
    """A model's packed weights, KV pages, state slots and activation buffers, all allocated here, once.

    `tensors` has the names and shapes of `expected_tensors`. It is emptied as weights are packed, so that
    each is held once, in the kernels' layout. A step has at most `max_tokens` tokens, `max_rows` logit rows.
    Matrices become `dtype`; None: they stay in their file's types or close ones. Keys and
    values have the type `kv`; None: that of activations.
    """

    def __init__(self, spec: ModelSpec, tensors: dict, kernels: Kernels, *, num_pages: int, max_tokens: int,
                 max_rows: int | None = None, device: str = "cpu", dtype: str | None = None,
                 num_slots: int = 1, groups: LayerGroups | None = None, kv: KvType | None = None,
                 read_adapter: Callable[[Path], dict[str, AdapterMatrix]] | None = None,
                 shared: Mapping[str, Any] = {}, buffers: dict[str, Any] | None = None,
                 progress=lambda activity, fraction: None):
        """shared: weights of another Transformer, packed, in place of those of the same names. buffers: those
        of one of equal sizes, which computes its layers just before."""
        self.unpadded, self.kernels = spec, kernels
        if kernels.pads:
            spec, tensors = padded_spec(spec), padded_tensors(spec, tensors)
        self.spec = spec
        # numbers of a padded row, which LayerNorms must know
        self.counted = {"count": self.unpadded.width} if self.unpadded.width != spec.width else {}
        self.read_adapter = read_adapter   # a folder's matrices, named after those they change
        self.adapters: dict[int, Any] = {}  # by slot, from 1 on: as the kernels read them
        self.attentions = spec.by_layer
        self.device, self.dtype = Device(device), kernels.activation_dtype(dtype)
        self.arrays = kernels.arrays_on(self.device)
        self.kv = kv or kernels.kv_type("auto", dtype)
        # the type in which references attend; packed keys have more than 8 bits of precision
        self.kv_dtype = "float32" if self.kv.packed else self.kv.floats
        self.groups = groups or group_layers(self.attentions, 0, apart=False, kv=self.kv)
        self.layout = page_layout(spec, self.groups, self.kv)
        self.windows = spec.windows
        self.num_slots = num_slots
        self.mixers = spec.mixers or (None,) * spec.layers
        # x is kept divided by residual_scale, so that what blocks add needs no product; with an eps divided
        # by its square, norms make of x what they would have made
        scale = as_kind(numpy.array([spec.embedding_scale], numpy.float32), dtype or "float32")
        self.embedding_scale = floats(scale).item() / spec.residual_scale
        self.norm_eps = spec.norm_eps / spec.residual_scale**2
        of = self.arrays.of
        with self.arrays.computing():
            self.weights = self._pack(tensors, dtype, shared, progress)
            self.q_scale = of(query_scales(spec)) if spec.q_growth else None
            if spec.distance_buckets:
                self.distances = of(distance_biases(self.arrays.numpy(self.weights["buckets"]), spec))
            self.logit_norm, self.logit_norm_bias = (
                weight if weight is None or spec.logit_scale == 1 else weight * spec.logit_scale
                for weight in map(self.weights.get, ("final_norm", "final_norm_bias")))
            self.layers = [{name.partition(".")[2]: tensor for name, tensor in self.weights.items()
                            if name.startswith(f"{l}.")} for l in range(spec.layers)]
            for layer in self.layers if spec.clamped else ():
                layer["clamps"] = Clamps(spec, self.arrays.numpy(layer["clamps"]), of)
            turns = [rope_frequencies(spec.attention(layer)) for layer in range(spec.layers)]
            # the rows after the last position are those of pictures' rows in a step
            turned = replace(spec, max_positions=spec.max_positions + max_tokens * bool(spec.rope_axes))
            tables = {turn: tuple(map(of, rope_tables(turned, turns.index(turn)))) for turn in {*turns}}
            self.rope_tables = [tables[turn] for turn in turns]  # of each layer
            self.cache, self.layer_caches = kernels.make_cache(
                spec, self.layout, num_pages + self.groups.holes, self.device)
            self.states = [tuple(self.arrays.zeros((num_slots, *shape), "float32")
                                 for shape in (mixer.states(spec.width) if mixer else ()))
                           for mixer in self.mixers]
            sizes = self.buffer_sizes(spec, max_tokens, min(max_rows or max_tokens, max_tokens),
                                      kernels.backend.activations or self.dtype)
            self.buffers = buffers or {name: self.arrays.empty((rows, columns), kind)
                                       for name, (rows, columns, kind) in sizes.items()}
            self.shown = spec.sees  # are there rows of pictures in their buffer?
            show_pictures(self, ())
            if spec.sees and not kernels.backend.tensors:
                for name in picture_buffers(spec):
                    kernels.backend.program.given(self.buffers[name])
            self.recorded = kernels.backend.record(self)

    def _pack(self, tensors: dict, dtype: str | None, shared: Mapping[str, Any], progress: Progress) -> dict:
        """Read each weight that is not shared and move it to the device, matrices in the kernels' layout; a
        tied head is the embedding."""
        weights, names = {**shared}, [name for name in expected_tensors(self.spec) if name not in shared]
        self.layer_embed: MappedRows | None = None
        if self.spec.tied_head:
            names = [name for name in names if name != "head"]
            tensors.pop("head", None)
        if "layer_embed" in names:  # it stays in the file
            names.remove("layer_embed")
            self.layer_embed = tensors.pop("layer_embed")
        for name, tensor, read in read_ahead(tensors, names):
            progress("loading weights", len(weights) / len(names))
            parts = read if isinstance(read, tuple) else (read,)
            target = dtype if len(parts[0].shape) > 1 and name != "smear_gate" else "float32"
            moved = [part if hasattr(part, "parts") else self.arrays.of(part, target) for part in parts]
            matrix = name.rpartition(".")[2] in (
                "embed", "qkv", "output", "gate_up", "gate", "up", "down", "head", "ve_gate", "gate_up_bias",
                "router", "expert_gate_up", "expert_up", "expert_down", "expert_gate_up_bias",
                "shared_gate_up", "shared_up", "shared_down", "shared_gate", "latent_in", "latent_out",
                "mix_in", "mix_out", "join_embed", "join_hidden", "layer_project", "input_gate", "input_out")
            weights[name] = weight = self.kernels.pack(name, *moved) if matrix else moved[0]
            if isinstance(tensor, Unread) and not getattr(weight, "finite", False):  # or it was never checked
                tensor.refuse_faults(read, packed=hasattr(weight, "finite"))
            if weight is moved[0] and hasattr(weight, "dtype") and self.device.type == "cpu" and any(
                    address_of(part) == address_of(weight) for part in getattr(tensor, "mapped", ())):
                weights[name] = self.arrays.copy(weight)  # a file in use may change
            if name.endswith(".router_norm"):
                weights[name] = weight * self.spec.width**-0.5
            if name.endswith(".taps"):  # the columns of each tap are contiguous
                mixer = self.mixers[int(name.partition(".")[0])]
                weights[name] = weight.reshape(-1, mixer.size).T.flatten() if mixer else weight
        if self.spec.tied_head:
            weights["head"] = weights["embed"]
        return weights

    @staticmethod
    def buffer_sizes(spec: ModelSpec, T: int, R: int, dtype: str) -> dict[str, tuple[int, int, str]]:
        """One buffer per activation: residual stream, q and logits float32, the rest of type `dtype`."""
        C, F, f32 = spec.width, spec.ffn_size, "float32"
        V = 0 if spec.of_texts else spec.vocab_size
        attentions = [attn for attn in spec.by_layer if attn]
        sizes = [(sum(attn.parts), attn.parts[0], attn.heads * attn.value_size, attn.kv_heads,
                  attn.kv_heads * attn.value_size) for attn in attentions]
        qkv, q, attended, kv_heads, values = map(max, zip(*sizes)) if sizes else (0,) * 5
        wide, narrow = (max((mixer.widths(C)[side] for mixer in spec.mixers if mixer), default=0)
                        for side in range(2))
        gates, P = q * spec.output_gate, spec.layer_input_size
        shared = [mixer for mixer in spec.mixers if isinstance(mixer, Mamba2) and mixer.of_heads]
        return {
            **dict.fromkeys(picture_buffers(spec), (T, C * spec.sees, f32)),
            "unnormed": (T, narrow if shared else 0, f32),
            "squares": (T, max((-(-mixer.groups // 16) * 16 for mixer in shared), default=0), f32),
            "gated": (T, (gates + qkv) * spec.output_gate, dtype), "gates": (T, gates, dtype),
            "x": (T, C, f32), "residual": (T, C, f32), "x0": (T, C, f32), "middle": (T, C, f32),
            "previous": (T, C, f32), "added": (T, C, f32),
            "normed": (T, C * (spec.layer_norms or spec.clamped), f32),
            "qkv": (T, qkv, dtype), "q": (T, q, f32), "attended": (T, attended, dtype),
            "gate": (T, kv_heads, dtype), "value": (T, values, dtype),
            "up": (T, F * spec.clamped, f32), "hidden": (T, F * (2 if spec.double_layers else 1), dtype),
            "layer_inputs": (T, spec.all_layers * P, f32), "layer_rows": (T, spec.all_layers * P, f32),
            "input": (T, P, f32),
            "dense": (T, spec.dense_size, dtype), "shared": (T, spec.shared_size, dtype),
            "latent": (T, spec.latent_size, f32),
            "mixed": (T, wide, dtype), "mixer": (T, narrow, dtype),
            "share": (T, int(spec.shared_gate), f32), "means": (T, 16 * bool(spec.qk_norm_sizes), f32),
            "routing": (T, spec.experts, f32), "last": (R, C, f32), "logits": (R, V, f32),
            "own_logits": (R, spec.own_rows, f32),
        }

    def cut(self, T: int, R: int) -> SimpleNamespace:
        """The first T rows of each buffer, or R rows of those used after the last layer."""
        return SimpleNamespace(**{name: buffer[:R if name in ("last", "logits", "own_logits") else T]
                                  for name, buffer in self.buffers.items()})

    @property
    def weights_bytes(self) -> int:
        return sum({id(weight): weight.nbytes for weight in self.weights.values()}.values())

    @property
    def matrix_types(self) -> list[str]:
        """The matrices' types, most common first: ["q4_1", "q8_0"]."""
        types = Counter(kind_of(w)
                        for w in self.weights.values() if getattr(w, "kind", None) or w.ndim > 1)
        return [name for name, _ in types.most_common()]

    @property
    def weight_types(self) -> str:
        """The matrices' types and the memory of all weights: "q4_1, q8_0 (93 MiB)"."""
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
        """The rows [first, last) of the last step, whose batch had `states`, after the final norm; of the
        buffer "last", those that had logits.

        (rows, C) float64. The norm is computed here, row by row: identical in any batch and with all kernels.
        """
        C = self.unpadded.width
        x = self.arrays.numpy(self.buffers[buffer][first:last]).astype(numpy.float64)
        if self.spec.sum_norms:
            return x[:, :C]
        if self.spec.layer_norms:
            x = x[:, :C] - x[:, :C].mean(axis=1, keepdims=True)
        x = x / numpy.sqrt((x * x).mean(axis=1, keepdims=True) + self.norm_eps)
        weight, bias = (
            0.0 if part is None else self.arrays.numpy(part)[:C].astype(numpy.float64)
            for part in map(self.weights.get, ("final_norm", "final_norm_bias")))
        return (x[:, :C] * weight if self.spec.norm_weights else x[:, :C]) + bias

    def inputs(self, batch: Batch) -> Inputs:
        columns = (batch.token_ids, batch.previous_token_ids, *token_places(batch), batch.logit_rows)
        tensors = [self.arrays.of(numpy.array(column, numpy.int64)) for column in columns]
        turns = self.arrays.of(numpy.array(batch.turns, numpy.int64)) if batch.turns else tensors[2]
        count, parts = len(self.groups.windows), []
        for group in range(count):
            mine = batch
            if count > 1:
                mine = batch._replace(tables=[pages[group::count] for pages in batch.tables])
                tensors[3] = self.arrays.of(numpy.array(token_places(mine)[1], numpy.int64))
            windows = {self.windows[l] for l, attn in enumerate(self.attentions)
                       if attn and self.layout.group[l] == group}
            plan = self.kernels.plan_attention(mine, tensors[2], windows, self.kv_dtype)
            parts.append(Inputs(*tensors, attention=plan, turns=turns))
        adapters = RowAdapters.of(batch, self.adapters) if any(batch.adapters) else RowAdapters()
        return parts[0]._replace(parts=tuple(parts), sequences=Sequences.of(batch), adapters=adapters)

    def compute(self, inputs: Inputs, b: SimpleNamespace):
        """The model: T new tokens -> b.logits (R, V).

        Every op writes into a given buffer, so that the steps can be recorded or captured as a CUDA graph."""
        spec, k, w = self.spec, self.kernels, self.weights
        b.adapters, b.types = inputs.adapters, inputs.previous_token_ids
        if spec.opens or spec.joins:
            self._embed(inputs, b)
        for l, layer in enumerate(self.layers):
            if spec.residual_lambdas:
                k.mix(b.x, b.x0, w["resid_lambdas"][l], w["x0_lambdas"][l], out=b.x)
            if self.mixers[l]:
                self._mix(inputs, b, layer, l)
            else:
                group = self.layout.group[l]
                self._attention(inputs.parts[group] if group else inputs, b, layer, l)
            self._feed_forward(b, layer, l)
            follow_layer(spec, k, b, layer, l)
        if not spec.closes or spec.of_texts:
            return
        if spec.backout_layer is not None:
            k.backout(b.x, b.middle, w["backout_lambda"], out=b.x)
        k.gather_rows(b.x, inputs.logit_rows, out=b.last)  # (R, C)
        logits = b.own_logits if spec.own_rows else b.logits
        norm = Norm(self.logit_norm, self.norm_eps)
        if spec.layer_norms:
            k.layer_norm(b.last, norm.weight, self.logit_norm_bias, norm.eps, out=b.last, **self.counted)
            norm = None
        adapted_linear(k, b, b.last, w, "head", norm=norm, bias=w.get("head_bias"), out=logits)  # (R, V)
        if spec.own_rows:  # joined with those of other ranks
            k.all_gather(logits, out=b.logits)
        if spec.softcap:
            k.softcap(b.logits, spec.softcap, out=b.logits)

    def _embed(self, inputs: Inputs, b: SimpleNamespace):
        """x = the first layer's input (T, C)."""
        spec, k, w = self.spec, self.kernels, self.weights
        if spec.joins:
            return join_state(self, inputs, b)
        self._look_up(inputs.token_ids, out=b.x)
        if self.embedding_scale != 1:
            k.mix(b.x, b.x, self.embedding_scale, 0.0, out=b.x)
        if spec.sees:
            k.mix(b.x, b.pictures, 1.0, 1.0, out=b.x)
        if spec.positions:
            k.embed(w["positions"].reshape(-1, spec.width), inputs.positions, out=b.previous)
            k.mix(b.x, b.previous, 1.0, 1.0, out=b.x)
        if spec.token_types:
            table = w["types"].reshape(-1, spec.width)
            k.embed(table, inputs.previous_token_ids, out=b.previous, part=(0, spec.vocab_size))
            k.mix(b.x, b.previous, 1.0, 1.0, out=b.x)
        if spec.input_norm:
            k.layer_norm(b.x, w["embed_norm"], w.get("embed_norm_bias"), spec.norm_eps, out=b.x,
                         **self.counted)
        if spec.layer_input_size:
            look_up_layer_inputs(self, inputs, b)
            k.layer_inputs(b.layer_inputs, b.layer_rows, w["layer_project_norm"], spec.norm_eps * spec.width,
                           out=b.layer_inputs)
        if spec.embedding_norm:
            k.rms_norm(b.x, None, spec.norm_eps, out=b.x)
        if spec.smear_channels:  # mixes in the previous token's embedding, before its own smearing
            self._look_up(inputs.previous_token_ids, out=b.previous)
            k.rms_norm(b.previous, None, spec.norm_eps, out=b.previous)
            k.smear(b.x, b.previous, inputs.previous_token_ids, w["smear_gate"], w["smear_lambda"], out=b.x)
        if spec.residual_lambdas:
            k.copy(b.x, out=b.x0)

    def _look_up(self, ids, out):
        """The embeddings (T, C) of some ids; each of several ranks only has those of its rows."""
        spec, k, table = self.spec, self.kernels, self.weights["embed"]
        if spec.sees:  # rows of pictures have the id after the last one: nothing is looked up for them
            return k.embed(table, ids, out=out, part=(0, spec.vocab_size + 1))
        if not spec.own_rows:
            return k.embed(table, ids, out=out)
        k.embed(table, ids, out=out, part=(spec.first_row, spec.vocab_size))
        k.all_reduce(out, out=out)

    def passed_on(self, layer: int) -> list[str]:
        """The buffers that layers from `layer` on need from earlier ones."""
        spec = self.spec
        needed = {"x": True, "x0": spec.residual_lambdas,
                  "layer_inputs": bool(spec.layer_input_size),
                  "middle": spec.backout_layer is not None and spec.backout_layer < layer}
        return [name for name, is_needed in needed.items() if is_needed]

    def _attention(self, inputs: Inputs, b: SimpleNamespace, layer: dict, l: int):
        """residual = x + output(attention(norm(x))), once new keys and values are in the layer's pages."""
        spec, k, attn, cache, value, gate = (
            self.spec, self.kernels, self.spec.attention(l), self.layer_caches[l], None, None)
        norms = {"q_norm": layer.get("q_norm"), "k_norm": layer.get("k_norm")}
        x, norm = self._normed(b, b.x, layer, "attention_norm")
        queries, columns = attn.parts[0], sum(attn.parts)
        qkv, q, attended = (narrow(buffer, width) for buffer, width in (
            (b.qkv, columns), (b.q, queries), (b.attended, attn.heads * attn.value_size)))
        product = narrow(b.gated, queries + columns) if spec.output_gate else qkv
        adapted_linear(k, b, x, layer, "qkv", l, norm=norm, bias=layer.get("qkv_bias"),
                       out=product)  # (T, rows of parts)
        if spec.output_gate:
            k.split_gates(product, attn.head_size, gates=narrow(b.gates, queries), out=qkv)
        if "value_embed" in layer:
            value, gate = b.value, b.gate
            k.embed(layer["value_embed"], inputs.token_ids, out=value)  # (T, Hkv * Dv)
            k.linear(x, layer["ve_gate"], norm=norm, out=gate)  # (T, Hkv) from the first few channels
        if spec.qk_norm_sizes:
            k.mean_squares(qkv, **norms, sizes=spec.qk_norm_sizes, out=b.means)  # (T, 2)
            if k.all_reduce:
                k.all_reduce(b.means, out=b.means)
            k.norm_qk(qkv, **norms, means=b.means, eps=spec.head_eps, out=qkv)
            norms = {}
        more = {"value_norm": True} if attn.value_norm else {}
        k.rope_append(qkv, *self.rope_tables[l], inputs.turns, inputs.slots, cache, out=q,
                      norm=spec.qk_norm, **norms, eps=spec.head_eps, post_scale=spec.qk_scale,
                      q_scale=attn.q_scale, value_embed=value, gate=gate, gate_scale=spec.ve_gate_scale,
                      **more)   # (T, H * D)
        if self.q_scale is not None:
            k.scale_rows(q, self.q_scale, inputs.positions, out=q)
        if spec.embeds:
            k.pause()
        if spec.of_texts:
            more = {"distances": self.distances} if spec.distance_buckets else {}
            k.text_attention(q, cache, inputs.attention, attn.window, out=attended, **more)  # (T, H * Dv)
        else:
            k.paged_attention(q, cache, inputs.attention, attn.window, out=attended,
                              softcap=spec.attention_softcap, sinks=layer.get("sinks"), **spec.ahead(attn))
        if spec.output_gate:
            k.gate(attended, narrow(b.gates, queries), out=attended)
        self._add(b, attended, layer, l, "output", b.x, out=b.residual)

    def _mix(self, inputs: Inputs, b: SimpleNamespace, layer: dict, l: int):
        """residual = x + mix_out(op(mix_in(norm(x)))), with the sequences' states; the op is the mixer's."""
        k, mixer, states = self.kernels, self.mixers[l], self.states[l]
        if isinstance(mixer, NoMixer):
            return k.copy(b.x, out=b.residual)
        x, norm = self._normed(b, b.x, layer, "attention_norm")
        mixed, out = (buffer[:, :width] for buffer, width in zip(
            (b.mixed, b.mixer), mixer.widths(self.spec.width)))  # pyright: ignore[reportOptionalMemberAccess]  it has one
        adapted_linear(k, b, x, layer, "mix_in", l, norm=norm, bias=layer.get("mix_in_bias"), out=mixed)
        if isinstance(mixer, ShortConv):
            k.short_conv(mixed, layer["taps"], states, inputs.sequences, out=out, bias=layer.get("taps_bias"))
        else:
            op = k.delta_rule if isinstance(mixer, DeltaRule) else k.mamba2
            shared = isinstance(mixer, Mamba2) and mixer.of_heads  # several ranks share its groups
            op(mixed, layer, mixer, self.spec.norm_eps, states, inputs.sequences,
               out=b.unnormed if shared else out)
            if shared:
                k.group_squares(b.unnormed, mixer, out=b.squares)
                k.all_reduce(b.squares, out=b.squares)
                k.norm_groups(b.unnormed, layer["mix_norm"], b.squares, mixer, self.spec.norm_eps, out=out)
        self._add(b, out, layer, l, "mix_out", b.x, out=b.residual)

    def _feed_forward(self, b: SimpleNamespace, layer: dict, l: int):
        """x = residual + down(activation(up(norm(residual)))), or a sum over experts; or of norm(x)."""
        spec, k = self.spec, self.kernels
        if l in spec.bare_layers:
            return k.copy(b.residual, out=b.x)
        if spec.one_norm:  # where attention_norm has left its result
            x, norm = b.normed, None
        else:
            x, norm = self._normed(b, b.x if spec.parallel else b.residual, layer, "ffn_norm")
        if "experts_norm" in layer:
            return add_experts_and_dense(spec, k, b, layer, l, norm)
        if "router" in layer:
            return self._experts(b, x, layer, l, norm)
        up, hidden = "up" if spec.ungated else "gate_up", b.dense if spec.experts else b.hidden
        hidden = hidden if spec.experts or l in spec.double_layers else narrow(hidden, spec.ffn_size)
        adapted_linear(k, b, x, layer, up, l, norm=norm, bias=layer.get(f"{up}_bias"),
                       activation=spec.activation, out=hidden)  # (T, F)
        self._add(b, hidden, layer, l, "down", b.residual, out=b.x)

    def _experts(self, b: SimpleNamespace, x, layer: dict, l: int, norm: Norm | None):
        """x = residual + what each row's experts add to it, including shared ones."""
        spec, k, up = self.spec, self.kernels, "up" if self.spec.ungated else "gate_up"
        alone = k.all_reduce is None and x is b.residual
        total, reads = b.x if alone else b.added, x
        k.linear(x, layer["router"], norm=norm, bias=layer.get("router_bias"), out=b.routing)
        if spec.latent_size:
            adapted_linear(k, b, x, layer, "latent_in", l, norm=norm, out=b.latent)
            reads = b.latent
        k.experts(
            reads, b.routing, layer[f"expert_{up}"], layer["expert_down"], norm=norm if reads is x else None,
            biases=(layer.get(f"expert_{up}_bias"), layer.get("expert_down_bias")),
            out=total if reads is x else reads, activation=spec.activation, chosen=spec.experts_per_token,
            sum_to_one=spec.shares_sum_to_one, residual=alone and reads is x, **router_options(spec, layer))
        if spec.sum_norms:
            return norm_sum(self, b, layer)
        if spec.latent_size:
            adapted_linear(k, b, reads, layer, "latent_out", l, residual=x if alone else None, out=total)
        if spec.shared_size:
            adapted_linear(k, b, x, layer, f"shared_{up}", l, norm=norm,
                           activation=spec.activation, out=b.shared)
            if spec.shared_gate:
                k.linear(x, layer["shared_gate"], norm=norm, out=b.share)  # (T, 1)
                adapted_linear(k, b, b.shared, layer, "shared_down", l, out=b.previous)
                k.gated_add(total, b.previous, b.share, out=total)
            else:
                adapted_linear(k, b, b.shared, layer, "shared_down", l, residual=total, out=total)
        if k.all_reduce:
            k.all_reduce(b.added, out=b.x, residual=b.residual)
        elif not alone:
            k.mix(b.residual, b.added, 1.0, 1.0, out=b.x)

    def _normed(self, b: SimpleNamespace, x, layer: dict, name: str) -> tuple[Any, Norm | None]:
        """What a product reads in place of the normalized x: x, and the norm that `linear` applies to it, or
        b.normed, which has a LayerNorm's result."""
        if not self.spec.pre_norms or self.spec.layer_norms and name not in layer:
            return x, None
        norm = Norm(layer.get(name), self.norm_eps)
        if self.spec.clamped:
            self.kernels.rms_norm(x, norm.weight, norm.eps, out=b.normed)
            return b.normed, None
        if not self.spec.layer_norms:
            return x, norm
        bias = layer.get(f"{name}_bias")
        self.kernels.layer_norm(x, norm.weight, bias, norm.eps, out=b.normed, **self.counted)
        return b.normed, None

    def _add(self, b: SimpleNamespace, x, layer: dict, l: int, name: str, residual, out):
        """out = residual + x @ layer[name].T + bias (T, C), in some families with a norm of what is added,
        or of the sum.

        Each of several ranks has some columns of the matrix, so they sum their products."""
        k, bias, norm = self.kernels, layer.get(f"{name}_bias"), layer.get(f"{name}_norm")
        if self.spec.sum_norms:
            adapted_linear(k, b, x, layer, name, l, bias=bias, residual=residual, out=b.added)
            return k.layer_norm(b.added, norm, layer.get(f"{name}_norm_bias"), self.norm_eps, out=out,
                                **self.counted)
        if norm is None and not k.all_reduce:
            return adapted_linear(k, b, x, layer, name, l, bias=bias, residual=residual, out=out)
        adapted_linear(k, b, x, layer, name, l, bias=bias, out=b.added)
        if norm is None:
            return k.all_reduce(b.added, out=out, residual=residual)
        if k.all_reduce:
            k.all_reduce(b.added, out=b.added)
        k.rms_norm(b.added, norm, self.spec.norm_eps, out=b.added)
        k.mix(residual, b.added, 1.0, 1.0, out=out)


def picture_buffers(spec: ModelSpec) -> list[str]:
    """The names of what has a step's rows of pictures: for the input, and after the first layers."""
    return ["pictures", *(f"pictures_{layer}" for layer in range(spec.deep_rows))]


def first_turn(spec: ModelSpec) -> int:
    """The row of the rotary tables by which a step's first row turns, if rows of pictures turn by their
    places; 0: they turn by their positions."""
    return spec.max_positions if spec.rope_axes else 0


ShownPictures = Seq[tuple[int, numpy.ndarray, numpy.ndarray | None]]


def show_pictures(transformer: Transformer, rows: ShownPictures):
    """Put rows of pictures into the next step, beside which none may be under way; () undoes that. Of each
    run: its first row in the step, (n, C * (1 + deep_rows)), and time, row and column (n, 3) of each if they
    turn by these."""
    if not (rows or transformer.shown):
        return
    spec, put, C = transformer.spec, transformer.arrays.put, transformer.unpadded.width
    transformer.shown = bool(rows)
    for number, name in enumerate(picture_buffers(spec)):
        buffer = transformer.buffers[name]
        put(numpy.full(tuple(buffer.shape), -0.0, numpy.float32), buffer)  # changes no sum
        for first, values, _ in rows:
            scaled = values[:, number * C:(number + 1) * C] / numpy.float32(spec.residual_scale)
            put(scaled, buffer[first:first + len(values), :C])
    layers = {id(tables[0]): (layer, tables) for layer, tables in enumerate(transformer.rope_tables)}
    for first, values, places in rows:
        begin = first_turn(spec) + first
        for layer, tables in layers.values():
            if places is None:
                continue
            for turned, table in zip(rope_rows(spec, layer, places), tables):
                put(turned, table[begin:begin + len(values)])


def look_up_layer_inputs(transformer: Transformer, inputs: Inputs, b: SimpleNamespace):
    """b.layer_inputs = layer_project x, b.layer_rows = the tokens' rows (T, L * P); of rows of pictures those
    of spec.picture_pad."""
    k, spec, table = transformer.kernels, transformer.spec, transformer.layer_embed
    if spec.picture_pad is None:
        k.look_up(table, inputs.token_ids, out=b.layer_rows)
    else:
        part = 0, spec.vocab_size + 1
        k.look_up(table, inputs.previous_token_ids, out=b.layer_inputs, part=part)
        k.look_up(table, inputs.token_ids, out=b.layer_rows, part=part)
        k.mix(b.layer_rows, b.layer_inputs, 1.0, 1.0, out=b.layer_rows)
    k.linear(b.x, transformer.weights["layer_project"], out=b.layer_inputs)


def join_state(transformer: Transformer, inputs: Inputs, b: SimpleNamespace):
    """x = join_embed(norm(embedding)) + join_hidden(norm(x)): one product of both in the files."""
    k, w, eps = transformer.kernels, transformer.weights, transformer.norm_eps
    k.embed(w["embed"], inputs.token_ids, out=b.previous)
    k.linear(b.previous, w["join_embed"], norm=Norm(w["join_embed_norm"], eps), out=b.added)
    k.linear(b.x, w["join_hidden"], norm=Norm(w["join_hidden_norm"], eps), residual=b.added, out=b.previous)
    k.copy(b.previous, out=b.x)


def norm_sum(transformer: Transformer, b: SimpleNamespace, layer: dict):
    """x = norm(x + the bias that all experts have together)."""
    spec, k = transformer.spec, transformer.kernels
    if spec.experts_bias:  # all tokens are of type 0
        k.embed(layer["experts_bias"].reshape(-1, spec.width), b.types, out=b.previous,
                part=(0, spec.vocab_size))
        k.mix(b.x, b.previous, 1.0, 1.0, out=b.x)
    k.layer_norm(b.x, layer["down_norm"], layer.get("down_norm_bias"), transformer.norm_eps, out=b.x,
                 **transformer.counted)


def load_adapter(transformer: Transformer, slot: int, folder: Path, stamp: Stamp = ()) -> int:
    """Compute a slot's rows with this adapter from the next step on; returns its bytes. ConfigError if it
    does not fit this model, or if its files no longer match the stamp."""
    if transformer.read_adapter is None:
        raise ConfigError(f"{folder}: this model does not support adapters")
    refuse_changed_adapter(folder, stamp)
    matrices = transformer.read_adapter(folder)
    refuse_changed_adapter(folder, stamp)
    return pack_adapter(transformer, slot, matrices)


def pack_adapter(transformer: Transformer, slot: int, matrices: dict[str, AdapterMatrix]) -> int:
    """Compute a slot's rows with these matrices, named after those they change; returns their bytes."""
    if transformer.kernels.pads:
        matrices = padded_adapter(transformer.unpadded, matrices)
    packed = transformer.kernels.backend.pack_adapter(matrices, transformer.device)
    transformer.adapters[slot] = packed
    held = sum(tensor.nbytes for matrix in matrices.values() for tensor in matrix)
    return getattr(packed, "nbytes", held)  # decode_core omits zeros and has its own pages


def adapted_linear(k: Kernels, b: SimpleNamespace, x, weights: dict, name: str, layer: int | None = None,
                   **options):
    """The op linear with weights[name], plus what each row's adapter adds to its product."""
    if "clamps" in weights:
        return clamped_linear(k, b, x, weights, name, **options)
    adapted = b.adapters and b.adapters.of_matrix(name if layer is None else f"{layer}.{name}")
    if adapted:
        options["adapted"] = adapted
    k.linear(x, weights[name], **options)


def clamped_linear(k: Kernels, b: SimpleNamespace, x, weights: dict, name: str, *, out, **options):
    """The same of a layer whose products are clamped; gelu(gate x) * up x for gate_up. x is clamped too."""
    if name == "gate_up":
        for part, made in (("gate", out), ("up", b.up)):
            clamped_linear(k, b, x, weights, part, out=made)
        return k.gate_input(out, b.up, 0, out=out)
    bounds = weights["clamps"].bounds
    k.clamp(x, *bounds[f"{name}_in"], out=x)
    k.linear(x, weights[name], out=out, **options)
    k.clamp(out, *bounds[name], out=out)


def distance_biases(buckets: numpy.ndarray, spec: ModelSpec) -> numpy.ndarray:
    """What text_attention adds to scores, (H, 2 * reach): of each distance key - query its bucket's value.

    A bucket has one distance below 8, and from there on as many as make it a constant factor wide, up to
    128 (transformers' MPNetEncoder.relative_position_bucket, in its arithmetic)."""
    reach, exact, half = spec.max_positions + PAGE_SIZE, DISTANCE_BUCKETS // 4, DISTANCE_BUCKETS // 2
    distance = numpy.arange(-reach, reach)
    size = numpy.abs(distance).astype(numpy.float32)
    with numpy.errstate(divide="ignore"):
        far = numpy.log(size / numpy.float32(exact)) / numpy.float32(math.log(128 / exact)) * (half - exact)
    far = numpy.minimum(exact + numpy.maximum(far, 0).astype(numpy.int64), half - 1)
    bucket = numpy.where(size < exact, numpy.abs(distance), far) + half * (distance > 0)
    return buckets.reshape(DISTANCE_BUCKETS, spec.heads)[bucket].T.astype(numpy.float32).copy()


def page_layout(spec: ModelSpec, groups: LayerGroups, kv: KvType) -> PageLayout:
    """Where a model's keys and values are in the pages of a cache, or of a step."""
    layout = PageLayout.of(groups, spec.by_layer, kv)
    return layout.shared if spec.of_texts else layout


def narrow(buffer, columns: int):
    """A buffer (T, columns or more) viewed as (T, columns), in the same memory."""
    if buffer.shape[1] == columns:
        return buffer
    return buffer.reshape(-1)[:len(buffer) * columns].reshape(-1, columns)


def router_options(spec: ModelSpec, layer: dict) -> dict[str, Any]:
    """What the op experts must know of a router that is no softmax."""
    if spec.router_jitter is not None:
        return {"jitter": spec.router_jitter}
    return {"sigmoids": True, "choice_bias": layer.get("choice_bias"), "groups": spec.router_groups,
            "share_scale": spec.share_scale} if spec.sigmoid_router else {}


def follow_layer(spec: ModelSpec, k: Kernels, b: SimpleNamespace, layer: dict, l: int):
    """What some families do with x after a layer."""
    if spec.layer_input_size:
        add_layer_input(spec, k, b, layer, l)
    if spec.layer_scalars:
        k.mix(b.x, b.x, layer["scalar"], 0.0, out=b.x)
    if l < spec.deep_rows:
        k.mix(b.x, getattr(b, f"pictures_{l}"), 1.0, 1.0, out=b.x)
    if l == spec.backout_layer:
        k.copy(b.x, out=b.middle)


def add_layer_input(spec: ModelSpec, k: Kernels, b: SimpleNamespace, layer: dict, l: int):
    """x = x + norm(input_out(gelu(input_gate x) * the layer's part of the output of _embed)).

    Every rank computes all of it."""
    P = spec.layer_input_size
    first = (spec.layer_inputs[0] + l) * P
    k.linear(b.x, layer["input_gate"], out=b.input)  # (T, P)
    k.gate_input(b.input, b.layer_inputs, first, out=b.input)
    k.linear(b.input, layer["input_out"], out=b.added)
    k.rms_norm(b.added, layer["input_norm"], spec.norm_eps, out=b.added)
    k.mix(b.x, b.added, 1.0, 1.0, out=b.x)


def add_experts_and_dense(spec: ModelSpec, k: Kernels, b: SimpleNamespace, layer: dict, l: int,
                          norm: Norm | None):
    """x = residual + norm(norm(shared expert of norm(residual)) + norm(experts of norm(residual))). Each
    norm has its own weight, and so does the router's."""
    def normed(x, name: str):
        if k.all_reduce:
            k.all_reduce(x, out=x)
        k.rms_norm(x, layer[f"{name}_norm"], spec.norm_eps, out=x)

    k.linear(b.residual, layer["router"], norm=Norm(layer["router_norm"], spec.norm_eps), out=b.routing)
    k.experts(
        b.residual, b.routing, layer["expert_gate_up"], layer["expert_down"],
        norm=Norm(layer["experts_norm"], spec.norm_eps), biases=(None, None), out=b.added,
        activation=spec.activation, chosen=spec.experts_per_token, sum_to_one=True, residual=False,
        scales=layer["experts_scale"])
    normed(b.added, "experts_down")
    adapted_linear(k, b, b.residual, layer, "shared_gate_up", l, norm=norm, activation=spec.activation,
                   out=b.shared)
    adapted_linear(k, b, b.shared, layer, "shared_down", l, out=b.previous)
    normed(b.previous, "shared_down")
    k.mix(b.added, b.previous, 1.0, 1.0, out=b.added)
    k.rms_norm(b.added, layer["down_norm"], spec.norm_eps, out=b.added)
    k.mix(b.residual, b.added, 1.0, 1.0, out=b.x)
