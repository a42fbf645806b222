"""Compares compiled ops with references, on the device that will run them.

When a model starts on a GPU, `prove_cuda` runs each op once in the model's own shapes. Where an op raises or
differs, CudaBackend lets its reference compute. `check` (report.py) proves the ops of a CPU too. A tolerance
is a share of the largest value of a tensor, as large as rounding to the tensor's type needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any, TYPE_CHECKING

import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.arrays.kinds import AdapterMatrix, Norm
from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.cuda_adapters import RowsOfMatrix
from chatlm.worker.kernels.cuda_latents import FEW_ROWS
from chatlm.worker.kernels.cuda_packed_kv import PackedPages, gathered, packable, packed
from chatlm.worker.kernels.cuda_prompts import prompts_of
from chatlm.worker.kernels.cuda_weights import PackedMatrix, dequantized
from chatlm.worker.kernels.random_blocks import random_blocks
from chatlm.worker.model.batch import Batch
from chatlm.worker.ops.basic import finish_linear
from chatlm.worker.ops.references import REFERENCES
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.tensors import rope_tables

if TYPE_CHECKING:
    from chatlm.worker.kernels.cuda_backend import CudaBackend
    from chatlm.worker.model.blocks.model import Model

log = logging.getLogger("chat_server.decode_core")
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
DTYPES = (torch.float32, torch.bfloat16)        # that a model may have on CUDA
PAGES = 40
VOCABULARY = 5003

def differs(got: torch.Tensor, want: torch.Tensor, what: str, tolerance: float = 0.0) -> str:
    """How far `got` is from `want`, in words; "" if no farther than the tolerance of its type. NaN is always
    farther."""
    want = want.to(torch.float32)
    scale = float(want.abs().max())
    error = float((got.to(torch.float32) - want).abs().max())
    if error <= max(tolerance, TOLERANCES[got.dtype]) * scale:
        return ""
    return f"{what} differs by {error / max(scale, 1e-30):.1e} of the largest value"


def prove_cuda(backend: CudaBackend, device: Any, ops: Iterable[str] = ()) -> dict[str, str]:
    """op -> what is wrong, for the ops of a CudaBackend that differ from their references; {} if all are
    right.

    ops         which to prove; none named: all
    ConfigError if an op leaves the device unusable, because then the process cannot go on even without the
    op.
    """
    faults = {}
    for op in ops or CUDA_PROOFS:
        try:
            with torch.inference_mode():
                fault = CUDA_PROOFS[op](backend, torch.device(device))
        except Exception as error:
            fault = f"raises {type(error).__name__}: {error}"
            check_usable(op, fault, device)
        if fault:
            faults[op] = fault
            log.warning("decode_core's %s on %s: %s; torch's reference computes instead", op, device, fault)
    return faults


def check_usable(op: str, fault: str, device: Any) -> None:
    """ConfigError if the device cannot be used after an op that failed."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        raise ConfigError(f"decode_core's {op} {fault}, and {device} cannot be used after it; "
                                 "CHAT_SERVER_KERNELS=reference serves without decode_core") from None


class Dice:
    """Random tensors on a device. Every device gets the same numbers."""

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def order(self, count: int, dtype=torch.int64) -> torch.Tensor:
        return torch.randperm(count, generator=self.generator).to(dtype).to(self.device)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32, copy=True)


def cache_of(model: Model, dice: Dice, dtype: torch.dtype) -> torch.Tensor:
    return dice.normal(2, PAGES, model.attention.kv_heads, PAGE_SIZE, model.attention.head_size, dtype=dtype)


def caches_of(model: Model, dice: Dice) -> Iterator[tuple[str, torch.dtype, Any, Any]]:
    """A cache of each type that the model may have: (name of the type, dtype of activations, the cache, a
    copy for the reference)."""
    for dtype in DTYPES:
        cache = cache_of(model, dice, dtype)
        yield str(dtype)[6:], dtype, cache, copied(cache)
    if packable(model.attention.head_size):
        pages = PackedPages(*packed(cache_of(model, dice, torch.float32)))
        yield "q8_0", torch.bfloat16, pages, PackedPages(*(part.clone() for part in pages))


def floats_of(cache: Any) -> torch.Tensor:
    return gathered(cache, torch.arange(cache.shape[1], device=cache[0].device))


def windows_of(model: Model, most: int) -> set[int]:
    """The windows of a model's layers, none larger than `most`, so that each hides some keys of a proof. 0
    hides none."""
    return {min(window, most) for window in model.windows} or {0}


def prove_rope_append(backend: CudaBackend, device: torch.device) -> str:
    """Rows with padding between them, for every type of activations and cache that the model may have."""
    if backend.latents:
        return ""
    model = backend.model
    dice = Dice(device, 1)
    H = model.attention.heads
    Hkv = model.attention.kv_heads
    D = model.attention.head_size
    norms = model.attention.norms
    scores = model.attention.scores
    value_embeds = [attn.embed for attn in model.attentions if attn.embed]
    cos, sin = rope_tables(dataclasses.replace(model, max_positions=64), device)
    positions = torch.tensor([0, 63, 7, 0, 30], device=device)
    slots = torch.tensor([17, 3, PAGES * PAGE_SIZE - 1, -1, 250], device=device)
    of_cache = {str(dtype)[6:]: TOLERANCES[dtype] for dtype in DTYPES}
    of_cache["q8_0"] = 1.5 / 127            # a number between two codes may get either
    for kind, dtype, cache, want in caches_of(model, dice):
        options: dict[str, Any] = dict(
            norm=norms.when if norms and not (norms.whole or norms.centred) else "none",
            eps=norms.eps if norms else 0.0, post_scale=scores.qk_scale, q_scale=scores.scale,
            gate_scale=max((each.scale for each in value_embeds), default=2.0))
        if norms and norms.weights:
            options |= {"q_norm": 1 + dice.normal(D) / 4, "k_norm": 1 + dice.normal(D) / 4}
        embeds = {}
        if value_embeds:
            embeds = {"value_embed": dice.normal(5, Hkv * D, dtype=dtype),
                      "gate": dice.normal(5, Hkv, dtype=dtype)}
        qkv = dice.normal(5, (H + 2 * Hkv) * D, dtype=dtype)
        q = torch.empty(5, H * D, device=device)
        want_q = torch.empty(5, H * D, device=device)
        wide = {name: tensor.float() for name, tensor in embeds.items()}
        places = cos, sin, positions, slots
        backend.references.rope_append(copied(qkv), *places, want, want_q, **options, **wide)
        backend.rope_append(qkv, *places, cache, q, **options, **embeds)
        real = slots >= 0
        fault = differs(q[real], want_q[real], "q")
        fault = fault or differs(floats_of(cache), floats_of(want), "the cache", of_cache[kind])
        if fault:
            return f"{fault} ({kind})"
    return ""


def prove_attention(backend: CudaBackend, device: torch.device) -> str:
    """Rows of one key, of several merges, and padding, through every window of the model, with its sinks and
    without."""
    if backend.latents:
        return prove_latent_attention(backend, device)
    model = backend.model
    dice = Dice(device, 2)
    H = model.attention.heads
    D = model.attention.head_size
    lengths = torch.tensor([1, 1100, 0, 33], dtype=torch.int32, device=device)
    for kind, dtype, cache, wide in caches_of(model, dice):
        q = dice.normal(4, H, D) * D**-0.5
        table = torch.stack([dice.order(PAGES, torch.int32).repeat(2)[:70] for _ in range(4)])
        states, tickets = backend.workspace(len(table), table.shape[1], device)
        sinks = [None, dice.normal(H)] if model.attention.scores.sinks else [None]
        for window, extra in itertools.product(windows_of(model, 1000), sinks):
            options = window, model.attention.scores.softcap, extra
            out = torch.full((4, H * D), 7.0, dtype=dtype, device=device)
            want = torch.empty(4, H * D, device=device)
            backend.references.attend(q, wide, table, lengths, want, *options)
            # padding is left alone; with q8_0 it comes out turned, as zeros
            want[2] = 0.0 if kind == "q8_0" else 7.0
            backend.attend(q, cache, table, lengths, states, tickets, out, *options)
            if fault := differs(out, want, "the output"):
                return f"{fault} ({kind}, window {window}{'' if extra is None else ', sinks'})"
            if int(tickets.abs().max()):
                return "its tickets are not zero afterwards"
    return ""


def prove_prompts(backend: CudaBackend, device: torch.device) -> str:
    """A prompt's first chunk and a later one, through every window of the model, with its sinks and without.

    The reference computes each token as a decode row."""
    if backend.latents:
        return prove_latent_prompts(backend, device)
    model = backend.model
    dice = Dice(device, 6)
    H = model.attention.heads
    D = model.attention.head_size
    size = PAGE_SIZE
    batch = Batch([], [], [0, 70, 90], [70, 301], [], [])
    spans = [[0, 70], [281, 301]]                              # positions of the new tokens
    for dtype in DTYPES:
        cache = cache_of(model, dice, dtype)
        q = (dice.normal(90, H, D) * D**-0.5).to(dtype)
        table = torch.stack([dice.order(PAGES, torch.int32)[:19] for _ in spans])
        sinks = [None, dice.normal(H)] if model.attention.scores.sinks else [None]
        for window, extra in itertools.product(windows_of(model, 100), sinks):
            grouped = None if extra is None else extra.view(model.attention.kv_heads, -1)
            for number, prompt in enumerate(prompts_of(batch, 0, table, window, size)):
                rows = q[prompt.rows]
                lengths = torch.arange(*spans[number], device=device) + 1
                got = torch.empty(len(rows), H * D, dtype=dtype, device=device)
                want = torch.empty(len(rows), H * D, device=device)
                backend.references.attend(rows.float(), cache.float(), table[number].expand(len(rows), -1),
                                          lengths, want, window, model.attention.scores.softcap, extra)
                kv = cache.transpose(1, 2)[:, :,
                                           prompt.pages.long()].flatten(2,
                                                                        3)[:, :, :prompt.end - prompt.first]
                backend.prompts.attend(rows, kv, prompt, got, window, model.attention.scores.softcap, grouped)
                if fault := differs(got, want, "the output"):
                    return f"{fault} ({str(dtype)[6:]}, window {window}{'' if extra is None else ', sinks'})"
    return ""


def prove_sample(backend: CudaBackend, device: torch.device) -> str:
    """Greedy, filtered, unfiltered and penalized rows. Tokens must be equal."""
    columns = min(backend.model.vocab_size, VOCABULARY)
    context = list(range(0, columns, 7))
    cases: tuple[dict[str, Any], ...] = (dict(temperature=0.0), dict(top_k=50), dict(top_k=0, top_p=0.9),
                                         dict(top_k=0), dict(top_k=0, min_p=0.05),
                                         dict(repetition_penalty=1.3, frequency_penalty=0.2,
                                              logit_bias=((0, 3.0), )))
    rows = [SampleRow(SamplingParams(seed=i, **params), 10 + i, context, columns // 14)
            for i, params in enumerate(cases)]
    logits = Dice(device, 3).normal(len(rows), columns) * 3
    got = backend.sample(logits, rows)
    want = REFERENCES["sample"](logits, rows)
    return "" if got == want else f"draws the tokens {got}, not {want}"


def matrices(dice: Dice, N: int, K: int,
             kinds: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """(kind, matrix as `linear` takes it, the same in float32) for each kind, except those that need a
    missing gguf package."""
    for kind in kinds:
        if kind in cuda.FLOATS:
            floats = dice.normal(N, K, dtype=getattr(torch, kind)) / 32
            yield kind, floats, floats.float()
            continue
        blocks = torch.from_numpy(random_blocks(kind, N, K))
        # without the package no file of this type can be read either
        with contextlib.suppress(ImportError):
            wide = dequantized(kind, blocks)
            yield kind, PackedMatrix([(kind, blocks.to(dice.device))], K), wide.to(dice.device)


def prove_linear(backend: CudaBackend, device: torch.device) -> str:
    """Weights of every type: their values bit for bit, as rows of an embedding, and products of few and of
    many rows of x.

    Then all that comes before and after a product, with a norm over more columns than W has."""
    dice = Dice(device, 4)
    N = 20
    K = 512
    ids = torch.tensor([3, -1, 19], device=device)
    linear = REFERENCES["linear"]
    for kind, matrix, want in matrices(dice, N, K, (*cuda.BLOCKS, *cuda.FLOATS)):
        if kind in cuda.BLOCKS:
            rows = torch.empty(3, K, device=device)
            backend.products.embed(matrix, ids, rows)
            if not torch.equal(rows, want[ids.clamp(min=0)]):
                return f"{kind}: weights differ from the reference's"
        for count in (1, 2, 3, cuda.MAX_PRODUCT_ROWS, cuda.MAX_PRODUCT_ROWS + 1):
            x = dice.normal(count, K)
            got = torch.empty(count, N, device=device)
            backend.products.linear(x, matrix, got)
            # many rows are multiplied in bfloat16
            many = 2e-2 if count > cuda.MAX_PRODUCT_ROWS else 0.0
            if fault := differs(got, x @ want.T, f"{kind}: the product of {count} rows", many):
                return fault
    for kind, matrix, want in matrices(dice, N, K, ("bfloat16", "float32", "q4_0")):
        for dtype, activation in itertools.product(DTYPES, cuda.ACTIVATIONS):
            outputs = N // 2 if cuda.GATES.get(activation) else N
            x = dice.normal(3, K + 64, dtype=dtype)
            bias = dice.normal(N)
            residual = dice.normal(3, outputs)
            norm = Norm(1 + dice.normal(K + 64) / 4 if kind == "float32" else None, 1e-5)
            got = torch.empty(3, outputs, device=device, dtype=dtype)
            expected = torch.empty(3, outputs, device=device)
            backend.products.linear(x, matrix, got, norm, bias, activation, residual)
            linear(x.float(), want, expected, norm, bias, activation, residual)
            if fault := differs(got, expected, f"{kind}: {activation or 'no activation'}"):
                return f"{fault} ({str(dtype)[6:]})"
    return ""


def prove_experts(backend: CudaBackend, device: torch.device) -> str:
    """Gates and ups of every type, with downs as floats, for few pairs an expert and for many (of mxfp4 more
    than an item holds)."""
    model = backend.model
    dice = Dice(device, 5)
    if not model.experts:
        return ""
    E = 5
    C = 256
    F = 16
    biases = (dice.normal(2 * E * F), dice.normal(E * C))
    norm = 1 + dice.normal(C) / 4
    for kind in (*cuda.FLOATS, *cuda.BLOCKS):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        gate_up = dice.normal(2 * E * F, C, dtype=dtype)
        down = dice.normal(E * C, F, dtype=dtype)
        wide = gate_up.float()
        if kind in cuda.BLOCKS:
            blocks = torch.from_numpy(random_blocks(kind, 2 * E * F, C))
            try:
                wide = dequantized(kind, blocks).to(device)
            except ImportError:         # as in prove_linear
                continue
            gate_up = PackedMatrix([(kind, blocks.to(device))], C)
        many = 80 if kind == "mxfp4" else 11
        for rows, activation, sum_to_one in ((3, "swiglu", False), (many, "clamped_swiglu", True)):
            x = dice.normal(rows, C)
            logits = (2 * dice.normal(rows, E)).round()     # some are equal
            logits[:, 3] += 4
            # the norm makes gates and ups about 1: of larger ones a gate could magnify the errors
            options: dict[str, Any] = dict(norm=Norm(norm / (C**0.5 * wide.std()), 1e-5), biases=biases,
                           activation=activation, chosen=2, sum_to_one=sum_to_one)
            got = torch.empty_like(x)
            want = torch.empty_like(x)
            REFERENCES["experts"](x, logits, wide, down.float(), want, **options)
            backend.mixture.experts(x, logits, gate_up, down, got, **options)
            if fault := differs(got, want, f"{kind}: {rows} rows", 1e-3 if rows == 3 else 2e-2):
                return fault
    return ""


def prove_adapters(backend: CudaBackend, device: torch.device) -> str:
    """Rows with two adapters, with one that does not change the matrix, and with none, in every type, with a
    norm before."""
    dice = Dice(device, 7)
    N = 20
    K = 96
    B = 5
    for kind, dtype in itertools.product((torch.float32, torch.float16, torch.bfloat16), DTYPES):
        matrices = {}
        for slot, (name, rank) in enumerate([("proof", 3), ("proof", 70), ("other", 2)], 1):
            matrices[slot] = name, AdapterMatrix(
                dice.normal(rank, K, dtype=kind), dice.normal(N, rank, dtype=kind), dice.normal(rank))
        packs = {
            slot: backend.adapters.pack({name: matrix}, device) for slot, (name, matrix) in matrices.items()
        }
        owners = [2, 0, 1, 3, 2]
        tables = {slot: packed.table.data_ptr() for slot, packed in packs.items() if packed.table is not None}
        rows = torch.tensor([tables[slot] if slot else 0 for slot in owners], device=device)
        x = dice.normal(B, K + 32, dtype=dtype)
        y = dice.normal(B, N)
        norm = Norm(1 + dice.normal(K + 32) / 4, 1e-5)
        want = copied(y)
        for row, slot in enumerate(owners):
            name, matrix = matrices.get(slot, ("", None))
            if name == "proof":
                normed = torch.nn.functional.rms_norm(x[row].float(), (K + 32,), norm.weight, norm.eps)
                want[row] += matrix.b.float() @ (matrix.scales * (matrix.a.float() @ normed[:K]))
        activation = "swiglu" if dtype == torch.float32 else None
        residual = dice.normal(B, N)
        out = torch.empty(B, N, device=device)
        if activation:                  # its gates make half as many columns
            residual = residual[:, :N // 2]
            out = out[:, :N // 2]
        expected = torch.empty_like(out)
        finish_linear(want, expected, activation, residual)
        backend.adapters.finish(x, norm, y, RowsOfMatrix(backend.adapters.numbers["proof"], rows), out,
                                activation, residual)
        if fault := differs(out, expected, "what is added"):
            return f"{fault} ({str(kind)[6:]})"
    return ""


# --- latent attention
# ------------------------------------------------------------------------------------------------


def latent_pages(backend: CudaBackend, dice: Dice, dtype: torch.dtype) -> torch.Tensor:
    assert backend.latents
    return dice.normal(PAGES, PAGE_SIZE, backend.latents.attn.head_size, dtype=dtype)


def tables_of(backend: CudaBackend, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 64 positions."""
    cos, sin = rope_tables(dataclasses.replace(backend.model, max_positions=64), device)
    return cos, sin


def prove_append_latents(backend: CudaBackend, device: torch.device) -> str:
    """Rows with padding between them, in every type of activations and pages."""
    if not backend.latents:
        return ""
    latents = backend.latents
    assert latents
    attn = latents.attn
    dice = Dice(device, 8)
    places = *tables_of(backend, device), torch.tensor([0, 63, 7, 0],
                                                       device=device), torch.tensor([17, 3, -1, 250],
                                                                                    device=device)
    weight = 1 + dice.normal(attn.value_size) / 4
    for kind, dtype in itertools.product(DTYPES, DTYPES):
        x = dice.normal(4, attn.head_size, dtype=kind)
        cache = latent_pages(backend, dice, dtype)
        want = copied(cache)
        latents.references.append_latents(copied(x), weight, 1e-6, *places, want, attn.adjacent)
        latents.append_latents(x, weight, 1e-6, *places, cache, attn.adjacent)
        if fault := differs(cache, want, "the cache"):
            return f"{fault} ({str(kind)[6:]} in {str(dtype)[6:]})"
    return ""


def head_products(backend: CudaBackend, dice: Dice, heads: int, outputs: int,
                  columns: int) -> Iterator[tuple[str, Any, torch.Tensor, int]]:
    """(kind, heads' matrices of every type that has such columns, the same in float32, a number of rows of
    x), few rows and many."""
    kinds = [kind for kind, (block, _) in (cuda.BLOCKS | cuda.FLOATS).items() if columns % block == 0]
    for kind, matrix, wide in matrices(dice, heads * outputs, columns, kinds):
        for rows in (1, 9, *([FEW_ROWS + 1] if kind in ("bfloat16", "q8_0") else [])):
            yield kind, matrix, wide, rows


def prove_by_head(backend: CudaBackend, device: torch.device) -> str:
    """Values of heads, of the model's columns."""
    if not backend.latents:
        return ""
    latents = backend.latents
    assert latents
    attn = latents.attn
    dice = Dice(device, 9)
    H = 3
    N = min(attn.head_values, 40)
    for kind, matrix, wide, rows in head_products(backend, dice, H, N, attn.value_size):
        x = dice.normal(rows, H * attn.value_size)
        got = torch.empty(rows, H * N, device=device)
        want = torch.empty_like(got)
        latents.by_head(x, matrix, got)
        REFERENCES["by_head"](x, wide, want)
        if fault := differs(got, want, f"{kind}: the product of {rows} rows",
                            2e-2 if rows > FEW_ROWS else 0.0):
            return fault
    return ""


def prove_absorb(backend: CudaBackend, device: torch.device) -> str:
    """Queries, of the model's columns, with what turns."""
    if not backend.latents:
        return ""
    latents = backend.latents
    assert latents
    attn = latents.attn
    dice = Dice(device, 10)
    H = 2
    kept = attn.value_size
    cos, sin = tables_of(backend, device)
    for kind, matrix, wide, rows in head_products(backend, dice, H, kept, attn.plain):
        x = dice.normal(rows, H * (attn.plain + attn.turned))
        positions = torch.arange(rows, device=device) % 64
        cache = torch.empty(1, PAGE_SIZE, attn.head_size, device=device)
        got = torch.empty(rows, H * attn.head_size, device=device)
        want = torch.empty_like(got)
        latents.absorb(x, matrix, cos, sin, positions, 1.5, cache, got, attn.adjacent)
        latents.references.absorb(x, wide, cos, sin, positions, 1.5, cache, want, attn.adjacent)
        if fault := differs(got, want, f"{kind}: {rows} queries", 2e-2 if rows > FEW_ROWS else 0.0):
            return fault
    return ""


def prove_latent_attention(backend: CudaBackend, device: torch.device) -> str:
    """Rows of one key, of several merges, and padding, over pages of floats."""
    latents = backend.latents
    assert latents
    attn = latents.attn
    dice = Dice(device, 2)
    lengths = torch.tensor([1, 1100, 0, 33], dtype=torch.int32, device=device)
    for dtype in DTYPES:
        cache = latent_pages(backend, dice, dtype)
        q = dice.normal(4, attn.heads, attn.head_size) * attn.head_size**-0.5
        table = torch.stack([dice.order(PAGES, torch.int32).repeat(2)[:70] for _ in range(4)])
        states, tickets = backend.workspace(len(table), table.shape[1], device)
        out = torch.full((4, attn.heads * attn.value_size), 7.0, dtype=dtype, device=device)
        want = torch.empty(out.shape, device=device)
        latents.references.attend(q, copied(cache), table, lengths, want)
        want[2] = 7.0                           # padding is left alone
        latents.attend(q, cache, table, lengths, states, tickets, out)
        if fault := differs(out, want, "the output"):
            return f"{fault} ({str(dtype)[6:]})"
        if int(tickets.abs().max()):
            return "its tickets are not zero afterwards"
    return ""


def prove_latent_prompts(backend: CudaBackend, device: torch.device) -> str:
    """A prompt's first chunk and a later one. The reference computes each token as a decode row."""
    latents = backend.latents
    assert latents
    attn = latents.attn
    dice = Dice(device, 6)
    batch = Batch([], [], [0, 40, 60], [40, 301], [], [])
    spans = [[0, 40], [281, 301]]                              # positions of the new tokens
    for dtype in DTYPES:
        cache = latent_pages(backend, dice, dtype)
        q = (dice.normal(60, attn.heads, attn.head_size) * attn.head_size**-0.5).to(dtype)
        table = torch.stack([dice.order(PAGES, torch.int32)[:19] for _ in spans])
        for number, prompt in enumerate(prompts_of(batch, 0, table, 0, PAGE_SIZE)):
            rows = q[prompt.rows]
            lengths = torch.arange(*spans[number], device=device) + 1
            got = torch.empty(len(rows), attn.heads * attn.value_size, dtype=dtype, device=device)
            want = torch.empty(got.shape, device=device)
            latents.references.attend(rows.float(), cache.float(),
                                              table[number].expand(len(rows), -1), lengths, want)
            keys = cache[prompt.pages.long()].flatten(0, 1)[:prompt.end - prompt.first]
            latents.attend_prompt(rows, keys, prompt, got)
            if fault := differs(got, want, "the output"):
                return f"{fault} ({str(dtype)[6:]})"
    return ""


CUDA_PROOFS = {
    "linear": prove_linear,
    "adapters": prove_adapters,
    "experts": prove_experts,
    "rope_append": prove_rope_append,
    "append_latents": prove_append_latents,
    "absorb": prove_absorb,
    "by_head": prove_by_head,
    "paged_attention": prove_attention,
    "prompt_attention": prove_prompts,
    "sample": prove_sample}
