"""The model's step and the sampler on the default model: `pytest bench/test_bench_model.py --benchmark-enable`.

Weights and cache in the type that `serve` uses on this CPU. `tokens_per_second` in extra_info is from the
median.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # as the server sets it for its workers
sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from chatlm.common.config import PAGE_SIZE, Settings    # noqa: E402
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402
from chatlm.common.messages.requests import ModelSource, SamplingParams    # noqa: E402
from chatlm.worker.kernels.choosing import load_kernels    # noqa: E402
from chatlm.worker.model.batch import Batch    # noqa: E402
from chatlm.worker.model.transformer import Transformer    # noqa: E402
from chatlm.worker.ops.basic import fastest_dtype    # noqa: E402
from chatlm.worker.ops.rows import SampleRow    # noqa: E402
from chatlm.worker.ops.sampling import sample_reference    # noqa: E402
from chatlm.worker.weights.load import open_model    # noqa: E402

NUM_PAGES = 1100


@pytest.fixture(scope="module")
def model():
    dtype = str(fastest_dtype("cpu")).removeprefix("torch.")
    settings = Settings(dtype=dtype)
    source = ModelSource("gguf", fetch_default_model(), "default", "")
    kernels, loaded = load_kernels("cpu"), open_model(source, settings)
    return Transformer(loaded.architecture, loaded.tensors, kernels, num_pages=NUM_PAGES, max_tokens=256, dtype=dtype)


def make_batch(rows, context, new):
    """`rows` sequences that each compute `new` tokens and are then `context` long."""
    pages = -(-context // PAGE_SIZE)
    positions = [*range(context - new, context)] * rows
    return Batch([(p * 37 + 5) % 40000 for p in positions], [(p * 37 + 4) % 40000 for p in positions],
                 [new * i for i in range(rows + 1)], [context] * rows,
                 [list(range(i * pages, (i + 1) * pages)) for i in range(rows)], [new * i + new - 1 for i in range(rows)])


def record(benchmark, tokens):
    if benchmark.stats:
        benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.median, 1)


@pytest.mark.parametrize("rows, context", [(1, 64), (1, 1024), (16, 64), (16, 256), (16, 1024)])
def test_decode_step(benchmark, model, rows, context):
    """Forward and sampling with the default parameters."""
    batch = make_batch(rows, context, 1)
    draws = [SampleRow(SamplingParams(seed=seed), context) for seed in range(rows)]
    benchmark.group = "decode step"
    tokens = benchmark(lambda: model.kernels.sample(model.forward(batch), draws))
    assert len(tokens) == rows
    record(benchmark, rows)


@pytest.mark.parametrize("context", [256, 1024])
def test_prefill_chunk_of_256(benchmark, model, context):
    batch = make_batch(1, context, 256)
    benchmark.group = "prefill chunk"
    assert benchmark(model.forward, batch).shape[0] == 1
    record(benchmark, 256)


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("params", [dict(), dict(temperature=0), dict(top_p=0.95), dict(top_k=0, top_p=0.95),
                                    dict(top_k=0)], ids=str)
def test_sampling(benchmark, rows, params):
    """The numpy reference at V = 49152."""
    logits = (np.random.default_rng(0).standard_normal((rows, 49152)) * 3).astype(np.float32)
    draws = [SampleRow(SamplingParams(seed=seed, **params), 100) for seed in range(rows)]
    benchmark.group = f"sampling {params}"
    assert len(benchmark(sample_reference, logits, draws)) == rows
    record(benchmark, rows)


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_sampling_by_torch(benchmark, rows):
    """The baseline for the sampler: torch's top-k, softmax and multinomial."""
    logits = torch.randn(rows, 49152, generator=torch.Generator().manual_seed(0)) * 3
    benchmark.group = "sampling {}"

    def draw():
        values, ids = torch.topk(logits, 50)
        return ids.gather(1, torch.multinomial(torch.softmax(values / 0.8, -1), 1))
    assert len(benchmark(draw)) == rows
    record(benchmark, rows)
