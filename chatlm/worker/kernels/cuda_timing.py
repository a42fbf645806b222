"""How fast each op of a GPU is, for `check`. CUDA graphs of many calls are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TYPE_CHECKING

import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.arrays.kinds import Norm
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.cuda_prompts import Prompt
from chatlm.worker.kernels.cuda_weights import PackedMatrix
from chatlm.worker.kernels.plain_model import plain_model
from chatlm.worker.kernels.proof import Dice
from chatlm.worker.kernels.random_blocks import random_blocks
from chatlm.worker.kernels.sampling import SampleBatch
from chatlm.worker.kernels.timing import CONTEXT, LARGE, Timed, best
from chatlm.worker.model.blocks.mla import Mla
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.tensors import rope_tables

if TYPE_CHECKING:
    from chatlm.worker.kernels.cuda_backend import CudaBackend
    from chatlm.worker.kernels.cuda_runner import CudaQueue
    from chatlm.worker.model.blocks.model import Model

MIXTURE: dict[str, Any] = dict(experts=32, experts_per_token=4, sinks=True)     # as gpt-oss-20b has
# as GLM-4.7-Flash has
LATENTS = dict(heads=20, kept=512, turned=64, plain=192, head_values=256, query_width=768)


def latent_model(heads: int, kept: int, turned: int, plain: int, head_values: int,
                 query_width: int) -> Model:
    """A model with latent attention of these sizes, as `plain_model` makes others."""
    model = plain_model(**LARGE)
    attn = Mla(heads, kept, plain, turned, head_values, RmsNorm(1e-5), Rope(turned), query_width,
               adjacent=True)
    return dataclasses.replace(model, layers=tuple(
        dataclasses.replace(layer, mixer=attn) for layer in model.layers))


def copy_bandwidth(queue: CudaQueue, size: int) -> float:
    """Bytes per second that a copy on the device reads and writes, together."""
    source = torch.ones(size, dtype=torch.uint8, device=queue.device)
    target = torch.empty_like(source)
    return 2 * size / replayed(queue, lambda: target.copy_(source))


def replayed(queue: CudaQueue, work: Callable[[], Any]) -> float:
    """Seconds that a graph of `work` takes."""
    replay = queue.capture(work)
    return best(lambda: queue.wait(queue.submit(replay)))


def time_cuda(backend: CudaBackend, queue: CudaQueue, ops: Iterable[str], cold: int = 1 << 30,
              calls: int = 100, batches: tuple[int, ...] = (1, 32)) -> Iterator[Timed]:
    """Time each kernel in a graph of many calls. Pages come from memory, logits from the L2 cache."""
    product_rows = (batches[0], cuda.MAX_PRODUCT_ROWS) if "linear" in ops else ()
    for rows in product_rows:
        for kind in ("bfloat16", *cuda.BLOCKS):
            work, what, calls_, moved = time_cuda_linear(backend, queue.device, rows, cold, calls, kind)
            yield Timed("linear", f"{kind}: {what}", replayed(queue, work) / calls_, moved)
    expert_rows = (*batches, 16 * batches[-1]) if "experts" in ops else ()
    for rows in expert_rows:
        work, what, calls_, moved = time_cuda_experts(backend, queue.device, rows, calls)
        yield Timed("experts", what, replayed(queue, work) / calls_, moved)
    timers = {"paged_attention": time_cuda_attention, "rope_append": time_cuda_rope,
              "sample": time_cuda_sample}
    if backend.latents:
        timers = {"append_latents": time_append_latents, "absorb": time_absorb, "by_head": time_by_head,
                  "paged_attention": time_latent_attention}
    elif "prompt_attention" in ops:
        work, what, moved = time_cuda_prompt(backend, queue.device)
        yield Timed("prompt_attention", what, replayed(queue, work), moved)
    for rows in batches:
        for op in timers.keys() & {*ops}:
            work, what, calls_, moved = timers[op](backend, queue.device, rows, cold, calls)
            yield Timed(op, what, replayed(queue, work) / calls_, moved)


def cuda_layers(backend: CudaBackend, device: torch.device, rows: int, cold: int, calls: int) -> torch.Tensor:
    """Pages for this many rows of CONTEXT keys, of so many layers that no cache holds them all."""
    model = backend.model
    size = PAGE_SIZE
    shape = 2, rows * CONTEXT // size, model.attention.kv_heads, size, model.attention.head_size
    numbers = model.attention.kv_heads * model.attention.head_size
    layers = min(calls, max(1, cold // (4 * rows * CONTEXT * numbers)))
    return torch.full((layers, *shape), 0.01, dtype=torch.bfloat16, device=device)


def time_cuda_attention(backend: CudaBackend, device: torch.device, rows: int, cold: int,
                        calls: int) -> tuple:
    """(the work of a graph, in words what it is, how many calls it has, bytes that a call moves); so do the
    functions below."""
    model = backend.model
    dice = Dice(device, 9)
    cache = cuda_layers(backend, device, rows, cold, calls)
    H = model.attention.heads
    Hkv = model.attention.kv_heads
    D = model.attention.head_size
    width = CONTEXT // PAGE_SIZE
    q = dice.normal(rows, H, D)
    out = torch.empty(rows, H * D, dtype=cache.dtype, device=device)
    table = dice.order(rows * width, torch.int32).view(rows, width)
    lengths = torch.full((rows,), CONTEXT, dtype=torch.int32, device=device)
    workspace = backend.workspace(rows, width, device)
    return (lambda: [backend.attend(q, layer, table, lengths, *workspace, out, 0) for layer in cache],
            f"{rows} x {CONTEXT} keys, {H}/{Hkv} heads of {D}", len(cache), 4 * rows * CONTEXT * Hkv * D)


def time_cuda_prompt(backend: CudaBackend, device: torch.device) -> tuple:
    """A prompt without a prefix. Arithmetic bounds long prompts, not the bytes that are counted here."""
    model = backend.model
    dice = Dice(device, 9)
    H = model.attention.heads
    Hkv = model.attention.kv_heads
    D = model.attention.head_size
    half = torch.bfloat16
    q = dice.normal(CONTEXT, H, D, dtype=half)
    kv = dice.normal(2, Hkv, CONTEXT, D, dtype=half)
    prompt = Prompt(slice(0, CONTEXT), None, 0, 0, CONTEXT)
    out = torch.empty(CONTEXT, H * D, dtype=half, device=device)
    return (lambda: backend.prompts.attend(q, kv, prompt, out, 0),
            f"{CONTEXT} tokens, {H}/{Hkv} heads of {D}", 2 * q.nbytes + kv.nbytes)


def latent_layers(backend: CudaBackend, device: torch.device, rows: int, cold: int,
                  calls: int) -> torch.Tensor:
    """Pages of latents for this many rows of CONTEXT keys, of so many layers that no cache holds them all."""
    assert backend.latents
    D = backend.latents.attn.head_size
    size = PAGE_SIZE
    layers = min(calls, max(1, cold // (2 * rows * CONTEXT * D)))
    return torch.full((layers, rows * CONTEXT // size, size, D), 0.01, dtype=torch.bfloat16, device=device)


def time_latent_attention(backend: CudaBackend, device: torch.device, rows: int, cold: int,
                          calls: int) -> tuple:
    latents = backend.latents
    assert latents
    attn = latents.attn
    dice = Dice(device, 9)
    cache = latent_layers(backend, device, rows, cold, calls)
    width = CONTEXT // PAGE_SIZE
    q = dice.normal(rows, attn.heads, attn.head_size)
    out = torch.empty(rows, attn.heads * attn.value_size, device=device)
    table = dice.order(rows * width, torch.int32).view(rows, width)
    lengths = torch.full((rows,), CONTEXT, dtype=torch.int32, device=device)
    workspace = backend.workspace(rows, width, device)
    return (lambda: [latents.attend(q, layer, table, lengths, *workspace, out)
                     for layer in cache], f"{rows} x {CONTEXT} keys, {attn.heads} heads of {attn.head_size}",
            len(cache), 2 * rows * CONTEXT * attn.head_size)


def time_append_latents(backend: CudaBackend, device: torch.device, rows: int, cold: int,
                        calls: int) -> tuple:
    latents = backend.latents
    assert latents
    attn = latents.attn
    cache = latent_layers(backend, device, rows, cold, calls)
    cos, sin = rope_tables(backend.model, device)
    x = Dice(device, 9).normal(rows, attn.head_size)
    weight = torch.ones(attn.value_size, device=device)
    positions = torch.arange(rows, device=device)
    return (lambda: [
        latents.append_latents(x, weight, 1e-6, cos, sin, positions, positions, layer)
        for layer in cache
    ], f"{rows} rows of {attn.head_size}", len(cache), x.nbytes + 2 * rows * attn.head_size)


def head_copies(heads: int, outputs: int, columns: int, device: torch.device, cold: int,
                calls: int) -> list[torch.Tensor]:
    """So many matrices of heads in bfloat16 that no cache holds them all."""
    matrix = Dice(device, 9).normal(heads * outputs, columns, dtype=torch.bfloat16)
    return [matrix.clone() for _ in range(min(calls, -(-cold // matrix.nbytes)))]


def time_absorb(backend: CudaBackend, device: torch.device, rows: int, cold: int, calls: int) -> tuple:
    latents = backend.latents
    assert latents
    attn = latents.attn
    copies = head_copies(attn.heads, attn.value_size, attn.plain, device, cold, calls)
    cos, sin = rope_tables(backend.model, device)
    x = Dice(device, 9).normal(rows, attn.heads * (attn.plain + attn.turned))
    cache = latent_layers(backend, device, 1, 0, 1)[0]
    out = torch.empty(rows, attn.heads * attn.head_size, device=device)
    positions = torch.arange(rows, device=device)
    return (lambda: [
        latents.absorb(x, matrix, cos, sin, positions, 1.0, cache, out, attn.adjacent)
        for matrix in copies
    ], f"bfloat16: {rows} x {attn.heads} x {attn.plain} -> {attn.value_size}", len(copies), copies[0].nbytes)


def time_by_head(backend: CudaBackend, device: torch.device, rows: int, cold: int, calls: int) -> tuple:
    latents = backend.latents
    assert latents
    attn = latents.attn
    copies = head_copies(attn.heads, attn.head_values, attn.value_size, device, cold, calls)
    x = Dice(device, 9).normal(rows, attn.heads * attn.value_size)
    out = torch.empty(rows, attn.heads * attn.head_values, device=device)
    return (lambda: [latents.by_head(x, matrix, out) for matrix in copies],
            f"bfloat16: {rows} x {attn.heads} x {attn.value_size} -> {attn.head_values}", len(copies),
            copies[0].nbytes)


def time_cuda_linear(backend: CudaBackend, device: torch.device, rows: int, cold: int, calls: int,
                     kind: str) -> tuple:
    width = max(256, backend.model.width // 256 * 256)
    outputs = min(8192, 2 * backend.model.feed_width)
    few = 128
    if kind in cuda.FLOATS:
        part = Dice(device, 9).normal(few, width, dtype=getattr(torch, kind))
    else:
        part = torch.from_numpy(random_blocks(kind, few, width)).to(device)
    blocks = part.repeat(-(-outputs // few), 1)[:outputs]
    count = min(calls, -(-cold // blocks.nbytes))
    copies = [
        blocks.clone() if kind in cuda.FLOATS else PackedMatrix([(kind, blocks.clone())], width)
        for _ in range(count)
    ]
    x = Dice(device, 9).normal(rows, width)
    out = torch.empty(rows, outputs, device=device)
    return (lambda: [backend.products.linear(x, matrix, out) for matrix in copies],
            f"{rows} x {width} -> {outputs}", count, blocks.nbytes)


def time_cuda_experts(backend: CudaBackend, device: torch.device, rows: int, calls: int) -> tuple:
    """A layer whose experts take turns, so that no cache holds them all. An expert is a quarter as wide as
    the dense part."""
    model = backend.model
    dice = Dice(device, 9)
    few = 32
    experts = model.experts
    assert experts is not None
    E = experts.count
    chosen = experts.router.chosen
    C = model.width
    F = model.feed_width // 4 // 32 * 32 or 32
    matrices = [
        PackedMatrix([("mxfp4", torch.from_numpy(random_blocks("mxfp4", few, columns)).to(device).repeat(
            outputs // few, 1))], columns) for outputs, columns in ((2 * E * F, C), (E * C, F))
    ]
    x = dice.normal(rows, C)
    out = torch.empty(rows, C, device=device)
    norm = Norm(None, 1e-5)
    experts = torch.arange(rows * chosen, device=device).view(rows, chosen)
    logits = [
        torch.zeros(rows, E, device=device).scatter_(1, (experts + call * rows * chosen) % E, 1.0)
        for call in range(calls)
    ]
    more: dict[str, Any] = dict(norm=norm, biases=(None, None), activation="swiglu", chosen=chosen,
                                sum_to_one=True)
    gate_up, down = matrices
    moved = min(E, rows * chosen) * sum(matrix.nbytes for matrix in matrices) // E
    return (lambda: [backend.mixture.experts(x, one, gate_up, down, out, **more) for one in logits],
            f"mxfp4: {rows} x {chosen} of {E}, {C} x {F}", calls, moved)


def time_cuda_rope(backend: CudaBackend, device: torch.device, rows: int, cold: int, calls: int) -> tuple:
    model = backend.model
    cache = cuda_layers(backend, device, rows, cold, calls)
    H = model.attention.heads
    Hkv = model.attention.kv_heads
    D = model.attention.head_size
    cos, sin = rope_tables(model, device)
    qkv = Dice(device, 9).normal(rows, (H + 2 * Hkv) * D, dtype=cache.dtype)
    q = torch.empty(rows, H * D, device=device)
    positions = torch.arange(rows, device=device)
    return (lambda: [backend.rope_append(qkv, cos, sin, positions, positions, layer, q) for layer in cache],
            f"{rows} rows, {H}/{Hkv} heads of {D}", len(cache), qkv.nbytes + q.nbytes + 4 * rows * Hkv * D)


def time_cuda_sample(backend: CudaBackend, device: torch.device, rows: int, cold: int, calls: int) -> tuple:
    V = backend.model.vocab_size
    logits = Dice(device, 9).normal(rows, V)
    drawn = [SampleRow(SamplingParams(seed=i, top_k=50), 1) for i in range(rows)]
    draw = backend.drawing(logits, SampleBatch(drawn, V))
    return lambda: [draw() for _ in range(calls)], f"{rows} rows of {V}, top-k 50", calls, logits.nbytes
