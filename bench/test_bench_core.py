"""decode_core's sample: `pytest bench/test_bench_core.py --benchmark-enable` (one thread).

extra_info: us_per_row, logits_GB_per_s, and for top-k 50 `times_torch`: how many times longer torch's topk +
softmax + multinomial takes on the same logits, the median of alternating runs. Logits are normal with a
deviation of 3.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from chatlm.common.messages.requests import SamplingParams    # noqa: E402
from chatlm.worker.ops.rows import SampleRow    # noqa: E402
from chatlm.worker.ops.sampling import sample_reference    # noqa: E402

core = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)

SIZES = [(V, B) for V in (32768, 49152, 151936) for B in (1, 8, 32)]
SETTINGS = {"greedy": dict(temperature=0.0), "top_k": dict(top_k=50), "top_k_top_p": dict(top_k=40, top_p=0.95),
            "top_p": dict(top_k=0, top_p=0.95), "min_p": dict(top_k=0, min_p=0.05), "unfiltered": dict(top_k=0),
            "penalties": dict(top_k=50, repetition_penalty=1.1)}
CONTESTANTS = ["torch", "reference", *core.info()["offered_isas"]]


@pytest.fixture(autouse=True)
def one_thread():
    before, isa = torch.get_num_threads(), core.info()["isa"]
    torch.set_num_threads(1)
    core.set_threads(1)
    yield
    torch.set_num_threads(before)
    core.set_isa(isa)


def make_case(setting, V, B):
    logits = (np.random.default_rng(V + B).standard_normal((B, V)) * 3).astype(np.float32)
    context = list(range(0, 3000, 3))
    return logits, [SampleRow(SamplingParams(seed=i, **SETTINGS[setting]), 1000 + i, context, 500) for i in range(B)]


def torch_top_k(logits, temperature=0.8, k=50):
    tensor = torch.from_numpy(logits)

    def run():
        values, ids = torch.topk(tensor, k)
        return ids.gather(1, torch.multinomial(torch.softmax(values / temperature, dim=-1), 1))
    return run


def contestant(name, logits, rows):
    if name == "torch":
        return torch_top_k(logits)
    if name == "reference":
        return lambda: sample_reference(logits, rows)
    core.set_isa(name)
    sampler = core.Sampler()
    return lambda: sampler(logits, rows)        # as the engine calls it: rows in, a list of tokens out


def times_torch(run, logits, rounds=25):
    """Median over alternating runs of (torch's time / this one's)."""
    other, ratios = torch_top_k(logits), []
    for _ in range(rounds):
        start = time.perf_counter()
        other()
        middle = time.perf_counter()
        for _ in range(5):
            run()
        ratios.append((middle - start) / ((time.perf_counter() - middle) / 5))
    return round(statistics.median(ratios), 1)


@pytest.mark.parametrize("V, B", SIZES)
@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_sample(benchmark, setting, name, V, B):
    if benchmark.disabled and (V, B) not in ((32768, 8), (151936, 1)):
        pytest.skip("these two show that it runs")
    if name == "torch" and setting != "top_k":
        pytest.skip("torch is measured where it does the same work: top-k")
    if name == "reference" and V * B > 49152 * 8:
        pytest.skip("the reference takes too long to be of interest here")
    logits, rows = make_case(setting, V, B)
    run = contestant(name, logits, rows)
    benchmark.group = f"sample {setting} V={V} B={B}"
    assert len(benchmark(run)) == B
    if benchmark.stats:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"us_per_row": round(seconds / B * 1e6, 2), "logits_GB_per_s": round(logits.nbytes / seconds / 1e9, 1)}
        if setting == "top_k" and name not in ("torch", "reference"):
            benchmark.extra_info["times_torch"] = times_torch(run, logits)


@pytest.mark.parametrize("B", [1, 32])
def test_preparing_a_batch(benchmark, B):
    """The cost when the batch changes: the parameters of every row are packed anew."""
    logits, rows = make_case("top_k", 49152, B)
    benchmark.group = "sample, preparing"
    benchmark(lambda: core.SampleBatch(rows, logits.shape[1]))
