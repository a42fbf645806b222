"""One forward for all families, against upstream's oracle, in any chunks, and through ops alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.load import open_model
from flat_models import ModelSpec
from attention_kinds import blocks_of
from engines import forward_logits, make_batch
from generations import GENERATIONS
from nightly import by_day


def llama_like(seed=0, **changes):
    """A small random model with every feature of llama files."""
    spec = ModelSpec(vocab_size=100, layers=3, width=48, heads=6, kv_heads=2, head_size=8, ffn_size=64,
                     max_positions=512, qkv_bias=True, rope_factors=(1.0, 2.0, 4.0, 8.0), **changes)
    random = torch.Generator().manual_seed(seed)
    return spec, {name: torch.randn(shape, generator=random) * (0.15 if len(shape) > 1 else 1.0)
                  for name, shape in blocks_of(spec).shapes().items()}


def nanochat_like(folder, name):
    settings = Settings(model=str(folder / name), dtype="float32")
    model = open_model(resolve_model(settings), settings)
    return model.architecture, model.tensors


def transformer(spec, tensors, kernels=None, num_pages=80, dtype="float32"):
    kernels = kernels or load_kernels("cpu")
    return Transformer(blocks_of(spec), dict(tensors), kernels, num_pages=num_pages, max_tokens=400, dtype=dtype)


def some_tokens(count, vocab_size, seed=1):
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


# --- upstream's oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_day(GENERATIONS, "gen5"))
def test_nanochat_s_logits_and_tokens_are_upstream_s(name, nanochat_fixtures):
    """Logits and greedy tokens of each nanochat generation are upstreams. By day tests/worker/weights/test_weights.py looks at each as it is loaded."""
    model = transformer(*nanochat_like(nanochat_fixtures, name))
    pages = list(range(5, 30))
    for case in json.loads((nanochat_fixtures / name / "oracle.json").read_text())["cases"]:
        tokens = list(case["prompt_ids"])
        logits = forward_logits(model, make_batch((tokens, 0, len(tokens), pages)))[0].clone()
        assert np.abs(logits.numpy() - case["next_logits"]).max() < 2e-3
        for expected in case["greedy"]:
            assert int(logits.argmax()) == expected
            tokens.append(expected)
            logits = forward_logits(model, make_batch((tokens, len(tokens) - 1, 1, pages)))[0]


# --- chunks, batches, pages --------------------------------------------------------------------------------------


def models(nanochat_fixtures):
    yield "llama", llama_like()
    yield "gen3", nanochat_like(nanochat_fixtures, "gen3")      # windows, value embeddings
    yield "gen5", nanochat_like(nanochat_fixtures, "gen5")      # and smear, backout


@pytest.mark.parametrize("which", [0, 1, 2])
def test_chunks_and_pages_do_not_change_logits(which, nanochat_fixtures):
    """Chunks batches and page placement do not change logits."""
    _, (spec, tensors) = list(models(nanochat_fixtures))[which]
    rng = np.random.default_rng(3)
    a, b, c = (some_tokens(n, spec.vocab_size, seed) for seed, n in enumerate((300, 45, 8)))
    alone = transformer(spec, tensors)
    expected = [forward_logits(alone, make_batch((tokens, 0, len(tokens), list(range(30)))))[0].clone() for tokens in (a, b, c)]

    shared = transformer(spec, tensors)
    pages = rng.permutation(80).tolist()
    pa, pb, pc = pages[:20], pages[20:40], pages[40:45]
    forward_logits(shared, make_batch((a, 0, 100, pa), (b, 0, 44, pb)))                 # prompts side by side
    forward_logits(shared, make_batch((a, 100, 199, pa), (c, 0, 7, pc)))
    logits = forward_logits(shared, make_batch((a, 299, 1, pa), (b, 44, 1, pb), (c, 7, 1, pc)))     # and decoded together
    for row, whole in zip(logits, expected):
        assert (row - whole).abs().max() < 1e-4 * whole.abs().max()

    mixed = transformer(spec, tensors)
    forward_logits(mixed, make_batch((b, 0, 44, pb)))
    logits = forward_logits(mixed, make_batch((b, 44, 1, pb), (a, 0, 300, pa), (c, 0, 8, pc)))  # a decode row together with prompts
    for row, whole in zip(logits, (expected[1], expected[0], expected[2])):
        assert (row - whole).abs().max() < 1e-4 * whole.abs().max()


def test_bfloat16_follows_float32():
    spec, tensors = llama_like()
    tokens = some_tokens(60, spec.vocab_size)
    rounded = {name: tensor.bfloat16() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    exact = transformer(spec, {name: tensor.float() for name, tensor in rounded.items()})
    fast = transformer(spec, rounded, dtype="bfloat16")
    batch = make_batch((tokens, 0, 60, [3, 1, 4, 2]))
    expected, actual = forward_logits(exact, batch)[0], forward_logits(fast, batch)[0]
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 0.03 * expected.norm()


def test_a_step_without_logit_rows_fills_the_cache():
    """A step without logit rows fills the cache, and returns no rows."""
    spec, tensors = llama_like()
    model, tokens = transformer(spec, tensors), some_tokens(20, 100)
    batch = make_batch((tokens, 0, 19, [0, 1]))
    batch = batch._replace(logit_rows=[])
    assert forward_logits(model, batch).shape == (0, 100)
    whole = forward_logits(transformer(spec, tensors), make_batch((tokens, 0, 20, [0, 1])))
    assert torch.allclose(forward_logits(model, make_batch((tokens, 19, 1, [0, 1]))), whole, atol=1e-4)


# --- kernels ----------------------------------------------------------------------------------------------------


class NoArithmetic(TorchDispatchMode):
    """Fails on every torch call outside an op, except views."""

    VIEWS = {"slice", "select", "view", "unflatten"}

    def __init__(self):
        super().__init__()
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert self.inside or name in self.VIEWS, f"forward itself calls {func}"
        return func(*args, **(kwargs or {}))


def recording_kernels(calls, guard):
    """The reference ops; each call also appends (op, arguments) to `calls`."""
    kernels = load_kernels("cpu")

    def recorded(op):
        def call(*args, **kwargs):
            guard.inside = True
            result = op(*args, **kwargs)
            guard.inside = False
            calls.append((op, args, kwargs))
            return result
        return call

    fields = [field.name for field in dataclasses.fields(kernels) if callable(getattr(kernels, field.name))]
    return dataclasses.replace(kernels, **{name: recorded(getattr(kernels, name)) for name in fields if not name.startswith("pack")})


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_is_a_list_of_replayable_ops(which, nanochat_fixtures):
    """What a recorder or a graph needs: nothing is computed between the ops, and every activation is in a
    buffer that one op writes before another reads it."""
    _, (spec, tensors) = list(models(nanochat_fixtures))[which]
    calls, guard = [], NoArithmetic()
    model = transformer(spec, tensors, recording_kernels(calls, guard))
    tokens = some_tokens(50, spec.vocab_size)
    forward_logits(model, make_batch((tokens, 0, 30, [7, 5, 6, 2])))
    calls.clear()
    cache = model.cache.clone()
    addresses = {name: buffer.data_ptr() for name, buffer in model.buffers.items()}
    batch = make_batch((tokens, 30, 20, [7, 5, 6, 2]))
    inputs = model.inputs(batch)
    buffers = model.cut(20, 1)
    with torch.inference_mode(), guard:
        model.compute(inputs, buffers)
    logits = buffers.logits
    expected, cache_after = logits.clone(), model.cache.clone()

    assert addresses == {name: buffer.data_ptr() for name, buffer in model.buffers.items()}
    with torch.inference_mode():
        model.cache.copy_(cache)
        for buffer in model.buffers.values():
            buffer.fill_(math.nan)
        for op, args, kwargs in calls:
            op(*args, **kwargs)
    assert torch.equal(logits, expected) and torch.equal(model.cache, cache_after)
    outputs = [kwargs["out"] for _, _, kwargs in calls if "out" in kwargs]
    inside = [(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in model.buffers.values()]
    assert outputs and all(any(low <= out.data_ptr() < high for low, high in inside) for out in outputs)


# --- spec and weights --------------------------------------------------------------------------------------------


def test_a_tied_head_is_the_embedding():
    """Weights are taken over, and a tied head is the embedding."""
    spec, tensors = llama_like(tied_head=True)
    tensors["head"] = tensors["embed"]
    given = dict(tensors)
    model = Transformer(blocks_of(spec), given, load_kernels("cpu"), num_pages=4, max_tokens=8, dtype="float32")
    assert not given and model.weights["head"] is model.weights["embed"]


def test_page_bytes_is_what_a_page_takes():
    spec, tensors = llama_like()
    model = transformer(spec, tensors, num_pages=7, dtype="bfloat16")
    assert 7 * model.layout.page_bytes == model.cache.nbytes


def test_expected_tensors_are_smollm2_s():
    """expected_tensors counts the parameters of SmolLM2."""
    spec = ModelSpec(vocab_size=49152, layers=30, width=576, heads=9, kv_heads=3, head_size=64, ffn_size=1536,
                     max_positions=8192, tied_head=True)
    shapes = {name: shape for name, shape in blocks_of(spec).shapes().items() if name != "head"}
    assert sum(map(math.prod, shapes.values())) == 134_515_008
