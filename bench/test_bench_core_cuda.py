"""decode_core's CUDA ops: `pytest bench/test_bench_core_cuda.py --benchmark-enable`. Skipped without a GPU.

Each run replays one graph of many calls and waits for it, so a launch costs what it costs in a decode step.
extra_info: us_per_call; GB_per_s, of the bytes that an op must move; copy_share, that over the bandwidth of
copying 1 GiB on the same device (bytes read and written). Attention and rope_append walk through 1 GiB of
layers, so that no cache holds what they read; logits are in the L2 cache, where the head has just written
them. `torch`: topk + softmax + multinomial on the same logits.
"""

import os
import sys
import time
from pathlib import Path

import numpy
import pytest

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from chatlm.common.messages.requests import SamplingParams    # noqa: E402

from chatlm.worker.arrays.kinds import Norm    # noqa: E402
from chatlm.worker.ops.rows import SampleRow    # noqa: E402

core = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels import cuda_experts, cuda_runner, devices  # noqa: E402
from chatlm.worker.kernels.cuda_weights import PackedMatrix  # noqa: E402

H, Hkv, D, PAGE, BF16 = 32, 8, 128, 16, torch.bfloat16         # Llama 8B's attention
SETTINGS = {"greedy": dict(temperature=0.0), "top_k": dict(top_k=50), "top_k_top_p": dict(top_k=40, top_p=0.95),
            "top_p": dict(top_k=0, top_p=0.95), "min_p": dict(top_k=0, min_p=0.05), "unfiltered": dict(top_k=0),
            "penalties": dict(top_k=50, repetition_penalty=1.1)}


@pytest.fixture(scope="module")
def ops():
    found = devices.cuda_ops()
    if found is None or not torch.cuda.is_available():
        pytest.skip("no GPU here, or decode_core was compiled without CUDA")
    return found


def captured(work):
    """`work` as one graph; calling it also waits for it."""
    queue = cuda_runner.CudaQueue(torch.device("cuda"))
    replay = queue.capture(work)

    def run():
        replay()
        torch.cuda.synchronize()
    return run


@pytest.fixture(scope="module")
def copy_bandwidth(ops):
    """Bytes per second, read and written, of copying 1 GiB; the best of 10."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    run = captured(lambda: target.copy_(source))
    for _ in range(10):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 2 * source.nbytes / min(times)


def measure(benchmark, work, calls, bytes_per_call, copy_bandwidth):
    benchmark.pedantic(captured(work), rounds=20, warmup_rounds=3)
    if benchmark.stats:
        seconds = benchmark.stats.stats.median / calls
        benchmark.extra_info |= {"us_per_call": round(seconds * 1e6, 2), "GB_per_s": round(bytes_per_call / seconds / 1e9, 1),
                                 "copy_share": round(bytes_per_call / seconds / copy_bandwidth, 3)}


def stream():
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("V, B", [(V, B) for V in (32768, 49152, 151936) for B in (1, 8, 32)])
@pytest.mark.parametrize("setting", [*SETTINGS, "torch"])
def test_sample(benchmark, ops, copy_bandwidth, setting, V, B):
    benchmark.group = f"CUDA: sample V={V} B={B}"
    logits = torch.randn(B, V, device="cuda", generator=torch.Generator("cuda").manual_seed(V + B)) * 3
    tokens, calls = torch.empty(B, dtype=torch.int32, device="cuda"), 100
    if setting == "torch":
        def draw():
            values, ids = torch.topk(logits, 50)
            ids.gather(1, torch.multinomial(torch.softmax(values / 0.8, dim=-1), 1))
    else:
        context = list(range(0, 3000, 3))
        batch = core.SampleBatch([SampleRow(SamplingParams(seed=i, **SETTINGS[setting]), 1000 + i, context, 500)
                                  for i in range(B)], V)
        records, *lists = (torch.tensor(array, device="cuda") for array in (
            batch.records.view(numpy.uint8), batch.count_ids, batch.counts, batch.bias_ids, batch.bias_values))
        names = ("count_ids", "counts", "bias_ids", "bias_values")

        def draw():
            ops.sample(logits, records, tokens, stream=stream(), **dict(zip(names, lists)))

    measure(benchmark, lambda: [draw() for _ in range(calls)], calls, logits.nbytes, copy_bandwidth)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", list(core.cuda.BLOCKS))
def test_multiply(benchmark, ops, copy_bandwidth, kind, rows, outputs=8192, columns=4096):
    """Packed weights, in enough copies to fill 1 GiB."""
    benchmark.group = f"CUDA: multiply {outputs} x {columns}, {rows} rows"
    block, size = core.cuda.BLOCKS[kind]
    count = (1 << 30) // (outputs * columns // block * size)
    weights = torch.full((count, outputs, columns // block * size), 0x22, dtype=torch.uint8, device="cuda")
    x, out = torch.randn(rows, columns, device="cuda"), torch.empty(rows, outputs, device="cuda")

    def multiply():
        for blocks in weights:
            ops.multiply(x, blocks, out, kind=kind, stream=stream())

    measure(benchmark, multiply, count, weights[0].nbytes, copy_bandwidth)


@pytest.mark.parametrize("rows", [1, 8, 32, 512])
@pytest.mark.parametrize("name, kind, E, chosen, C, F", [("gpt-oss-20b", "mxfp4", 32, 4, 2880, 2880), ("Qwen3-30B-A3B", "q4_k", 128, 8, 2048, 768)])
def test_experts(benchmark, ops, copy_bandwidth, name, kind, E, chosen, C, F, rows):
    """Different experts in every call, together larger than the L2 cache; GB_per_s counts each chosen one once."""
    benchmark.group = f"CUDA: experts of {name}, {rows} rows"
    block, size = core.cuda.BLOCKS[kind]
    gate_up, down = (PackedMatrix([(kind, torch.full((n, k // block * size), 0x22, dtype=torch.uint8, device="cuda"))], k)
                     for n, k in ((2 * E * F, C), (E * C, F)))
    experts = cuda_experts.ExpertOps(ops, stream).experts
    x, out, calls = torch.randn(rows, C, device="cuda"), torch.empty(rows, C, device="cuda"), E // chosen
    positions = torch.arange(rows * chosen, device="cuda").view(rows, chosen)
    logits = [torch.zeros(rows, E, device="cuda").scatter_(1, (positions + call * rows * chosen) % E, 1.0) for call in range(calls)]
    more = dict(norm=Norm(None, 1e-5), biases=(None, None), activation="swiglu", chosen=chosen, sum_to_one=True)
    read = (gate_up.nbytes + down.nbytes) * min(E, rows * chosen) // E
    measure(benchmark, lambda: [experts(x, each, gate_up, down, out, **more) for each in logits], calls, read, copy_bandwidth)


def layers_of(pages):
    """1 GiB of layers of K and V (2, P, Hkv, PAGE, D), at least one."""
    layer = 2 * pages * Hkv * PAGE * D
    return torch.full((max(1, (1 << 29) // layer), 2, pages, Hkv, PAGE, D), 0.01, dtype=BF16, device="cuda")


@pytest.mark.parametrize("rows", [1, 8, 32, 64, 256])
def test_rope_append(benchmark, ops, copy_bandwidth, rows):
    benchmark.group = f"CUDA: rope_append, {rows} rows"
    cache = layers_of(rows)
    qkv = torch.randn(rows, (H + 2 * Hkv) * D, device="cuda").to(BF16)
    tables = [torch.ones(4096, D // 2, device="cuda"), torch.zeros(4096, D // 2, device="cuda")]
    positions, slots = torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda") * PAGE + 3
    q = torch.empty(rows, H, D, device="cuda")
    calls = min(len(cache), 200)

    def append():
        for layer in cache[:calls]:
            ops.rope_append(qkv, *tables, positions, slots, *layer, q, stream=stream())

    moved = qkv.nbytes + q.nbytes + rows * 2 * Hkv * D * 2 + rows * D * 4
    measure(benchmark, append, calls, moved, copy_bandwidth)


@pytest.mark.parametrize("context, rows, window", [
    (128, 1, 0), (512, 1, 0), (1024, 1, 0), (8192, 1, 0), (8192, 1, 512), (128, 8, 0), (1024, 8, 0), (8192, 8, 0),
    (8192, 8, 512), (128, 32, 0), (1024, 32, 0), (8192, 32, 0), (1024, 64, 0)])
def test_paged_attention(benchmark, ops, copy_bandwidth, context, rows, window):
    benchmark.group = "CUDA: decode attention, Llama 8B's heads, bfloat16"
    width = -(-context // PAGE)
    cache = layers_of(rows * width)
    table = torch.randperm(rows * width, device="cuda").to(torch.int32).view(rows, width)
    lengths = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    floats, integers = core.cuda.attention_workspace(rows, H, Hkv, D, width)
    states, tickets = torch.empty(floats, device="cuda"), torch.zeros(integers, dtype=torch.int32, device="cuda")
    q = torch.randn(rows, H, D, device="cuda") * D**-0.5
    out = torch.empty(rows, H * D, dtype=BF16, device="cuda")
    calls = min(len(cache), 200)

    def attend():
        for layer in cache[:calls]:
            ops.paged_attention(q, *layer, table, lengths, states, tickets, out, window=window, stream=stream())

    keys = min(window or context, context)
    measure(benchmark, attend, calls, rows * keys * 2 * Hkv * D * 2, copy_bandwidth)
