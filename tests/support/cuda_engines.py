"""Engines whose steps run on CUDA or in its emulation, and their answers beside those of the reference engine."""

from types import SimpleNamespace

import numpy as np
import torch

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.engine.engine import Engine
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.limits import FREE_ROWS
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.kernels import cuda_runner
from attention_kinds import blocks_of
from engine_parts import parts_of
from engines import step_pieces
from near_tie import assert_same_tokens_or_near_tie
from works import assignment

MARGIN = 2e-3           # as in tests/worker/engine/test_engine.py


def engine_on(kernels, model, device="cpu", *, num_pages=200, max_batch=6, max_rows=None, prefill_chunk=64, context_length=512, kv=None):
    """`max_rows` as a worker has it: where drafts are free, a step has FREE_ROWS rows even if fewer sequences run. With fewer, for tests that draft
    nothing, fewer graphs are captured."""
    spec, tensors, tokenizer = model
    max_rows = max_rows or max(max_batch, FREE_ROWS)
    transformer = Transformer(blocks_of(spec), {name: t.to(device) for name, t in tensors.items()}, kernels, num_pages=num_pages,
                              device=device, dtype="float32", max_tokens=prefill_chunk + max_rows, max_rows=max_rows,
                              num_slots=max_batch + FREE_ROWS + 12, kv=kv)
    return Engine(transformer, tokenizer, kernels, num_pages=num_pages, max_batch=max_batch, context_length=context_length,
                  prefill_chunk=prefill_chunk, parts=parts_of(transformer, tokenizer))


def cuda_engine(backend, model, monkeypatch, prepare=True, **sizes):
    """An engine as a worker builds it on CUDA; the queue of its steps is `engine.runner.queue`."""
    monkeypatch.setattr(cuda_runner, "CudaQueue", lambda device: backend.queue())
    engine = engine_on(backend.kernels(model[0]), model, backend.device, **sizes)
    assert isinstance(engine.runner, cuda_runner.GraphRunner)
    if prepare:
        engine.runner.prepare(lambda fraction: None)
    return engine


@torch.inference_mode()
def answers(engine, works, arrivals=None, on_step=lambda: None):
    """Tokens of each work by its id; work i is added before step arrivals[i]."""
    arrivals = arrivals or [0] * len(works)
    tokens, step = {work.id: [] for work in works}, 0
    while engine.busy or step <= max(arrivals):
        for work in [work for work, at in zip(works, arrivals) if at == step]:
            engine.add(work)
        for name, piece in step_pieces(engine):
            tokens[name] += piece.tokens
        check_integrity(engine)
        on_step()
        step += 1
    assert engine.pool.available == engine.pool.num_pages
    return tokens


def some_works(vocabulary, count=7, tokens=24):
    """Prompts of 1 to 300 tokens; greedy, filtered and unfiltered draws."""
    rng = np.random.default_rng(5)
    sampling = [dict(temperature=0.0), dict(temperature=0.8, top_k=50), dict(temperature=1.0, top_k=0),
                dict(temperature=1.2, top_k=0, top_p=0.9), dict(temperature=0.9, min_p=0.05, top_k=20)]
    return [assignment(f"w{i}", tuple(rng.integers(0, vocabulary, length).tolist()), SamplingParams(seed=i, **sampling[i % 5]),
                 tokens + 3 * i, ignore_eos=True) for i, length in enumerate((5, 300, 17, 1, 130, 64, 33)[:count])]


def same_answers(expected, got):
    for name, tokens in got.items():
        traced = expected.traced(name)
        assert_same_tokens_or_near_tie(traced, SimpleNamespace(tokens=tokens, gaps=traced.gaps), MARGIN)


def logits_of(steps, rows, length=1, **more):
    """Of the sequences with these numbers, which all have this length."""
    batch = decode_batch([-1] * len(rows), [5 + i for i in rows], [length] * len(rows), [[3 + i, 9 + i] for i in rows])
    return steps.forward(batch._replace(**more)).cpu().clone()


def decode_batch(previous, ids, lengths, tables):
    rows = list(range(len(ids)))
    return Batch(ids, previous, [*rows, len(rows)], lengths, tables, rows)
