"""The ops that a step of a model calls, a line each: what a record of the forward is made of.

A line names what an op reads and where that comes from: `%3` is what the op of line 3 wrote, whatever the buffer is called; weights, caches
and inputs have their names; tables that were computed at the start are digests of their values. Nothing is computed, so that the
lines are the same on every machine.
"""

import dataclasses
import hashlib
import inspect
import zlib
from collections.abc import Mapping

import numpy as np
import torch

from chatlm.worker.arrays.kinds import AdapterMatrix
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.kernels import OPS
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.tensors import MappedRows
from chatlm.worker.model.transformer import Transformer, first_turn
from chatlm.worker.ops.references import REFERENCES
from record import exact

MAX_TOKENS, MAX_ROWS = 64, 8
NOT_IN_STEPS = "pack", "make_cache", "sample"
MIXER_SIZES = ("size", "key_heads", "value_heads", "key_size", "value_size", "heads_by_key", "gates_by_key", "heads", "head_size", "state_size", "groups", "of_heads", "first_head",
               "taps_bias")      # what ops read of a mixer


def exact_numbers(dice, shape, scale):
    """Random numbers within `scale`, the same on every machine."""
    return (dice.integers(-2048, 2048, shape) * (scale / 2048)).astype(np.float32)


def dice_of(name, seed):
    """Of each tensor its own, so that the order of tensors is no matter."""
    return exact([seed, zlib.crc32(name.encode())])


def exact_tensors(model, seed=1):
    """A model's weights: matrices that neither grow nor vanish, norms about 1, decays below 0, bounds in order."""
    found = {}
    for name, shape in model.shapes().items():
        part, dice = name.rpartition(".")[2], dice_of(name, seed)
        values = exact_numbers(dice, shape, 0.25 if len(shape) > 1 else 0.5)
        if part.endswith("norm"):
            values = values + 1
        elif part == "decay":
            values = -np.abs(values)
        elif part == "clamps":
            values = np.sort(np.abs(values).reshape(14, 2), 1) * np.array([-8, 8], np.float32)
        found[name] = values.astype(np.float32).reshape(shape)
    if "layer_embed" in found:
        found["layer_embed"] = MappedRows(found["layer_embed"], "f32")
    return found


def exact_adapter(model, seed=3):
    """An adapter of all matrices that may have one."""
    found = {}
    for name, tensor in model.tensors().items():
        if tensor.adapted:
            rows, columns = tensor.shape
            found[name] = AdapterMatrix(*(exact_numbers(dice_of(f"{name} {size}", seed), size, 0.25) for size in ((3, columns), (rows, 3), (3,))))
    return found


def make_transformer(model, kernels, adapted=False):
    transformer = Transformer(model, exact_tensors(model), kernels, num_pages=64, num_slots=12, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS, dtype="float32")
    if adapted:
        transformer.pack_adapter(1, exact_adapter(model))
    return transformer


def make_step(model, groups, *spans, adapters=(), picture=None, slots=0):
    """A step's Batch: of sequence i the tokens spans[i]; whole texts if the model reads these. picture: rows of the step that show one."""
    V, dice = model.vocab_size or 64, exact(5)
    texts = dice.integers(0, V, (len(spans), 64)).tolist()
    ids, previous, starts, tables = [], [], [0], []
    for number, (text, (first, end)) in enumerate(zip(texts, spans)):
        ids += text[first:end]
        previous += [text[position - 1] if position else -1 for position in range(first, end)]
        starts.append(len(ids))
        tables.append(list(range(5 * groups * number, 5 * groups * (number + 1))))
    rows = [end - 1 for end in starts[1:]]
    if picture:
        ids[picture.start:picture.stop] = [V] * len(picture)
    if model.token_types or model.of_texts and model.vocab_size:
        previous = [0] * len(ids)
    if model.picture_pad is not None:
        previous = [model.picture_pad if picture and row in picture else V for row in range(len(ids))]
    more = {}
    if picture and model.rope_axes:
        places = [position for first, end in spans for position in range(first, end)]
        more["turns"] = [first_turn(model) + row if row in picture else place for row, place in enumerate(places)]
    if picture and any(attn.scores.sees == "pictures" for attn in model.attentions):
        more["ahead"] = [picture.stop if row in picture else 0 for row in range(len(ids))]
    count = len(spans)
    return Batch(ids, previous, starts, [end for _, end in spans], tables, [] if model.of_texts or not model.closes else rows, True,
                 [slots + number for number in range(count)], rows, [slots + 6 + number for number in range(count)], list(adapters), **more)


# ---- the list of ops

class Calls:
    """The lines of the ops that a transformer calls, in place of its kernels."""

    def __init__(self):
        self.lines, self.written, self.places, self.objects = [], {}, [], {}
        self.tables = {}        # digests of computed ones, by place
        self.kept = []          # so that no place is used twice
        self.plans = 0

    def ops(self, joined=False):
        found = {name: self.op(name, REFERENCES[name]) for name in OPS if name not in NOT_IN_STEPS}
        found["pack"] = self.packed
        if joined:
            found["all_reduce"] = self.op("all_reduce", lambda x, out, residual=None: None)
            found["all_gather"] = self.op("all_gather", lambda x, out: None)
        return found

    def op(self, name, reference):
        signature = inspect.signature(reference)

        def called(*values, **options):
            bound = signature.bind(*values, **options).arguments
            given = {key: value for key, value in bound.items() if not equals(value, signature.parameters[key].default)}
            if name == "rope_append":       # these mean nothing without what they are of
                given = {key: value for key, value in given.items()
                         if not (key == "eps" and "norm" not in given or key == "gate_scale" and "gate" not in given)}
            if name == "plan_attention":
                given = {"windows": sorted(given["windows"]), "dtype": given["dtype"]}
            writes = ("out", "gates") if name == "split_gates" else ("out",)
            words = [f"{key}={self.shown(value)}" for key, value in given.items() if key not in writes]
            for key in writes:
                if key in given:
                    words.append(f"{key} {sizes(given[key])}")
                    self.written[given[key].data_ptr()] = f"%{len(self.lines)}" if key == "out" else f"%{len(self.lines)}.{key}"
            self.lines.append(f"{name} {' '.join(words)}")
            return self.plan(reference(*values, **options)) if name == "plan_attention" else None
        return called

    def plan(self, made):
        self.objects[id(made)] = f"plan {self.plans}"
        self.plans += 1
        self.kept.append(made)
        return made

    def packed(self, name, *parts):
        """Plain, so that the matrix has a place."""
        self.lines.append(f"pack {name} {' '.join(map(sizes, parts))}")
        return torch.cat(parts)

    def name(self, names):
        """Give arrays their names: {name: array}."""
        for name, array in names.items():
            self.objects[id(array)] = name
            if isinstance(array, torch.Tensor) and array.numel():
                first = array.data_ptr()
                self.places.append((first, first + array.nbytes, array.element_size(), name))
            self.kept.append(array)

    def shown(self, value):
        if isinstance(value, torch.Tensor):
            return f"{self.place(value)} {sizes(value)}"
        if id(value) in self.objects:
            return self.objects[id(value)]
        if isinstance(value, bool | int | str | None):
            return repr(value)
        if isinstance(value, float):
            return format(value, ".9g")
        if isinstance(value, Mapping):
            names = {self.place(array).partition(".")[0] for array in value.values() if isinstance(array, torch.Tensor)}
            return f"layer {' '.join(sorted(names))}"
        if hasattr(value, "starts") and hasattr(value, "reads"):
            return "sequences"
        if isinstance(value, tuple | list):
            if value and all(type(each) is int for each in value):
                return f"{value[0]}..{value[-1]} of {len(value)}" if len(value) > 4 else f"[{', '.join(map(str, value))}]"
            return f"({', '.join(map(self.shown, value))})"
        return f"({', '.join(f'{name}={getattr(value, name)}' for name in MIXER_SIZES if hasattr(value, name))})"

    def place(self, array):
        """Where an array's values come from."""
        at = array.data_ptr()
        if at in self.written:
            return self.written[at]
        for first, _, _, name in self.places:
            if first == at:
                return name
        for first, end, size, name in self.places:
            if first < at < end:
                return f"{name}[{(at - first) // size}]"
        if (key := (at, tuple(array.shape))) not in self.tables:
            self.kept.append(array)
            self.tables[key] = f"table:{table_digest(array)}"
        return self.tables[key]


def sizes(array):
    return "x".join(map(str, array.shape)) or "1"


def equals(value, default):
    return value is None or type(value) is type(default) and not isinstance(value, torch.Tensor) and value == default


def table_digest(array):
    """Of a table's values to about 4 digits, since libm and numpy differ in the last one."""
    values = np.rint(array.detach().float().numpy().astype(np.float64) * 4096).astype(np.int64)
    return hashlib.sha256(values.tobytes()).hexdigest()[:8]


def called_ops(model, adapted=False, joined=False):
    """The lines of a step of two sequences, the first one of which decodes; of texts if the model reads these."""
    calls = Calls()
    kernels = dataclasses.replace(load_kernels("cpu", None, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS), **calls.ops(joined))
    transformer = make_transformer(model, kernels, adapted)
    calls.lines.sort()      # what is packed first is no matter of arithmetic
    calls.name({name: array for name, array in transformer.weights.items() if name != "head" or not model.tied})
    calls.name(transformer.buffers)
    for layer, caches in enumerate(transformer.layer_caches):
        if caches is not None and not any(caches is earlier for earlier in transformer.layer_caches[:layer]):
            calls.name({f"cache {layer}": caches})
    for layer, states in enumerate(transformer.states):
        calls.name({f"state {layer}.{number}": state for number, state in enumerate(states)} | ({f"states {layer}": states} if states else {}))
    if transformer.layer_embed is not None:
        calls.name({"layer_embed": transformer.layer_embed})
    for name, matrix in (transformer.adapters.get(1) or {}).items():
        calls.name({f"adapter {name} {part}": array for part, array in zip(("a", "b", "scale"), matrix)})
    read = transformer.inputs

    def inputs(batch):
        found = read(batch)
        for group, part in reversed([*enumerate(found.parts)]):
            calls.name({f"{name} of group {group}" if group else name: value for name, value in part._asdict().items() if isinstance(value, torch.Tensor)})
        return found

    transformer.inputs = inputs
    spans = [(0, 5), (0, 9)] if model.of_texts else [(20, 21), (3, 10)]
    transformer.forward(make_step(model, len(transformer.groups.windows), *spans, adapters=[0, 1] if adapted else ()))
    return calls.lines


# ---- what decode_core computes

def exact_tables(transformer):
    """Replace what the start computed by functions whose last bit differs by machine with exact numbers of the same size."""
    dice, done = exact(7), set()
    tables = [table for tables in transformer.rope_tables for table in tables]
    tables += [table for table in (*transformer.q_scales.values(), transformer.distances) if table is not None]
    for table in tables:
        if id(table) not in done:
            done.add(id(table))
            table[...] = exact_numbers(dice, table.shape, 1.0)


def decode_core_computes(model, adapted=False):
    """(the ops of its program, a line each; a digest of the bits that three steps leave)."""
    kernels = load_kernels("cpu", model, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS)
    transformer = make_transformer(model, kernels, adapted)
    exact_tables(transformer)
    digest, groups = hashlib.sha256(), len(transformer.groups.windows)
    adapters = [1, 0] if adapted else []
    steps = [make_step(model, groups, (0, 33), (0, 7), adapters=adapters)]
    if not model.of_texts:
        steps += [make_step(model, groups, (33, 34), (7, 12), adapters=adapters), make_step(model, groups, (34, 35), (12, 13), adapters=adapters)]
    for number, step in enumerate(steps):
        picture = range(4, 10) if model.sees and not number else None
        step = step._replace(state_reads=[2 * number, 2 * number + 1], write_slots=[2 * number + 2, 2 * number + 3])
        if picture:
            step = make_step(model, groups, (0, 33), (0, 7), adapters=adapters, picture=picture)._replace(state_reads=[0, 1], write_slots=[2, 3])
            values = exact_numbers(exact(8), (len(picture), model.width * len(model.picture_buffers)), 1.0)
            places = np.array([(4, 4 + row // 3, 4 + row % 3) for row in range(len(picture))]) if model.rope_axes else None
            transformer.show_pictures([(picture.start, values, places)])
        for name in () if model.opens else transformer.passed_on(0):
            buffer = transformer.buffers[name]
            transformer.arrays.put(exact_numbers(exact(9), tuple(buffer.shape), 1.0), buffer)
        logits = transformer.forward(step)
        left = [transformer.buffers["x"][:len(step.token_ids)], *([logits] if step.logit_rows else [])]
        assert all(np.isfinite(array).all() for array in left)
        for array in left:
            digest.update(np.ascontiguousarray(array).tobytes())
        if picture:
            transformer.show_pictures(())
    return kernels.backend.program.describe(), digest.hexdigest()[:12]
