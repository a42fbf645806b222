"""bench/family_shapes.py: each of its shapes, scaled down, is a file that opens and computes; and the turns of bench/compare.py."""

import os
import re
import subprocess
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # as the server sets it for its workers; before torch

import family_shapes
import gguf
import numpy as np
import pytest
import torch

sys.path.insert(0, str(family_shapes.ROOT / "tests" / "support"))
from chatlm.worker.weights.families.table import GGUF_FAMILIES      # noqa: E402
from engines import forward_logits, make_batch      # noqa: E402
from families import kernels_of, load, transformer      # noqa: E402
from tiny_gguf import write_gguf        # noqa: E402

SMALL = {"embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
         "attention.value_length": 32, "attention.key_length_swa": 16, "attention.value_length_swa": 16, "attention.sliding_window": 16,
         "rope.dimension_count": 32, "rope.dimension_count_swa": 16, "embedding_length_per_layer_input": 8, "expert_count": 8,
         "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32, "ssm.state_size": 16, "ssm.time_step_rank": 8,
         "ssm.inner_size": 128, "attention.scale": 0.2}


def reduced(shape):
    """The same model with small sizes: 0, 1, switches and choices keep their meaning."""
    def size(key, value):
        if isinstance(value, list) and key in SMALL:
            return [count and SMALL[key] // (1 + (count < max(value))) for count in value]
        return SMALL[key] if key in SMALL and value else value
    numbers = {key: size(key, value) for key, value in shape.numbers.items()}
    if shape.arch.startswith("qwen35"):         # a quarter of a head turns; twice as many value heads as key heads
        numbers |= {"rope.dimension_count": 8, "ssm.group_count": 4}
    return shape._replace(numbers=numbers)


@pytest.fixture(scope="module", params=family_shapes.SHAPES)
def small_file(request, tmp_path_factory):
    shape = reduced(family_shapes.SHAPES[request.param])
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    family_shapes.write(path, request.param, shape, write_gguf(path.with_name("tokenizer.gguf"), {}, {}))
    return path, shape


def test_a_small_file_of_each_shape_opens(small_file):
    """Its logits are those of a model."""
    path, shape = small_file
    if shape.arch not in GGUF_FAMILIES:
        pytest.skip(f"{shape.arch} is not read yet")
    model = load(path)
    prompt = np.random.default_rng(0).integers(0, model.architecture.vocab_size, 40).tolist()
    computed = transformer(model, kernels_of("reference", model.architecture))
    logits = torch.cat([forward_logits(computed, make_batch((prompt, start, 10, [0, 1, 2]))) for start in range(0, 40, 10)])
    assert logits.isfinite().all() and 1 < logits.std(-1).min() and logits.std(-1).max() < 5
    assert logits.argmax(-1).unique().numel() > 1 and (logits.argmax(-1) != torch.tensor(prompt[9::10])).any()


def test_states_forget_within_1000_tokens(small_file):
    """They take at least one, and norms are ones."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(small_file[0]).tensors}
    assert all(np.isfinite(np.asarray(values, np.float32)).all() for values in tensors.values())
    for name, steps in tensors.items():
        if name.endswith("ssm_dt.bias"):
            kept = np.exp(tensors[name.replace("ssm_dt.bias", "ssm_a")].reshape(-1) * np.log1p(np.exp(steps)))
            assert np.exp(-1.61) < kept.min() and kept.max() < np.exp(-0.99e-3)
        if name.endswith(("attn_norm.weight", "ffn_norm.weight")):
            assert (steps == 1).all()


@pytest.mark.parametrize("name", ["qwen3.6-35b-a3b", "gemma-4-26b-a4b"])
def test_a_file_of_few_experts_becomes_that_of_all(name, tmp_path):
    shape = reduced(family_shapes.SHAPES[name])
    few, many = (shape._replace(numbers=shape.numbers | {"expert_count": count}) for count in (family_shapes.FEW, 4 * family_shapes.FEW))
    family_shapes.write(tmp_path / "few.gguf", name, few, write_gguf(tmp_path / "tokenizer.gguf", {}, {}))
    family_shapes.write_with_all_experts(tmp_path / "many.gguf", many, tmp_path / "few.gguf")
    reader = gguf.GGUFReader(tmp_path / "many.gguf")
    assert reader.fields[f"{shape.arch}.expert_count"].contents() == 4 * family_shapes.FEW
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert {name: data.shape for name, data in tensors.items()} == family_shapes.tensors(many, len(tensors["token_embd.weight"]))
    down, routes = tensors["blk.0.ffn_down_exps.weight"], tensors["blk.0.ffn_gate_inp.weight"]
    assert (down[family_shapes.FEW:2 * family_shapes.FEW] == down[:family_shapes.FEW]).all() and (down[1] != down[0]).any()
    assert len(np.unique(routes, axis=0)) == len(routes)


@pytest.mark.parametrize("name", ["gemma-4-e4b", "gemma-4-26b-a4b"])
def test_layers_of_gemma_have_their_kind_s_heads(name):
    sizes = family_shapes.tensors(family_shapes.SHAPES[name], 49152)
    heads = {"gemma-4-e4b": [(8, 2), (8, 2)], "gemma-4-26b-a4b": [(16, 8), (16, 2)]}[name]
    sliding, full = ("blk.0.", "blk.1." if name == "gemma-4-e4b" else "blk.3.")
    assert [sizes[f"{layer}attn_{part}.weight"][0] for layer in (sliding, full) for part in "qk"] == [
        256 * heads[0][0], 256 * heads[0][1], 512 * heads[1][0], 512 * heads[1][1]]
    without_v = [layer for layer in range(4) if f"blk.{layer}.attn_v.weight" not in sizes]
    assert without_v == ([2, 3] if name == "gemma-4-e4b" else [3])


@pytest.mark.slow
def test_a_second_turn_finds_the_first_in_the_cache():
    """The default model has it."""
    command = [sys.executable, family_shapes.ROOT / "bench" / "compare.py", "--ours-only", "--only", "turn-2000", "--rounds", "1",
               "--server-args=--no-drafts"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cached, tokens = map(int, re.search(r"tokens from a cache, after the first turn: (\d+) of (\d+)", done.stderr).groups())
    assert 2000 < cached < tokens < 2200, done.stderr
