"""Keys and values of 8 bits: answers have the same bits however they are computed, and logits are near those of floats."""

import math
from types import SimpleNamespace

import numpy
import pytest
import torch

from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.build import build_engine
from chatlm.worker.memory_plan import layers_of_floats
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.kernels import Kernels
from chatlm.worker.model.pages import KvType, PageLayout, group_layers
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ops.packed_kv import PackedKv, turned
from attention_kinds import attention
from command_line import parse_command_line
from engines import forward_logits, make_batch, tokens_of
from families import load, save_packed
from nightly import by_day
from works import assignment

PACKED = KvType("float32", packed=True)
BACKENDS = ["reference", pytest.param("decode_core", marks=pytest.mark.skipif(decode_core() is None, reason="not built"))]


# gemma2: windows and capped scores; gpt-oss: sinks; gemma4: some heads of 16, which stay floats, others of 32; qwen3.5: layers with states;
# kimi2: latents
FAMILIES = ["gemma2", "gpt-oss", "gemma4", "qwen3", "qwen3.5", "cohere2", "kimi2"]


def logits_of(folder, ids, kv, backend):
    model = load(folder)
    limits = {"max_tokens": 256, "max_rows": 8}
    kernels = load_kernels("cpu", model.architecture if backend == "decode_core" else None, **limits)
    groups = group_layers(model.architecture.by_layer, 512, kernels.backend.groups_layers, kv)
    count = len(groups.windows)
    transformer = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=20 * count, num_slots=20 * count,
                              dtype="float32", groups=groups, kv=kv, **limits)
    pages = numpy.random.default_rng(1).permutation(20 * count).tolist()
    return torch.cat([forward_logits(transformer, make_batch((ids, done, count, pages))) for done, count in ((0, 120), (120, 79), (199, 1))])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", by_day(FAMILIES, "gemma2", "gemma4", "kimi2"))
def test_packed_logits_are_near_those_of_floats(made_model, name, backend):
    """Logits are near those of floats, and both backends agree."""
    folder, cases = made_model(name)
    ids = cases[0].prompt[:200]
    floats, packed = (logits_of(folder, ids, kv, backend) for kv in (KvType("float32"), PACKED))
    spread = floats.std()
    assert 0 < (packed - floats).abs().max() < 0.12 * spread
    if backend == "decode_core":
        reference = logits_of(folder, ids, PACKED, "reference")
        assert (packed - reference).abs().max() < 0.12 * spread


def test_turning_keeps_large_numbers_from_others():
    """Large numbers cost no others their precision once turned."""
    heads = torch.randn(7, 2, 64, generator=torch.Generator().manual_seed(1))
    heads[..., 5] = 60.0
    kept = PackedKv(torch.zeros(9, 2, 64, dtype=torch.int8), torch.zeros(9, 2, 2, dtype=torch.float16))
    slots = torch.tensor([3, 1, 4, 0, 5, 8, 2])
    kept.put(slots, heads)
    error = (turned(kept.floats()[slots]) - heads).abs()
    assert error.max() < 0.15 and error.square().mean().sqrt() < 60 / 127 / math.sqrt(12) / 2    # unturned, of its 32 it is that without the half
    assert not kept.codes[6:8].any()


def test_parts_of_latents_are_turned_by_themselves():
    """A latent and what follows it are turned apart, so that values need only the first numbers of keys."""
    keys = torch.randn(5, 1, 128, generator=torch.Generator().manual_seed(2))
    kept, values = PackedKv(torch.zeros(5, 1, 128, dtype=torch.int8), torch.zeros(5, 1, 4, dtype=torch.float16)).divided(64)
    kept.put(torch.arange(5), keys)
    step = keys.abs().max() / 127 * 2        # a part of turned numbers has larger ones than the part has
    assert (turned(kept.floats(), kept.parts) - keys).abs().max() < step
    assert (turned(values.floats()) - keys[..., :64]).abs().max() < step
    assert (turned(kept.floats()) - keys).abs().max() > 10 * step       # the whole is not turned by one matrix


def test_an_8_bit_page_has_34_bytes_for_32_numbers():
    """A page of 8 bits has 34 bytes for 32 numbers, and tells itself from others."""
    attentions = [attention(8, 2, 64)] * 3
    layouts = {}
    for kv in (KvType("bfloat16"), KvType("float16"), KvType("float32"), PACKED):
        layouts[PageLayout.of(group_layers(attentions, 0, kv=kv), attentions, kv)] = kv
    assert len(layouts) == 4
    sizes = [layout.page_bytes for layout in layouts]
    assert sizes == [PAGE_SIZE * 3 * 256 * size for size in (2, 2, 4, 34 / 32)]
    mixed = [attention(8, 2, 64), attention(8, 1, 80)]
    layout = PageLayout.of(group_layers(mixed, 0, kv=PACKED), mixed, PACKED)
    assert layout.types == ("q8_0", "float32") and layout.page_bytes == PAGE_SIZE * (256 * 34 // 32 + 4 * 160)


# ---- as users have it


def engine_of(path, *flags):
    settings = parse_command_line(["serve", str(path), *flags], {})
    return build_engine(resolve_model(settings), settings, torch.device("cpu"))[1]


def test_packed_pages_hold_twice_the_tokens(default_model_path):
    """Twice the tokens fit, and each type can be chosen."""
    tokens = {}
    for kind in ("auto", "bfloat16", "float32", "q8_0"):
        engine = engine_of(default_model_path, "--kv-cache-dtype", kind, "--kv-cache-memory", "16M")
        tokens[kind] = engine.pool.num_pages
        assert {*engine.transformer.layout.types} == {kind} or kind == "auto"
        work = assignment("a", tuple(range(100, 140)), SamplingParams(temperature=0.0), 4, ignore_eos=True)
        assert len(tokens_of(engine, [work])["a"]) == 4
    assert tokens["auto"] == tokens["bfloat16"] and tokens["auto"] // 2 == tokens["float32"] and 1.85 < tokens["q8_0"] / tokens["auto"] < 1.9


NUMBERS = {"Anna": 4718, "Boris": 9032, "Clara": 2756, "David": 6381}
SAID_SINCE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "      # 23 tokens


@pytest.mark.parametrize("ago", by_day([600, 3000], 600))
def test_a_packed_cache_remembers_an_old_number(default_model_path, ago):
    """A number said long ago is told as with floats."""
    text = " ".join(f"The number of {name} is {number}." for name, number in NUMBERS.items()) + f" {SAID_SINCE * (ago // 23)}"
    told = {}
    for kind in ("auto", "q8_0"):
        engine = engine_of(default_model_path, "--kv-cache-dtype", kind, "--kv-cache-memory", "128M")
        prompts = {name: tuple(engine.tokenizer.encode(f"{text}What is the number of {name}? The number of {name} is")) for name in NUMBERS}
        assert all(len(prompt) > ago for prompt in prompts.values())
        works = [assignment(name, prompt, SamplingParams(temperature=0.0), 6, ignore_eos=True) for name, prompt in prompts.items()]
        told[kind] = {work.id: engine.tokenizer.decode(tokens_of(engine, [work])[work.id]) for work in works}       # one by one: they share the text
    assert told["q8_0"] == told["auto"]
    assert [name for name, words in told["auto"].items() if str(NUMBERS[name]) in words] == ["Anna", "Boris", "Clara"]     # the model is small


@pytest.mark.skipif(decode_core() is None, reason="the types and the promise are decode_core's")
def test_mxfp4_experts_answer_alike_over_packed_pages(tmp_path, one_thread):
    """With experts of MXFP4, answers are the same alone and together."""
    save_packed(tmp_path)
    engine = engine_of(tmp_path, "--kv-cache-dtype", "q8_0", "--kv-cache-memory", "16M")
    assert engine.transformer.layout.types == ("q8_0",) * 4 and "mxfp4" in engine.transformer.matrix_types
    works = [assignment(f"w{i}", tuple(range(i, 60 + 40 * i)), SamplingParams(temperature=0.0), 20, ignore_eos=True) for i in range(3)]
    alone = {work.id: tokens_of(engine, [work])[work.id] for work in works}
    assert tokens_of(engine, works[::-1]) == alone


def test_kernels_that_do_not_read_it_are_named():
    kernels = Kernels(backend=SimpleNamespace(name="decode_core/other", packs_kv=False, stored_dtype=None, short_floats=""))
    with pytest.raises(ConfigError, match="^--kv-cache-dtype q8_0: decode_core/other has no kernels that read it; auto, bfloat16 and float32 are possible$"):
        kernels.kv_type("q8_0", None)
    assert kernels.kv_type("bfloat16", None) == KvType("bfloat16")


def test_heads_that_cannot_be_turned_stay_floats(made_model, caplog):
    """Heads that cannot be turned stay floats, and the log or an error says so."""
    engine = engine_of(made_model("gemma4")[0], "--kv-cache-dtype", "q8_0", "--kv-cache-memory", "16M", "--dtype", "float32")
    assert {*engine.transformer.layout.types} == {"q8_0", "float32"}
    assert "layers stay float32: their heads have a size of 16, and q8_0 needs heads whose size is a power of two, at least 32" in caplog.text
    with pytest.raises(ConfigError, match="--kv-cache-dtype q8_0: all layers have heads of 16; q8_0 needs"):
        engine_of(made_model("llama2")[0], "--kv-cache-dtype", "q8_0")
    wide = SimpleNamespace(attentions=[attention(8, 2, 64), attention(8, 2, 96), attention(8, 2, 128, 80)])
    assert layers_of_floats(wide, PACKED).startswith("keys and values of 2 of 3 layers stay float32: their heads have a size of 80, 96, and")
    assert layers_of_floats(wide, KvType("float32")) == ""
    with pytest.raises(ConfigError, match="invalid choice: .q4_0. .choose from .auto., .bfloat16., .float32., .q8_0.."):
        parse_command_line(["serve", "--kv-cache-dtype", "q4_0"], {})


