"""Shards of a model's tensors: each is given out once, and the ranks together are the whole model."""

import dataclasses
import itertools
import json
import math
import threading

import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.blocks.experts import Experts, Router
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2, ShortConv
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.formats.folder.description import hf_blocks
from chatlm.worker.weights.formats.nanochat.generations import nanochat_model
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.loaded.shards import layers_of, refuse_ranks, shard_model, stage_model
from flat_models import ModelSpec
from attention_kinds import KINDS, attention, blocks_of, kinds_model, loaded
from engines import forward_logits, make_batch
from families import MODELS, as_gguf, load, make_model, save
from generations import GENERATIONS
from hub_configs import GEMMA4_CONFIGS
from nightly import by_day

SEED = 3


def shares_of(model, tp, block=1):
    """Each rank's own model, and what it has of each tensor."""
    refuse_ranks(model, tp, block)
    return [model.of_rank(rank, tp, block) for rank in range(tp)]


def check_every_part_is_given_out_once(spec, tp, block=1):
    model = blocks_of(spec)
    shares = shares_of(model, tp, block)
    local = [own.shapes() for own, _ in shares]
    for name, shape in model.shapes().items():
        kind, given = name.rpartition(".")[2], [parts[name] for _, parts in shares]
        layer = model.layers[int(name.partition(".")[0])] if "." in name else None
        if given[0] is not None and not given[0].ranges:        # whole, or rank 0's bias
            assert all(other in (None, given[0]) for other in given)
            assert (kind in ("output_bias", "down_bias", "expert_down_bias", "mix_out_bias")) == (None in given) or tp == 1, name
            continue
        axis, counts = given[0][0], torch.zeros(shape[given[0][0]], dtype=torch.int64)
        for rank, ((its, ranges), own) in enumerate(zip(given, local)):
            assert its == axis and all(0 <= part.start < part.stop <= shape[axis] for part in ranges)
            count = own[name][axis]
            if kind in ("embed", "head"):      # the last ranks have what remains
                count = max(min(count, spec.vocab_size - rank * count), 0)
            assert sum(map(len, ranges)) == count, name     # as the rank's own sizes say
            for part in ranges:
                counts[part.start:part.stop] += 1
        replicated = slice(0, 0)                            # kv heads that several ranks have, or groups of Mamba heads
        mixer = layer and layer.mixer
        if kind in ("qkv", "qkv_bias", "k_norm", "value_embed", "ve_gate") and tp > mixer.kv_heads:
            replicated = slice(mixer.queries * (1 + mixer.gated) if kind.startswith("qkv") else 0, None)
        elif isinstance(mixer, Mamba2) and mixer.groups % tp and kind in ("mix_in", "mix_in_bias", "taps", "taps_bias"):
            inner, channels, heads = mixer.parts
            each = mixer.size if kind == "taps" else 1
            replicated = slice(each * (2 * inner if kind.startswith("mix_in") else inner), -heads if kind.startswith("mix_in") else None)
        assert (counts[replicated] >= 1).all(), name
        counts[replicated] = 1
        assert (counts == 1).all(), name


PUBLISHED = {
    "gpt-oss-120b": (ModelSpec(vocab_size=201_088, layers=1, width=2880, heads=64, kv_heads=8, head_size=64, ffn_size=2880,
                               max_positions=64, experts=4, experts_per_token=4, qkv_bias=True, output_bias=True, ffn_bias=True,
                               router_bias=True, sinks=True, activation="clamped_swiglu"), 32),
    "llama-8b": (ModelSpec(vocab_size=128_256, layers=1, width=4096, heads=32, kv_heads=8, head_size=128, ffn_size=14_336,
                           max_positions=64), 256),
    "smollm2": (ModelSpec(vocab_size=49_152, layers=1, width=576, heads=9, kv_heads=3, head_size=64, ffn_size=1536,
                          max_positions=64), 32),
    "nanochat": (nanochat_model(dict(vocab_size=65_536, n_layer=2, n_head=10, n_kv_head=10, n_embd=1280, sequence_len=64, window_pattern="L",
                                    short_seq_len=None), 5, 15.0), 1)}
HYBRID = dict(vocab_size=1000, layers=2, heads=24, kv_heads=4, head_size=256, ffn_size=9216, max_positions=64)
NORM = RmsNorm(1e-5)
EXPERTS = Experts(4, 9216, Router(2, "sigmoid", correction_bias=True), "relu2", latent=512, shared=FeedForward(4096, "relu2", prefix="shared_"))
HYBRIDS = {
    "qwen3.5": (ModelSpec(width=2560, mixers=(DeltaRule(4, 24, 48, 128, 128), None), output_gate=True, **HYBRID), 256),
    "qwen3.5-gguf": (ModelSpec(width=2560, mixers=(DeltaRule(4, 24, 48, 128, 128, alternating=True), None), output_gate=True, **HYBRID), 256),
    "qwen3next": (ModelSpec(width=2048, mixers=(DeltaRule(4, 24, 48, 128, 128, gates_by_key=True, heads_by_key=True), None), **HYBRID), 256),
    "granite4h": (ModelSpec(width=1536, mixers=(Mamba2(4, 48, 64, 128, bias=True), None), **HYBRID), 256),
    "groups": (ModelSpec(width=1536, mixers=(Mamba2(4, 48, 64, 128, groups=4), None), **HYBRID), 256),
    "lfm2": (ModelSpec(width=2048, mixers=(ShortConv(3, bias=True), None), **HYBRID), 256),
    "nemotron3": (ModelSpec(width=1536, own_layers=(
        Layer(Mamba2(4, 48, 64, 128, groups=4), EXPERTS, attention_norm=NORM, ffn_norm=NORM), Layer(None, FeedForward(2048, "relu2"), ffn_norm=NORM),
        *(Layer(attention(24, 4, 256), EXPERTS, attention_norm=NORM, ffn_norm=NORM),) * 2), **HYBRID | {"layers": 4}), 256)}


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", HYBRIDS)
def test_shards_with_states_cover_each_tensor_once(name, tp):
    """Shards of layers that keep states cover each tensor once."""
    spec, block = HYBRIDS[name]
    check_every_part_is_given_out_once(spec, tp, block)
    model = blocks_of(spec)
    whole, parts = (sum(math.prod(shape) for shape in one.mixers[0].states(one.width)) for one in (model, shares_of(model, tp, block)[0][0]))
    assert parts <= 1.1 * whole / tp or name == "lfm2" and parts * 8 == whole * -(-8 // tp)        # eight blocks of 256 columns


@pytest.mark.parametrize("name, words", [("qwen3.5", "24 key heads in its linear attention, so --tp must be one of 1, 2, 3, 4, 6, 8, 12, 24"),
                                         ("groups", "48 heads in its Mamba layers, so --tp must be one of 1, 2, 3, 4, 6, 8, 12, 16, 24")])
def test_heads_of_states_that_do_not_divide_are_named(name, words):
    """Heads of states that ranks cannot share are one line with what is allowed."""
    with pytest.raises(ConfigError) as caught:
        refuse_ranks(blocks_of(HYBRIDS[name][0]), 5, 256)
    assert str(caught.value) == f"the model cannot be divided among 5 ranks: it has {words}"


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shards_cover_each_tensor_once(name, tp):
    check_every_part_is_given_out_once(*PUBLISHED[name][:1], tp, PUBLISHED[name][1])


def test_the_first_ranks_take_the_odd_blocks():
    """Where blocks do not divide, the first ranks have one more."""
    spec, block = PUBLISHED["gpt-oss-120b"]
    for tp, blocks in ((4, [23, 23, 22, 22]), (8, [12] * 2 + [11] * 6)):
        assert [own.feed.width // block for own, _ in shares_of(blocks_of(spec), tp, block)] == blocks


def test_more_ranks_than_kv_heads_share_them():
    spec, _ = PUBLISHED["smollm2"]
    layer = blocks_of(spec).layers[0]
    shares = [layer.divided(rank, 4, 1) for rank in range(4)]
    assert [list(share["kv_heads"]) for share in shares] == [[0], [0], [1], [2]]
    assert [list(share["heads"]) for share in shares] == [[0], [1, 2], [3, 4, 5], [6, 7, 8]]
    assert [list(layer.divided(rank, 2, 1)["kv_heads"]) for rank in range(2)] == [[0], [1, 2]]


@pytest.mark.parametrize("tp, block", [(10, 32), (7, 512), (4, 512)])
def test_a_model_that_cannot_be_divided_is_refused(tp, block):
    with pytest.raises(ConfigError, match=f"divided among {tp} ranks: it has 9 query heads"):
        refuse_ranks(blocks_of(PUBLISHED["smollm2"][0]), tp, block)


# ---- whole models, a thread for each rank

class Together:
    """What `count` threads bring becomes a list that all of them have, in the order of the ranks."""

    def __init__(self, count):
        self.parts, self.barrier, self.lock = [None] * count, threading.Barrier(count, timeout=60), threading.Lock()

    def alone(self, op):
        def run(*args, **kwargs):
            with self.lock:
                return op(*args, **kwargs)
        return run

    def all(self, rank, part):
        self.parts[rank] = part.clone()
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def sum(self, rank, part):
        first, *others = self.all(rank, part)
        return sum(others, first)


def kernels_of(rank, together):
    """The references of a rank, one at a time, and exchanges among threads."""
    own = load_kernels("cpu")
    names = [field.name for field in dataclasses.fields(own) if callable(getattr(own, field.name))]

    def all_reduce(x, out, residual=None):
        total = together.sum(rank, x)
        out.copy_(total if residual is None else residual + total)

    def all_gather(x, out):
        out.copy_(torch.cat(together.all(rank, x), 1)[:, :out.shape[1]])

    return dataclasses.replace(own, **{name: together.alone(getattr(own, name)) for name in names},
                               all_reduce=all_reduce, all_gather=all_gather)


def logits_of(model, kernels, steps, results, rank, tables):
    try:
        transformer = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=20, num_slots=20, max_tokens=64, dtype="float32")
        assert (transformer.weights["head"] is transformer.weights["embed"]) == model.architecture.head.tied
        tables[rank] = transformer.weights["embed"]
        results[rank] = torch.cat([forward_logits(transformer, step) for step in steps])
    except BaseException as failure:
        results[rank] = failure
        raise


def check_the_ranks_together_are_the_model(model, tp):
    random, pages = torch.Generator().manual_seed(SEED), list(range(3, 9))
    tokens = torch.randint(0, model.architecture.vocab_size, (41,), generator=random).tolist()
    steps = [make_batch((tokens, 0, 40, pages)), make_batch((tokens, 40, 1, pages))]
    expected, found, together, whole, tables = {}, {}, Together(tp), {}, {}
    logits_of(model, load_kernels("cpu"), steps, expected, 0, whole)
    threads = [threading.Thread(target=logits_of,
                                args=(shard_model(model, rank, tp), kernels_of(rank, together), steps, found, rank, tables))
               for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(tp):
        assert isinstance(found[rank], torch.Tensor), found[rank]
        assert torch.equal(found[rank], found[0])
    assert (found[0] - expected[0]).abs().max() < 1e-4 * max(1.0, expected[0].abs().max().item())
    rows = -(-model.architecture.vocab_size // tp)
    assert {len(table) for table in tables.values()} == {rows}          # none holds more of the embedding
    assert torch.equal(torch.cat([tables[rank] for rank in range(tp)])[:model.architecture.vocab_size], whole[0])


def check_model(model):
    for tp in (2, 4):
        attn = model.architecture.attentions[0]
        heads = [getattr(mixer, "key_heads", getattr(mixer, "heads", tp)) for mixer in model.architecture.mixers if mixer]
        if any(count % tp for count in heads):
            with pytest.raises(ConfigError, match="key heads in its linear attention, so --tp must be one of 1, 2"):
                shard_model(model, 0, tp)
            continue
        if attn.norms and attn.norms.whole and attn.kv_heads < tp:
            with pytest.raises(ConfigError, match="ranks cannot share because all are normalized together"):
                shard_model(model, 0, tp)
            continue
        if attn.heads < tp:
            with pytest.raises(ConfigError, match=f"cannot be divided among {tp} ranks: it has {attn.heads} query heads"):
                shard_model(model, 0, tp)
            continue
        check_every_part_is_given_out_once(model.architecture, tp)
        check_the_ranks_together_are_the_model(model, tp)


@pytest.mark.parametrize("name", by_day(MODELS, "llama3.1", "gemma3", "qwen3moe", "gpt-oss", "phi3", "lfm2moe", "qwen3.5", "qwen3next", "granite4h"))
def test_the_ranks_of_every_family_are_the_model(name, tmp_path):
    check_model(load(save(make_model(name), tmp_path)))


@pytest.mark.parametrize("name", by_day(["qwen3.5", "qwen3next", "granite4h", "lfm2", "qwen3.5moe"], "qwen3.5"))
def test_a_gguf_s_ranks_with_states_are_the_model(name, tmp_path):
    """Value heads of Qwen3.5 lie in another order there: a rank's columns of out_proj are not side by side."""
    check_model(load(as_gguf(tmp_path / "whole.gguf", make_model(name))))
    if name == "qwen3.5":       # with heads of whole blocks no packed value changes
        model = make_model(name, linear_value_head_dim=32, linear_key_head_dim=32)
        check_model(load(as_gguf(tmp_path / "packed.gguf", model, quantized=True)))


@pytest.mark.parametrize("name, stages", [("lfm2", 3), ("qwen3.5", 4), ("granite4h", 2), ("gemma4", 4), ("gemma4moe", 3), ("gpt2", 2), ("cohere2", 3), ("nemotron-h", 3)])
@torch.inference_mode()
def test_each_stage_keeps_its_own_states_and_keys(name, stages, tmp_path):
    """Some of these stages have layers with states alone, or none; the embeddings of each layer are passed on."""
    model, pages = load(save(make_model(name), tmp_path)), list(range(3, 9))
    tokens = torch.randint(0, 256, (41,), generator=torch.Generator().manual_seed(SEED)).tolist()
    expected, parts = {}, [stage_model(model, stage, stages) for stage in range(stages)]
    steps = [make_batch((tokens, 0, 40, pages)), make_batch((tokens, 40, 1, pages))]
    logits_of(model, load_kernels("cpu"), steps, expected, 0, {})
    made = [Transformer(part.architecture, dict(part.tensors), load_kernels("cpu"), num_pages=20, num_slots=20, max_tokens=64, dtype="float32") for part in parts]
    for step, logits in zip(steps, expected[0]):
        for before, stage in zip([None, *made], made):
            for passed in stage.passed_on(0) if before else ():
                stage.buffers[passed].copy_(before.buffers[passed])
            found = forward_logits(stage, step)
        torch.testing.assert_close(found[0], logits, rtol=1e-5, atol=1e-5)
    assert [len(stage.layout.group) for stage in made] == [len(layers_of(model.architecture, n, stages)) for n in range(stages)]
    assert sum(part.architecture.state_bytes for part in parts) == model.architecture.state_bytes == sum(
        state.nbytes for stage in made for layer in stage.states for state in layer) // 20
    assert sum(part.architecture.paged_layers for part in parts) == model.architecture.paged_layers
    assert [model.architecture.input.layers is not None and part.architecture.opens for part in parts] == ["layer_embed" in part.tensors for part in parts]


@pytest.mark.parametrize("name, tp, words, stages", [
    ("gemma-4-E2B", 9, "it has 8 query heads", 14), ("gemma-4-E4B", 9, "it has 8 query heads", 23), ("gemma-4-31B", 33, "it has 32 query heads", 60),
    ("gemma-4-26B-A4B", 17, "it has 16 query heads", 30)])
def test_gemma_4_is_divided_by_each_layer_s_heads(name, tp, words, stages, tmp_path):
    """Published shapes of Gemma 4 are divided by the heads of each layer."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA4_CONFIGS[name]))
    spec = hf_blocks(tmp_path / "config.json", None)[1]
    own = [next(layer for layer in spec.layers if bool(layer.mixer.window) == limited) for limited in (True, False)]
    last = [layer if layer.mixer.source is None else dataclasses.replace(layer, mixer=dataclasses.replace(
        layer.mixer, source=0 if layer.mixer.window else 1)) for layer in spec.layers[-2:]]
    few = dataclasses.replace(spec, layers=(*own, *last))
    for ranks in (2, 3, 8):
        check_every_part_is_given_out_once(few, ranks)
    with pytest.raises(ConfigError, match=f"cannot be divided among {tp} ranks: {words}"):
        refuse_ranks(blocks_of(spec), tp, 1)
    for count in (2, stages):
        parts = [layers_of(blocks_of(spec), stage, count) for stage in range(count)]
        assert [*itertools.chain(*parts)] == [*range(len(spec.layers))] and all(parts)
        assert all(its.source is None or its.source in part for part in parts for l in part if (its := spec.layers[l].mixer))
    with pytest.raises(ConfigError, match=f"cannot be divided into {stages + 1} stages|the model has {stages} layers, which cannot be"):
        stage_model(loaded(spec, {}), 0, stages + 1)


@pytest.mark.parametrize("name", GENERATIONS)
def test_ranks_of_every_nanochat_are_the_model(name, nanochat_fixtures):
    """The ranks of every nanochat generation together are the model."""
    settings = Settings(model=str(nanochat_fixtures / name), dtype="float32")
    check_model(open_model(resolve_model(settings), settings))


@pytest.mark.parametrize("name", KINDS)
def test_ranks_of_mixed_attention_are_the_model(name):
    """The ranks of a model whose layers attend in several ways together are the model."""
    spec, tensors = kinds_model(name)
    check_every_part_is_given_out_once(spec, 2)
    check_the_ranks_together_are_the_model(loaded(spec, tensors), 2)
