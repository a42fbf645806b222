"""A kind of layer is added in files of its own, tests/support/toy_mixer.py and .cpp. No file of the program
changes."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.limits import left_to_torch, not_compiled
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.loaded.shards import refuse_ranks
from engines import forward_logits, make_batch, make_engine, run
from families import load, transformer
from tiny_specs import rank_model, stage_of
from toy_mixer import CONFIG, ROW, Leak, write_model
from works import assignment

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 70


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", ROW)
    return tmp_path, {name: tensor.double() for name, tensor in write_model(tmp_path).items()}


def normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt() * weight


def turned(x):
    """Heads (T, H, D) by their positions."""
    half = x.shape[2] // 2
    angles = torch.arange(len(x))[:, None] / 10_000.0 ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attended(x, w):
    q, k, v = (turned_or_not(x @ w[f"self_attn.{part}_proj.weight"].T, part) for part in "qkv")
    k, v = (each.repeat_interleave(2, 1) for each in (k, v))
    by_head = [each.transpose(0, 1) for each in (q, k, v)]
    found = functional.scaled_dot_product_attention(*by_head, is_causal=True)
    return found.transpose(0, 1).reshape(len(x), -1) @ w["self_attn.o_proj.weight"].T


def turned_or_not(x, part):
    heads = x.view(len(x), -1, CONFIG["hidden_size"] // CONFIG["num_attention_heads"])
    return heads if part == "v" else turned(heads)


def averaged(x, w):
    h, found = torch.zeros(x.shape[1], dtype=torch.float64), []
    for row in x @ w["leak.in_proj.weight"].T:
        h = w["leak.decay"] * h + (1 - w["leak.decay"]) * row
        found.append(h)
    return torch.stack(found) @ w["leak.out_proj.weight"].T


def oracle(tensors, ids):
    """The logits of every token, by the definition, in float64."""
    x = tensors["model.embed_tokens.weight"][ids]
    for number, kind in enumerate(CONFIG["layer_types"]):
        prefix = f"model.layers.{number}."
        w = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        mix = averaged if kind == "leak" else attended
        x = x + mix(normed(x, w["input_layernorm.weight"]), w)
        h = normed(x, w["post_attention_layernorm.weight"])
        gate, up = (h @ w[f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return normed(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def some_ids(count, seed=5):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


@pytest.mark.parametrize("chunks", [(LENGTH,), (1, 40, 29), (16, 16, 16, 16, 6)])
def test_a_new_kind_of_layer_computes_its_definition(toy, chunks):
    """However a prompt is cut."""
    folder, tensors = toy
    model = load(folder)
    assert [type(mixer) for mixer in model.architecture.mixers] == [Leak, type(None), Leak]
    steps, ids, done = transformer(model, load_kernels("cpu", model.architecture)), some_ids(LENGTH), 0
    expected = oracle(tensors, ids)
    for count in chunks:
        logits = forward_logits(steps, make_batch((ids, done, count, [0, 1, 2, 3, 4])))[0]
        done += count
        torch.testing.assert_close(logits.double(), expected[done - 1], atol=2e-4, rtol=1e-4)


def test_an_engine_answers_with_it(toy):
    """Alone, side by side, from kept states and after chunks, each answer is the definition's."""
    folder, tensors = toy
    prompts = {f"{count} tokens": some_ids(count, seed=count) for count in (5, 33, 90)}
    greedy = SamplingParams(temperature=0)
    works = [assignment(name, tuple(ids), greedy, 12, ignore_eos=True) for name, ids in prompts.items()]
    engine = make_engine(folder, num_pages=60, prefill_chunk=32)
    for _ in range(2):          # the second time prompts are in the cache
        found = run(engine, works).tokens
        for name, ids in prompts.items():
            assert len(found[name]) == 12
            for place, token in enumerate(found[name]):
                logits = oracle(tensors, ids + found[name][:place])[-1]
                assert logits.max() - logits[token] < 1e-3, (name, place)


def test_what_decode_core_lacks_for_it_is_said(toy):
    model = load(toy[0]).architecture
    assert not_compiled(model) == "leaky average" and "leaky average" in left_to_torch(model, "cuda")
    refuse_ranks(model, 2, 16)
    assert [rank_model(model, rank, 2).layers[0].mixer.channels for rank in (0, 1)] == [32, 16]
    assert [stage_of(model, stage, 2).keeps_states for stage in (0, 1)] == [True, True]
