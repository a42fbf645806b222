"""Layers that attend in several ways in one model: head sizes, values, windows, rotary, and keys of other layers."""

import dataclasses

import numpy as np
import pytest
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.model.pages import KvType, PageLayout, group_layers
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.loaded.shards import layers_of, stage_model
from attention_kinds import FULL, KINDS, attention, kinds_model, loaded, with_attentions
from arrays import arrays_of
from engines import forward_logits, make_batch


FLOATS, PACKED = KvType("float32"), KvType("float32", packed=True)


def transformer(model, tensors, groups=None, dtype="float32", num_pages=80, kv=None):
    return Transformer(model, dict(tensors), load_kernels("cpu"), num_pages=num_pages, max_tokens=400, dtype=dtype,
                       groups=groups, kv=kv)


def f64(tensor):
    return tensor.double().numpy()


def rms(x, eps=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def turned(its, x):
    """x (T, heads, D) rotated, pair by pair."""
    size, rope = its.rope.size, its.rope
    out = x.copy()
    for i in range(size // 2):
        factor = rope.factors[i] if rope.factors else 1.0
        angle = np.arange(len(x))[:, None] * rope.base ** (-2 * i / size) / factor
        a, b = x[..., i], x[..., i + size // 2]
        out[..., i], out[..., i + size // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def oracle(spec, tensors, ids):
    """The last token's logits, by the definition, in float64."""
    w, kept = {name: f64(tensor) for name, tensor in tensors.items()}, {}
    x, T = w["embed"][ids], len(ids)
    for l in range(len(spec.layers)):
        its = spec.layers[l].mixer
        D, Dv, Hkv = its.head_size, its.value_size, its.kv_heads
        qkv = (rms(x) * w[f"{l}.attention_norm"]) @ w[f"{l}.qkv"].T
        q = turned(its, rms(qkv[:, :its.heads * D].reshape(T, -1, D)) * w[f"{l}.q_norm"]) * its.scores.scale / D**0.5
        if its.source is None:
            k = qkv[:, its.heads * D:][:, :Hkv * D].reshape(T, Hkv, D)
            v = k if its.values_from_keys else qkv[:, -Hkv * Dv:].reshape(T, Hkv, Dv)
            kept[l] = turned(its, rms(k) * w[f"{l}.k_norm"]), rms(v) if its.value_norm else v
        k, v = (np.repeat(part, its.heads // Hkv, 1) for part in kept[l if its.source is None else its.source])
        scores = np.einsum("thd,shd->hts", q, k)
        age = np.arange(T)[:, None] - np.arange(T)
        scores[:, (age < 0) | ((age >= its.window) if its.window else False)] = -np.inf
        share = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("hts,shd->thd", share / share.sum(-1, keepdims=True), v)
        x = x + y.reshape(T, -1) @ w[f"{l}.output"].T
        gate, up = np.split((rms(x) * w[f"{l}.ffn_norm"]) @ w[f"{l}.gate_up"].T, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{l}.down"].T
    return (rms(x) * w["final_norm"])[-1] @ w["head"].T


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kv", [FLOATS, PACKED], ids=["float32", "q8_0"])
def test_attention_kinds_match_their_definition(name, apart, kv):
    """Logits are those of the definition in any chunks, batches and groups of pages."""
    spec, tensors = kinds_model(name)
    groups = group_layers(spec.by_layer, 512, apart, kv)
    model, count = transformer(spec, tensors, groups, kv=kv), len(groups.windows)
    assert (count > 1) == apart and model.cache.nbytes == model.layout.page_bytes * (80 + groups.holes)
    assert model.layout.unit == kv.unit and {*model.layout.types} == ({"float32", "q8_0"} if kv.packed else {"float32"})
    a, b = (np.random.default_rng(seed).integers(0, 96, size).tolist() for seed, size in ((1, 70), (2, 33)))
    pages = np.random.default_rng(3).permutation(80).tolist()
    pa, pb = pages[:5 * count], pages[40:40 + 3 * count]
    expected = [oracle(spec, tensors, ids) for ids in (a, b)]
    forward_logits(model, make_batch((a, 0, 30, pa), (b, 0, 32, pb)))
    forward_logits(model, make_batch((a, 30, 39, pa)))
    got = forward_logits(model, make_batch((a, 69, 1, pa), (b, 32, 1, pb)))
    for row, want in zip(got.numpy(), expected):
        assert np.abs(row - want).max() < (0.05 if kv.packed else 1e-4) * max(1, np.abs(want).max())


@pytest.mark.parametrize("name", ["gemma 4", "heads"])
@pytest.mark.parametrize("dtype, kv", [("float32", None), ("bfloat16", None), ("float32", PACKED)], ids=["float32", "bfloat16", "q8_0"])
def test_each_layer_s_own_heads_have_the_same_bits(name, dtype, kv):
    """decode_core computes each layer's own heads with the same bits in any batch."""
    pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
    spec, tensors = kinds_model(name)
    groups, results = group_layers(spec.by_layer, 512, kv=kv or FLOATS), []
    ids, other = (np.random.default_rng(seed).integers(0, 96, size).tolist() for seed, size in ((1, 150), (2, 33)))
    pages = np.random.default_rng(3).permutation(160).tolist()
    mine, its = pages[:10 * len(groups.windows)], pages[100:100 + 3 * len(groups.windows)]
    for splits in ((0, 150), (0, 149, 150), (0, 1, 3, 50, 146, 147, 149, 150)):
        kernels = load_kernels("cpu", spec, max_tokens=400, max_rows=8)
        assert kernels.backend.name.startswith("decode_core") and kernels.names["rope_append"] == kernels.backend.name
        model = Transformer(spec, arrays_of(tensors), kernels, num_pages=160, max_tokens=400, max_rows=8, dtype=dtype, groups=groups,
                            kv=kv)
        forward_logits(model, make_batch((other, 0, 20, its)))
        for begin, end in zip(splits, splits[1:]):
            beside = [(other, 20, 13, its)] if len(splits) == 3 and end == 150 else []
            logits = forward_logits(model, make_batch((ids, begin, end - begin, mine), *beside))[0].clone()
        results.append(logits)
    assert all(torch.equal(logits, results[0]) for logits in results)
    want = oracle(spec, tensors, ids)
    assert np.abs(results[0].numpy() - want).max() < (0.06 if kv or dtype == "bfloat16" else 1e-4) * max(1, np.abs(want).max())


def test_a_layer_that_borrows_keys_has_no_pages():
    """A layer that reads another's keys has neither pages nor rows for keys."""
    spec, _ = kinds_model("gemma 4")
    shapes = spec.shapes()
    assert shapes["4.qkv"] == (4 * 16, 48) and "4.k_norm" not in shapes and shapes["4.q_norm"] == (16,)
    assert shapes["1.qkv"] == (4 * 32 + 32, 48)                      # q and k; v is made of k
    layout = PageLayout.of(group_layers(spec.by_layer, 512), spec.by_layer)
    assert [(layout.group[l], layout.offset[l]) for l in (4, 5, 6)] == [(layout.group[l], layout.offset[l]) for l in (2, 2, 3)]
    whole = group_layers(spec.by_layer, 0, apart=False)
    assert PageLayout.of(whole, spec.by_layer).size == 2 * (2 * 2 * 16) + 2 * (2 * 32)
    assert PageLayout.of(whole, spec.by_layer, KvType("bfloat16")).page_bytes == 2 * PAGE_SIZE * 256


def test_what_decode_core_lacks_is_logged():
    spec, _ = kinds_model("gemma 4")
    assert not_compiled(spec) == "" and not_compiled(spec, "cuda") == "attention of several kinds on a GPU"
    assert not_compiled(kinds_model("all")[0]) == "attention whose keys and values differ in width"


def gemma4(layers, every, shared, sliding, full):
    """The attentions of a Gemma 4: each `every`-th layer is full, the last `shared` ones read earlier ones' keys."""
    made = [full if (layer + 1) % every == 0 else sliding for layer in range(layers)]
    own = layers - shared
    return [its if layer < own else dataclasses.replace(its, source=max(
        l for l in range(own) if made[l].window == its.window)) for layer, its in enumerate(made)]


@pytest.mark.parametrize("attentions, groups, kept, most", [
    # E4B: 20 sliding layers of 2 x 256 and 4 full ones of 2 x 512 keep keys
    (gemma4(42, 6, 18, attention(8, 2, 256, window=512), attention(8, 2, 512)), 7, 20 * 1024 + 4 * 2048, 1.0),
    # E2B: 12 and 3, of one head
    (gemma4(35, 5, 20, attention(8, 1, 256, window=512), attention(8, 1, 512)), 3, 12 * 512 + 3 * 1024, 1.0),
    # 26B-A4B: 25 of 8 x 256, 5 of 2 x 512
    (gemma4(30, 6, 0, attention(16, 8, 256, window=1024), attention(16, 2, 512)), 14, 25 * 4096 + 5 * 2048, 1.3),
    # 31B: 50 of 16 x 256, 10 of 4 x 512
    (gemma4(60, 6, 0, attention(32, 16, 256, window=1024), attention(32, 4, 512)), 11, 50 * 8192 + 10 * 4096, 1.0),
], ids=["E4B", "E2B", "26B-A4B", "31B"])
def test_pages_waste_nothing_of_a_long_context(attentions, groups, kept, most):
    """The pages of published sizes waste nothing of a long context."""
    made = group_layers(attentions, 131_072)
    layout = PageLayout.of(made, attentions)
    assert len(made.windows) == groups and sum(its.slot_size for its in attentions) == kept
    full = [members for members, window in zip(made.members, made.windows) if not window]
    needed = sum(attentions[l].slot_size for members in full for l in members)
    assert layout.size * len(full) == needed        # whatever its length, a sequence holds these for each token
    assert layout.size * groups <= most * kept      # and these for each of the newest
    assert all(sum(attentions[l].slot_size for l in members) <= layout.size for members in made.members)


# --- several ranks -------------------------------------------------------------------------------------------------


def test_each_kind_s_heads_are_divided_separately():
    spec, _ = kinds_model("all")
    attentions = spec.by_layer
    assert [list(map(len, attentions[l].divided(1, 3, 1).values())) for l in (0, 1, 3)] == [[1, 1], [1, 1], [1, 1]]
    full = with_attentions([FULL]).by_layer[0]
    assert [list(map(list, full.divided(rank, 2, 1).values())) for rank in range(2)] == [[[0, 1], [0]], [[2, 3], [0]]]


def test_a_layer_lives_where_its_keys_are():
    """A layer lives in the stage whose keys it reads."""
    spec, tensors = kinds_model("gemma 4")
    assert [layers_of(spec, stage, 2) for stage in range(2)] == [range(2), range(2, 7)]
    assert [layers_of(spec, stage, 3) for stage in range(3)] == [range(1), range(1, 2), range(2, 7)]
    with pytest.raises(ConfigError, match="cannot be divided into 4 stages: .*; at most 3 are possible"):
        layers_of(spec, 0, 4)
    last = stage_model(loaded(spec, tensors), 1, 2)
    assert [its.source for its in last.architecture.by_layer] == [None, None, 0, 0, 1]
    ids = np.random.default_rng(1).integers(0, 96, 40).tolist()
    whole = transformer(spec, tensors)
    expected, batch = forward_logits(whole, make_batch((ids, 0, 40, [3, 1, 2]))), make_batch((ids, 0, 40, [3, 1, 2]))
    first, second = (transformer(part.architecture, part.tensors) for part in (stage_model(loaded(spec, tensors), 0, 2), last))
    forward_logits(first, batch)
    with torch.inference_mode():
        second.buffers["x"].copy_(first.buffers["x"])
    assert torch.equal(forward_logits(second, batch), expected)


# --- what an op refuses or leaves alone ----------------------------------------------------------------------------


def test_values_may_be_keys_before_their_norm():
    """Values may be keys before their norm, and are normalized themselves."""
    k, out = load_kernels("cpu"), torch.empty(2, 16)
    cache, tables = torch.full((16, 2, 1, 8), 7.0), torch.zeros(4, 2)
    qkv = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    keys = qkv[:, 16:].clone()
    k.rope_append(qkv.clone(), tables + 1, tables, torch.tensor([0, 1]), torch.tensor([3, 9]), cache, out=out,
                  norm="before_rope", q_norm=torch.ones(8), k_norm=torch.full((8,), 2.0), value_norm=True)
    assert np.allclose(cache[[3, 9], 1, 0], rms(f64(keys)), atol=1e-5)
    assert np.allclose(cache[[3, 9], 0, 0], 2 * rms(f64(keys)), atol=1e-5)
    before = cache.clone()
    k.rope_append(qkv[:, :16].clone(), tables + 1, tables, torch.tensor([0, 1]), torch.tensor([4, 5]), cache, out=out)
    assert torch.equal(cache, before) and torch.equal(out, qkv[:, :16])     # q alone: another layer's pages stay
