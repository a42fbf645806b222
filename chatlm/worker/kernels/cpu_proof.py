"""Compares the compiled ops of a CPU with their references, in the instruction set that is in use."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.arrays.kinds import AdapterMatrix, Norm
from chatlm.worker.kernels.cuda_weights import dequantized
from chatlm.worker.kernels.product_proof import NO_GGUF, PACKED_TOLERANCE
from chatlm.worker.kernels.program import Marker, Program
from chatlm.worker.kernels.proof import Dice, copied, differs
from chatlm.worker.kernels.random_blocks import random_blocks
from chatlm.worker.kernels.sampling import SampleBatch
from chatlm.worker.kernels.tiles import ACTIVATIONS, COLUMNS, GATES, Arena, Matrix
from chatlm.worker.kernels.weights import KINDS, QuantizedMatrix, pack
from chatlm.worker.model.batch import Batch, Sequences, token_places
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2
from chatlm.worker.kernels.plain_model import plain_model
from chatlm.worker.ops.references import REFERENCES
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.tensors import rope_tables

FLOATS = {name: getattr(torch, dtype) for dtype, name in KINDS.items()}
WINDOWS = (0, 20)
T = 32                          # tokens that the buffers have room for
R = 4                           # logit rows
PAGES = 40                      # of the cache
SLOTS = 4                       # of states
HEAD_SIZE = 64
BLOCK = 32                      # numbers of a head that share a scale in q8_0
HADAMARD = functools.reduce(torch.kron, [torch.tensor([[1.0, 1], [1, -1]])] * 6) / HEAD_SIZE**0.5
STATES = {"short_conv": 2, "delta_rule": 4, "mamba2": 4}     # op -> which of its arguments the states are


def turned(heads: torch.Tensor) -> torch.Tensor:
    """Heads (T, H * D) turned as in pages of q8_0. Turning twice gives them back."""
    return (heads.unflatten(1, (-1, HEAD_SIZE)) @ HADAMARD).flatten(1)


class FileRows:
    """A table of random rows as a model file has them."""

    def __init__(self, kind: str, rows: int, columns: int, dice: Dice):
        self.kind = kind
        if kind in FLOATS:
            self.table = self.values = dice.normal(rows, columns).to(FLOATS[kind])
        else:
            self.table = torch.from_numpy(random_blocks(kind, rows, columns))
            self.values = dequantized(kind, self.table)

    def look_up(self, ids: numpy.ndarray) -> numpy.ndarray:
        return self.values.float().numpy()[ids.clip(min=0)]


class Chain:
    """A Program with a call of every op.

    Each call has an output of its own, so that after a step each reference gets exactly what its op has
    read."""

    def __init__(self, cache_type: torch.dtype):
        self.cache_type = cache_type
        self.dice = Dice(torch.device("cpu"), 4)
        self.program = Program(T, R)
        self.calls = []
        self.floats = {}                        # matrix -> its values, for the reference
        self.faults: dict[str, str] = {}        # op -> what is wrong; "": it is as its reference
        self.adapters: list[dict[str, AdapterMatrix]] = [{}, {}]
        self.model = plain_model(vocab_size=200, layers=1, width=768, heads=4, kv_heads=2,
                                       head_size=HEAD_SIZE, ffn_size=512,
                                       max_positions=PAGES * PAGE_SIZE)

    def call(self, name: str, *arguments: Any, width: int, rows: int = T, label: str = "", **options: Any):
        """Record an op with a new output of this many columns, and return the output."""
        out = torch.zeros(rows, width)
        getattr(self.program, name)(*arguments, out=out, **options)
        self.calls.append(SimpleNamespace(name=name, label=label or name, arguments=arguments, out=out,
                                          options=options))
        return out

    def record(self) -> None:
        p = self.program
        model = self.model
        dice = self.dice
        C = model.width
        attn = model.attention
        qkv_size = (attn.heads + 2 * attn.kv_heads) * attn.head_size
        table = dice.normal(model.vocab_size, C)
        weight = 1 + dice.normal(C) / 4
        one = torch.tensor([0.7]), torch.tensor([0.3])
        x = self.call("embed", table, p.token_ids, width=C)
        previous = self.call("embed", table, p.previous_token_ids, width=C)
        normed = self.call("rms_norm", x, weight, 1e-5, width=C)
        for bias in (None, dice.normal(C)):
            self.call("layer_norm", x, weight, bias, 1e-5, width=C)
        last_are_0 = torch.arange(C) < C - 5
        zeros_at_end = self.call("embed", table * last_are_0, p.token_ids, width=C)
        for of_norm in (weight * last_are_0, None):
            self.call("layer_norm", zeros_at_end, of_norm, None, 1e-5, width=C, count=C - 5)
        self.call("embed", dice.normal(PAGES * PAGE_SIZE, C), p.positions, width=C)
        self.call("copy", x, width=C)
        self.call("mix", x, normed, *one, width=C)
        self.call("smear", x, previous, p.previous_token_ids, dice.normal(1, 24), one[0], width=C)
        self.call("backout", x, normed, one[1], width=C)
        norm = Norm(weight, 1e-5)
        for kind in COLUMNS:
            self.products(kind, x, norm)
        qkv_weight = self.matrix("f32", "qkv", qkv_size)
        head = self.matrix("f32", "head", 5008)
        qkv = self.call("linear", x, qkv_weight, width=qkv_size, label="linear f32")
        norms = [1 + dice.normal(heads * attn.head_size) / 4 for heads in (attn.heads, attn.kv_heads)]
        means = self.call("mean_squares", qkv, *norms, [2 * len(norm) for norm in norms], width=2)
        self.call("norm_qk", qkv, *norms, means, 1e-5, width=qkv_size)
        self.call("norm_heads", qkv, *norms, model.attention.head_size, 1e-5, width=qkv_size)
        self.call("clamp", x, -dice.normal(C).abs(), dice.normal(C).abs(), width=C)
        self.call("scale_rows", x, 1 + dice.normal(1024).abs(), p.positions, width=C)
        cos, sin = rope_tables(model, torch.device("cpu"))
        for norm_at in ("before_rope", "none"):
            self.attention(qkv, cos, sin, self.float_cache(), "", norm_at)
        # not "none": without a norm, rounding would move large scores
        for norm_at in ("before_rope", "after_rope"):
            self.attention(qkv, cos, sin, self.packed_cache(), " q8_0", norm_at)
        self.latents(x, 80, 16, self.cache_type)
        self.latents(x, 64, 32, torch.uint8)
        self.experts(x, norm)
        self.adapted(x, norm)
        narrow = self.call("linear", x, self.matrix("f32", "input_gate", 48), width=48, label="linear f32")
        made = self.call("layer_inputs", x, previous, dice.normal(48), 1e-5, width=C)
        self.call("gate_input", narrow, made, 96, width=48)
        for kind in ("bf16", "q8_0", "q4_1"):        # these need no gguf package
            self.call("look_up", FileRows(kind, model.vocab_size, C, dice), p.token_ids, width=C)
        for taps, bias in ((3, None), (5, dice.normal(C // 3))):
            self.call("short_conv", x, dice.normal(taps * C // 3), (dice.normal(SLOTS, taps - 1, C // 3),),
                      p.sequences, width=C // 3, bias=bias)
        for alternating, by_key in ((False, True), (True, False)):
            self.delta_rule(x, alternating, by_key)
        for part in ({}, {"groups": 1, "of_heads": 18, "first_head": 6}):
            self.mamba2(x, **part)
        gates = torch.zeros(T, 256)
        halves = self.call("split_gates", x, 64, gates=gates, width=C - 256)
        self.call("gate", self.call("copy", halves, width=C - 256), halves, width=C - 256)
        of_heads = self.call("linear", x, self.matrix("f32", "head_gates", C // 64), width=C // 64,
                             label="linear f32")
        self.call("gate", self.call("copy", x, width=C), of_heads, width=C, activation="softplus")
        share = self.call("linear", x, self.matrix("f32", "shared_gate", 1), width=1, label="linear f32")
        self.call("gated_add", x, normed, share, width=C)
        last = self.call("gather_rows", x, p.logit_rows, width=C, rows=R)
        logits = self.call("linear", last, head, width=5008, rows=R, label="linear f32")
        self.capped = self.call("softcap", logits, 15.0, width=5008, rows=R)
        p.sample(self.capped)

    def matrix(self, kind: str, name: str, rows: int, columns: int = 0) -> Matrix:
        """A matrix as a model has it. `floats` keeps the values that the reference multiplies with."""
        if kind in FLOATS:
            source = weight = self.dice.normal(rows, columns or self.model.width).to(FLOATS[kind])
        else:
            blocks = random_blocks(kind, rows, self.model.width, seed=rows)
            source = QuantizedMatrix(((kind, blocks),), self.model.width)
            weight = dequantized(kind, torch.from_numpy(blocks))
        packed = pack(Arena(1 << 20), name, (source,), None, False)
        self.floats[packed] = weight.float()
        return packed

    def attention(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor,
                  kept: str, norm_at: str) -> None:
        p = self.program
        options = {"width": 256, "label": f"paged_attention{kept}"}
        q = self.call("rope_append", qkv, cos, sin, p.positions, p.slots, cache, width=256,
                      label=f"rope_append{kept}", norm=norm_at)
        for window in WINDOWS:
            self.call("paged_attention", q, cache, p.attention, window, **options)
            self.call("paged_attention", q, cache, p.attention, window,
                      sinks=self.dice.normal(self.model.attention.heads), **options)
            self.call("paged_attention", q, cache, p.attention, window, two_sided=True, **options)
        self.call("paged_attention", q, cache, p.attention, 0, softcap=2.0, **options)

    def latents(self, x: torch.Tensor, kept: int, turned: int, cache_type: torch.dtype) -> None:
        """Latent attention with more heads than go through the latents together.

        kept        numbers of a latent
        turned      numbers of a head's query that turn
        cache_type  that of pages; uint8: of q8_0"""
        p = self.program
        dice = self.dice
        heads = 18
        plain = 32   # numbers of a head's query that do not turn
        values = 48  # numbers of a head's value
        of_type = " q8_0" if cache_type == torch.uint8 else ""
        # scores of about 1: where they are large, rounding q moves them too far
        scale = 0.005 if of_type else 0.7
        angles = dice.normal(PAGES * PAGE_SIZE, turned // 2)
        tables = angles.cos(), angles.sin()
        queries = self.call("linear", x, self.matrix("f32", "queries", heads * (plain + turned)),
                            width=heads * (plain + turned), label="linear f32")
        kv = self.call("linear", x, self.matrix("f32", "kv_in", kept + turned), width=kept + turned,
                       label="linear f32")
        k_up = self.matrix("f32", "k_up", heads * kept, plain)
        v_up = self.matrix("f32", "v_up", heads * values, kept)
        for adjacent in (True, False):
            cache = self.latent_cache(kept + turned, cache_type)
            appended = kv, 1 + dice.normal(kept) / 4, 1e-5, *tables, p.positions, p.slots, cache
            p.append_latents(*appended, adjacent=adjacent)
            self.calls.append(
                SimpleNamespace(name="append_latents", label=f"append_latents{of_type}", arguments=appended,
                                out=kv, options={"adjacent": adjacent}))
            q = self.call("absorb", queries, k_up, *tables, p.positions, scale, cache,
                          width=heads * (kept + turned), adjacent=adjacent)
        for window in WINDOWS:
            seen = self.call("paged_attention", q, cache, p.attention, window, width=heads * kept,
                             label=f"latent attention{of_type}")
        self.call("by_head", seen, v_up, width=heads * values)

    def latent_cache(self, size: int, kind: torch.dtype) -> torch.Tensor:
        """Pages of latents with keys of this size."""
        page = PAGE_SIZE
        if kind != torch.uint8:
            return self.dice.normal(PAGES, page, size, dtype=kind)
        codes = self.packed_numbers(PAGES, page * size)
        codes[:, :page * size] ^= 128
        return codes.view(PAGES, page + 1, size)

    def float_cache(self) -> torch.Tensor:
        return self.dice.normal(PAGES, self.model.attention.kv_heads, 2, PAGE_SIZE * HEAD_SIZE,
                                dtype=self.cache_type)

    def packed_cache(self) -> torch.Tensor:
        """Pages of q8_0, random values of about 1."""
        count = PAGE_SIZE * HEAD_SIZE
        kv_heads = self.model.attention.kv_heads
        pages = self.packed_numbers(PAGES, kv_heads, 2, count)      # codes of keys are + 128
        pages[:, :, 1, :count] ^= 128
        return pages

    def packed_numbers(self, *shape: int) -> torch.Tensor:
        """Codes + 128 of random numbers of about 1, and after them their scales."""
        generator = self.dice.generator
        codes = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
        scales = (1 + torch.rand(*shape[:-1], shape[-1] // BLOCK, generator=generator)) / 100
        return torch.cat((codes, scales.half().view(torch.uint8)), -1)

    def experts(self, x: torch.Tensor, norm: Norm) -> None:
        """The experts of a layer, with all that comes before and after them. Floats are enough: `products`
        proves packed weights."""
        E = 6
        F = 64
        dice = self.dice
        gate_up = self.matrix("f32", "expert_gate_up", 2 * E * F)
        up = self.matrix("f32", "expert_up", E * F)
        down = self.matrix("f32", "expert_down", E * self.model.width, F)
        down_bias = dice.normal(E * self.model.width) / 4
        logits = self.call("linear", x, self.matrix("f32", "router", E), width=E, label="linear f32")
        router: dict[str, Any]
        routers: list[tuple[str, dict[str, Any]]] = [
            ("swiglu", {"sum_to_one": False}),
            ("clamped_swiglu", {"sum_to_one": True}),
            ("swiglu", {"sum_to_one": True, "sigmoids": True, "correction_bias": dice.normal(E) / 4}),
            ("swiglu", {"sum_to_one": True, "correction_bias": dice.normal(E) / 4}),
            ("geglu", {"sum_to_one": True, "scales": 1 + dice.normal(E) / 4}),
            ("relu2", {"sum_to_one": False, "sigmoids": True, "groups": (3, 2), "share_scale": 2.5}),
            ("swiglu", {"sum_to_one": True, "jitter": 0.3})]
        for activation, router in routers:
            first = gate_up if activation in GATES else up
            # all equal, because tiles have gates and ups in another order
            biases = torch.full((first.rows,), 0.3), down_bias
            self.call("experts", x, logits, first, down, width=self.model.width,
                      norm=None if "jitter" in router else norm, biases=biases, activation=activation,
                      chosen=2, **router)

    def adapted(self, x: torch.Tensor, norm: Norm) -> None:
        """Products of floats with adapters of every type. Half of the ranks of each change only half of the
        outputs."""
        N = 80
        for kind, activation in (("f32", None), ("f16", "swiglu"), ("bf16", "relu2"), ("bf16", "geglu")):
            name = f"{kind} {activation}"
            gated = activation in ("swiglu", "geglu")
            rows, packed = (2 * N, "gate_up") if gated else (N, "output")
            for ranks, adapter in zip((16, 5), self.adapters):
                a = self.dice.normal(ranks, self.model.width)
                b = self.dice.normal(rows, ranks)
                b[:rows // 2, ranks // 2:] = 0
                adapter[name] = AdapterMatrix(a.to(FLOATS[kind]), b.to(FLOATS[kind]),
                                              0.1 + self.dice.normal(ranks) / 20)
            self.call("linear", x, self.matrix("f32", packed, rows), width=N, label="linear adapters",
                      norm=norm, activation=activation, adapted=name)

    def delta_rule(self, x: torch.Tensor, alternating: bool, by_key: bool) -> None:
        """A delta rule of unusual sizes."""
        mixer = DeltaRule(4, 2, 4, 32, 48, alternating, by_key, by_key)
        dice = self.dice
        mixed, width = mixer.widths(self.model.width)
        channels, *_ = mixer.parts
        part = self.call("linear", x, self.matrix("f32", "mix_in", mixed), width=mixed, label="linear f32")
        weights = {
            "taps": dice.normal(4 * channels), "decay": -dice.normal(4).exp(), "dt_bias": dice.normal(4),
            "mix_norm": dice.normal(48)
        }
        states = tuple(dice.normal(SLOTS, *shape) for shape in mixer.states(self.model.width))
        self.call("delta_rule", part, weights, mixer, 1e-5, states, self.program.sequences, width=width)

    def mamba2(self, x: torch.Tensor, groups: int = 2, **part: Any) -> None:
        """A Mamba layer of unusual sizes, or a rank's part of one."""
        mixer = Mamba2(3, heads=6, head_size=80, state_size=24, groups=groups, **part)
        dice = self.dice
        mixed, width = mixer.widths(self.model.width)
        _, channels, heads = mixer.parts
        columns = self.call("linear", x, self.matrix("f32", "mix_in", mixed), width=mixed, label="linear f32")
        weights = {
            "taps": dice.normal(3 * channels), "taps_bias": dice.normal(channels),
            "decay": -dice.normal(heads).exp(), "dt_bias": dice.normal(heads), "skip": dice.normal(heads),
            "mix_norm": dice.normal(width)}
        states = tuple(dice.normal(SLOTS, *shape) for shape in mixer.states(self.model.width))
        out = self.call("mamba2", columns, weights, mixer, 1e-5, states, self.program.sequences, width=width)
        if part:
            squares = self.call("group_squares", out, mixer, width=groups)
            self.call("norm_groups", out, weights["mix_norm"], squares, mixer, 1e-5, width=width)

    def products(self, kind: str, x: torch.Tensor, norm: Norm) -> None:
        """Products with one type of weights: plain, with all that may come before and after, and with each
        activation."""
        label = f"linear {kind}"
        N = 80
        try:
            plain = self.matrix(kind, "output", N)
            gates = self.matrix(kind, "gate_up", 2 * N)
        except ImportError:                 # the gguf package is missing
            self.faults[label] = NO_GGUF
            return
        before = self.call("copy", self.call("linear", x, plain, width=N, label=label), width=N)
        more: dict[str, Any] = dict(norm=norm, bias=self.dice.normal(N), residual=before)
        self.call("linear", x, plain, width=N, label=label, **more)
        # clamped_swiglu is proved with experts: where it is steep, a small error here would become a large
        # one
        for activation in ACTIVATIONS.keys() - {None, "clamped_swiglu"}:
            self.call("linear", x, gates if activation in GATES else plain, width=N, label=label,
                      activation=activation)

    # ---- running

    def step(self, batch: Batch, sampled: list[SampleRow]) -> None:
        """Run a step whose first two sequences have adapters. Then give each reference what its op has read,
        and compare."""
        adapters = self.adapters[:len(batch.lengths)]
        packed = [self.program.adapters.pack(matrices) for matrices in adapters]
        inputs = self.inputs(batch)
        caches = [call.arguments[5] for call in self.calls if call.name == "rope_append"]
        caches += [call.arguments[7] for call in self.calls if call.name == "append_latents"]
        caches += [
            state for call in self.calls if call.name in STATES for state in call.arguments[STATES[call.name]]
        ]
        before = {id(cache): cache.clone() for cache in caches}
        sampling = SampleBatch(sampled, self.capped.shape[1])
        tokens = self.program.finish(
            self.program.start(batch.token_ids, batch.previous_token_ids, batch.starts, batch.lengths,
                               batch.tables, batch.logit_rows, sampling, all_rows=True,
                               states=(batch.state_reads, batch.write_rows, batch.write_slots),
                               adapters=packed, ahead=batch.ahead))
        for call in self.calls:
            arguments = [self.real(argument, inputs) for argument in call.arguments]
            options = {key: self.real(option, inputs) for key, option in call.options.items()}
            if name := options.pop("adapted", None):
                rows = [slice(*batch.starts[i:i + 2]) for i in range(len(adapters))]
                options["adapted"] = [(some, matrices[name]) for some, matrices in zip(rows, adapters)]
            fault = self.compare(call, arguments, options, self.real(call.out, inputs), before)
            self.faults[call.label] = self.faults.get(call.label) or fault
        expected = REFERENCES["sample"](self.capped[:len(sampled)], sampled)
        self.faults["sample"] = "" if tokens == expected else f"draws the tokens {tokens}, not {expected}"

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """name of a marker -> what a step has in its place, as the references read it."""
        positions, slots = map(torch.tensor, token_places(batch))
        lists = {name: torch.tensor(getattr(batch, name))
                 for name in ("token_ids", "previous_token_ids", "logit_rows")}
        plan = REFERENCES["plan_attention"](batch, positions, WINDOWS, "float32")
        return lists | {
            "positions": positions, "slots": slots, "attention": plan,
            "sequences": Sequences.of(batch)}

    def real(self, argument: Any, inputs: dict[str, Any]) -> Any:
        """What a reference gets in place of a recorded argument. Of a buffer it gets the rows in use."""
        if isinstance(argument, Marker):
            return inputs[argument.name]
        if isinstance(argument, Matrix):
            return self.floats[argument]
        if any(argument is call.out for call in self.calls):
            rows = inputs["logit_rows" if len(argument) == R else "token_ids"]
            return argument[:len(rows)]
        return argument

    def compare(self, call: SimpleNamespace, arguments: list, options: dict, out: torch.Tensor,
                before: dict[int, torch.Tensor]) -> str:
        """What is wrong with the output of a call, and with the cache or states that it writes.

        before: id of a cache or state -> what it held before the step"""
        reference = REFERENCES[call.name]
        want = torch.empty_like(out)
        scale = self.model.attention.head_size**0.5            # our queries are scaled by 1 / this already
        if call.name == "rope_append":
            qkv, *tables, cache = arguments
            pages = self.as_kept(before[id(cache)])
            reference(copied(qkv), *tables, pages, want, **options)
            if cache.dtype == torch.uint8:      # a code near the middle of two may be one more or less
                fault = "".join(differs(ours.floats(), theirs.floats(), "the cache", 1e-2)
                                for ours, theirs in zip(self.as_kept(cache), pages))
                return fault or differs(turned(out) * scale, want, "q")
            fault = differs(self.slot_major(cache), pages, "the cache")
            return fault or differs(out * scale, want, "q")
        if call.name in STATES:
            place = STATES[call.name]
            ours = arguments[place]
            theirs = [before[id(state)] for state in ours]
            arguments[place] = theirs
            reference(*arguments, out=want, **options)
            faults = [differs(one, other, "the states") for one, other in zip(ours, theirs)]
            return "".join(filter(None, faults)) or differs(out, want, "the output")
        if call.name == "split_gates":
            gates = options["gates"][:len(out)]
            theirs = torch.empty_like(gates)
            reference(*arguments, out=want, **options | {"gates": theirs})
            return differs(gates, theirs, "the gates") or differs(out, want, "the output")
        if call.name == "append_latents":
            *given, cache = arguments
            kept = len(given[1])
            theirs = self.latents_as_kept(before[id(cache)], kept)
            reference(*given, theirs, **options)
            [ours, _] = self.latents_as_kept(cache, kept)
            if cache.dtype == torch.uint8:      # as in rope_append
                return differs(ours.floats(), theirs[0].floats(), "the cache", 1e-2)
            return differs(ours, theirs[0], "the cache")
        if call.name == "absorb":
            arguments[6] = self.latents_as_kept(arguments[6],
                                                arguments[6].shape[-1] - 2 * arguments[2].shape[1])
            reference(*arguments, out=want, **options)
            heads = arguments[0].shape[1] // (arguments[1].shape[1] + 2 * arguments[2].shape[1])
            return differs(out * (out.shape[1] // heads)**0.5, want, "the output")
        if call.name == "paged_attention" and arguments[1].ndim == 3:
            q, cache = arguments[:2]
            arguments[0] = q * cache.shape[2]**0.5
            arguments[1] = self.latents_as_kept(cache, out.shape[1] * cache.shape[2] // q.shape[1])
        elif call.name in ("paged_attention", "text_attention"):
            q, cache = arguments[:2]
            if cache.dtype == torch.uint8:
                q = turned(q)
            arguments[0] = q * scale
            arguments[1] = self.as_kept(cache)
        reference(*arguments, out=want, **options)
        kind = call.label.rpartition(" ")[2]
        packed = kind in COLUMNS and kind not in FLOATS
        return differs(out, want, "the output", PACKED_TOLERANCE if packed else 0.0)

    def latents_as_kept(self, cache: torch.Tensor, values: int) -> Any:
        """A copy of a cache of latents as the references hold it: keys (slots, 1, D), and the first numbers
        of these."""
        D = cache.shape[-1]
        if cache.dtype != torch.uint8:
            keys = cache.float().clone().view(-1, 1, D)
            return keys, keys[..., :values]
        size = PAGE_SIZE
        layer = SimpleNamespace(kv_heads=1, head_size=D, value_size=values, values_in_keys=True)
        pages = self.pages_of(SimpleNamespace(by_layer=[layer]), D + 2 * D // BLOCK)
        pages[0].codes.copy_(cache[:, :size].reshape(-1, 1, D).view(torch.int8))
        scales = cache[:, size].contiguous().view(torch.float16).unflatten(-1, (D // BLOCK, size))
        pages[0].scales.copy_(scales.transpose(1, 2).reshape(-1, 1, D // BLOCK))
        return pages

    def pages_of(self, model: Any, slot_bytes: int) -> Any:
        """New pages of q8_0 of a layer, as the references hold them."""
        layout = SimpleNamespace(size=slot_bytes, unit=1, types=("q8_0",),
                                 place=lambda layer, count: (0, slot_bytes))
        _, [pages] = REFERENCES["make_cache"](model, layout, PAGES, torch.device("cpu"))
        return pages

    def as_kept(self, cache: torch.Tensor) -> Any:
        """A layer's cache as the references hold it: floats, or packed keys and values."""
        if cache.dtype != torch.uint8:
            return self.slot_major(cache.float())
        Hkv = self.model.attention.kv_heads
        size = PAGE_SIZE
        D = HEAD_SIZE
        pages = self.pages_of(self.model, 2 * Hkv * (D + 2 * D // BLOCK))
        codes = cache[..., :size * D]
        scales = cache[..., size * D:].view(torch.float16).unflatten(-1, (D // BLOCK, size))
        keys = codes[:, :, 0].unflatten(-1, (D // 4, size, 4)).permute(0, 3, 1, 2, 4) ^ 128
        values = codes[:, :, 1].unflatten(-1, (size, D)).permute(0, 2, 1, 3)
        for part, (kept, unpacked) in enumerate(zip(pages, (keys, values))):
            kept.codes.copy_(unpacked.reshape(-1, Hkv, D).view(torch.int8))
            kept.scales.copy_(scales[:, :, part].permute(0, 3, 1, 2).flatten(0, 1))
        return pages

    def slot_major(self, cache: torch.Tensor) -> torch.Tensor:
        """A layer's cache of floats as the references hold it: (P * PAGE_SIZE, 2, Hkv, D)."""
        size = PAGE_SIZE
        D = self.model.attention.head_size
        k = cache[:, :, 0].unflatten(-1, (D, size)).permute(0, 3, 1, 2)
        v = cache[:, :, 1].unflatten(-1, (size, D)).permute(0, 2, 1, 3)
        return torch.stack((k, v), 2).flatten(0, 1)


def prove_cpu() -> dict[str, str]:
    """op -> what is wrong with it on a CPU. "": nothing is. Unproved: the gguf package is missing, so nobody
    knows."""
    faults: dict[str, str] = {}
    prompt = numpy.random.default_rng(5).integers(0, 200, 21).tolist()
    sampled: tuple[dict[str, Any], ...] = (
        dict(temperature=0.0), dict(top_k=0, top_p=0.9, repetition_penalty=1.2))
    rows = [SampleRow(SamplingParams(seed=i, **params), 30 + i, prompt, 9)
            for i, params in enumerate(sampled)]
    for cache_type in (torch.float32, torch.float16):
        with torch.inference_mode():
            chain = Chain(cache_type)
            chain.record()
            # a decode row beside a prompt's chunk, then a decode row alone
            chain.step(
                Batch(token_ids=[7, *prompt], previous_token_ids=[3, -1, *prompt[:-1]],
                      starts=[0, 1, 22], lengths=[300, 31], tables=[list(range(19)), [30, 25]],
                      logit_rows=[0, 21], state_reads=[2, 1], write_rows=[0, 8, 21],
                      write_slots=[2, 3, 0], ahead=[0] * 5 + [17] * 2 + [29] * 12 + [0] * 3), rows)
            chain.step(
                Batch(token_ids=[9], previous_token_ids=[7], starts=[0, 1], lengths=[301],
                      tables=[list(range(19))], logit_rows=[0], state_reads=[3], write_rows=[0],
                      write_slots=[1], ahead=[]), rows[:1])
            faults = {op: faults.get(op) or fault for op, fault in chain.faults.items()}
            of_texts = prove_texts(cache_type, prompt)
            faults |= {op: faults.get(op) or fault for op, fault in of_texts.items()}
    return faults


def prove_texts(cache_type: torch.dtype, text: list[int]) -> dict[str, str]:
    """The same for the attention of models that read whole texts. Three texts are computed together."""
    chain = Chain(cache_type)
    p = chain.program
    dice = chain.dice
    heads = chain.model.attention.heads
    width = (heads + 2 * chain.model.attention.kv_heads) * HEAD_SIZE
    cache = chain.float_cache()
    qkv = chain.call("embed", dice.normal(chain.model.vocab_size, width), p.token_ids, width=width)
    q = chain.call("rope_append", qkv, *rope_tables(chain.model, torch.device("cpu")), p.positions,
                   p.slots, cache, width=256, norm="none")
    for window in WINDOWS:
        for distances in (None, dice.normal(heads, 2 * (T + PAGE_SIZE))):
            chain.call("text_attention", q, cache, p.attention, window, width=256, distances=distances)
    batch = Batch(
        token_ids=[7, *text, 3, 4], previous_token_ids=[-1] * 24, starts=[0, 1, 22, 24], lengths=[1, 21, 2],
        tables=[[2], [30, 25], [7]], logit_rows=[], state_reads=[], write_rows=[], write_slots=[], ahead=[])
    inputs = chain.inputs(batch)
    before = {id(cache): cache.clone()}
    p.finish(p.start(batch.token_ids, batch.previous_token_ids, batch.starts, batch.lengths, batch.tables,
                     []))
    for call in chain.calls:
        arguments = [chain.real(argument, inputs) for argument in call.arguments]
        fault = chain.compare(call, arguments, dict(call.options), chain.real(call.out, inputs), before)
        chain.faults[call.label] = chain.faults.get(call.label) or fault
    return chain.faults
