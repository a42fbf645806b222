"""Gemma 4 beyond what test_families.py compares: published configs, files of other shapes, its tokenizer, and embeddings that stay in the file."""

import ctypes
import json
import mmap
import os
import re
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, trainers

from chatlm.common.config import Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.protocol import NO_GAUGES
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.arrays.kinds import address_of
from chatlm.worker.build import build_engine
from chatlm.worker.gauges import Gauges
from chatlm.worker.kernels.choosing import choose_backend, load_kernels
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.model.tensors import MappedRows, advise
from chatlm.worker.weights.formats.folder.description import hf_blocks
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.formats.gguf.file import read_gguf
from chatlm.worker.weights.formats.gguf.tensors import mapped_table
from engines import tensors_of, tokens_of
from families import answers, as_gguf, check, clear_cases, kernels_of, load, make_model, save, tiny_config, transformer, with_exact_angles
from hub_configs import GEMMA4_CONFIGS
from tiny_gguf import small_gguf_metadata, write_gguf
from works import assignment

pytestmark = pytest.mark.usefixtures("one_thread")


def spec_of(folder, name, **changes):
    config = GEMMA4_CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | changes}))
    return hf_blocks(folder / "config.json", None)[1]


@pytest.mark.parametrize("name, billions, kib", [("gemma-4-E2B", 4.6, 18), ("gemma-4-E4B", 7.5, 56), ("gemma-4-31B", 30.7, 880), ("gemma-4-26B-A4B", 25.2, 220)])
def test_gemma_4_configs_read_as_in_transformers(name, billions, kib, tmp_path):
    """Published configs mean what transformers takes them to mean."""
    import transformers
    spec = spec_of(tmp_path, name)
    config = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    sizes = {key: int(np.prod(shape)) for key, shape in spec.shapes().items() if key != "head" and not key.endswith(".scalar")}
    assert sum(parameter.numel() for parameter in made.parameters()) == sum(sizes.values())
    assert round(sum(sizes.values()) / 1e9, 1) == billions
    assert 2 * sum(its.slot_size for its in spec.by_layer) == kib << 10        # of keys and values for each token, in bfloat16
    own = config.num_hidden_layers - config.num_kv_shared_layers
    for layer, (its, kind) in enumerate(zip(spec.attentions, config.layer_types)):
        theirs, attention = config.per_layer_config[layer], made.model.layers[layer].self_attn
        assert (its.kv_heads, its.head_size, its.window) == (theirs.num_key_value_heads, theirs.head_dim, attention.sliding_window or 0)
        assert its.scores.scale == its.head_size**0.5 and its.value_norm and its.values_from_keys == (layer < own and attention.v_proj is None)
        source = max(l for l in range(own) if config.layer_types[l] == kind)
        assert its.source == (source if attention.is_kv_shared_layer else None)
        frequencies = getattr(made.model.rotary_emb, f"{kind}_inv_freq")
        assert len(its.rope.factors or frequencies) == len(frequencies) == its.head_size // 2
        assert (its.rope.factors or (1.0,) * len(frequencies)).count(1.0) == (64 if kind == "full_attention" else 128)
    assert spec.input.scale == config.hidden_size**0.5 and spec.head.softcap == 30.0 and spec.max_positions == config.max_position_embeddings


def test_a_config_may_list_full_layers_sizes_singly(tmp_path):
    sizes = {str(l): {"head_dim": 512, "num_key_value_heads": 2} for l in range(5, 30, 6)}
    once = spec_of(tmp_path, "gemma-4-26B-A4B")
    assert spec_of(tmp_path, "gemma-4-26B-A4B", per_layer_config={layer.zfill(2): size for layer, size in sizes.items()}) == once   # as transformers saves them
    assert spec_of(tmp_path, "gemma-4-26B-A4B", per_layer_config=sizes, global_head_dim=None, num_global_key_value_heads=None) == once


@pytest.mark.parametrize("name", ["gemma4", "gemma4moe"])
def test_tiny_gemma_4_models_match_transformers(name, tmp_path):
    """A part, by day, of what test_families.py compares."""
    model = make_model(name)
    cases = clear_cases(model, lengths=(40,), count=8, tried=3)
    for path in (save(model, tmp_path), as_gguf(tmp_path / "tiny.gguf", model)):
        for backend in ("reference", "decode_core") if decode_core() else ("reference",):
            ours = load(path)
            check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases, chunk=30, count=8), cases, count=8)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(folder, its model by transformers) of the tiny dense model."""
    model = make_model("gemma4")
    return save(model, tmp_path_factory.mktemp("gemma4")), model


def test_a_gemma_4_with_images_is_its_text_model(dense, tmp_path):
    """A folder with images and sound whose shared layers have keys is the same text model."""
    folder, _ = dense
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(GEMMA4_CONFIGS["gemma-4-E2B"] | {"text_config": config}))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    renamed |= {f"model.language_model.layers.7.self_attn.{part}.weight": torch.zeros(3) for part in ("k_proj", "v_proj", "k_norm")}
    renamed |= {f"model.{part}.a": torch.zeros(2) for part in ("vision_tower", "embed_vision", "audio_tower", "embed_audio")}
    save_file(renamed, tmp_path / "model.safetensors")
    ours, theirs = load(tmp_path), load(folder)
    assert ours.architecture == theirs.architecture
    theirs = tensors_of(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors_of(ours).items())


@pytest.mark.slow
def test_a_whole_unified_model_is_its_text_model(tmp_path):
    """Saved by transformers with its encoders of images and sound."""
    import transformers
    text, sides = tiny_config("gemma4-unified"), dict(initializer_range=0.02)
    config = transformers.Gemma4UnifiedConfig(
        text_config=text.to_dict(), audio_config=sides | {"audio_embed_dim": 32}, image_token_id=270, video_token_id=271, audio_token_id=272,
        vision_config=sides | {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 8, "output_proj_dims": 64})
    torch.manual_seed(0)
    whole, alone = transformers.AutoModelForImageTextToText.from_config(config), make_model("gemma4-unified")
    whole.model.language_model.load_state_dict(alone.model.state_dict())
    save(whole, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma4_unified"
    assert {name.split(".")[1] for name in load_file(tmp_path / "model.safetensors")} >= {"language_model", "embed_audio"}
    ours, cases = load(tmp_path), clear_cases(with_exact_angles(alone), lengths=(40,), count=8, tried=3)
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, chunk=30, count=8), cases, count=8)


def test_a_unified_text_model_has_usual_defaults(tmp_path):
    """Its defaults are those of transformers."""
    import transformers
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma4_unified", "text_config": {
        "hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
        "attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0}}))
    (family, spec), config = hf_blocks(tmp_path / "config.json", None), transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(int(np.prod(shape)) for key, shape in spec.shapes().items() if key != "head" and not key.endswith(".scalar"))
    assert family == config.model_type == "gemma4_unified_text" and sum(parameter.numel() for parameter in made.parameters()) == count
    assert spec.max_positions == config.max_position_embeddings == 262_144 and spec.input.layers is None and spec.tied
    assert spec.windows == tuple(1024 * (kind == "sliding_attention") for kind in config.layer_types)
    assert not_compiled(spec) == ""


def test_a_gguf_may_have_gates_and_ups_apart(tmp_path):
    """A GGUF file may have gates and ups apart and keys of layers that share others."""
    for name in ("gemma4moe", "gemma4"):
        path = as_gguf(tmp_path / f"{name}.gguf", make_model(name))
        metadata, stored = read_gguf(path)
        tensors = {key: tensor.data for key, tensor in stored.items()}
        for key in [key for key in tensors if key.endswith("ffn_gate_up_exps.weight")]:
            gates, ups = np.split(tensors.pop(key), 2, 1)
            tensors |= {key.replace("gate_up", "gate"): gates, key.replace("gate_up", "up"): ups}
        tensors |= {"blk.7.attn_k.weight": np.zeros((4, 64), np.float32), "blk.7.attn_k_norm.weight": np.zeros(32, np.float32)} if name == "gemma4" else {}
        own = {key: value for key, value in metadata.items() if key.startswith("gemma4.")}
        write_gguf(tmp_path / "other.gguf", tensors, own, small_gguf_metadata("gpt-2") | {"general.architecture": "gemma4"})
        ours, theirs = load(tmp_path / "other.gguf"), load(path)
        assert ours.architecture == theirs.architecture
        theirs = tensors_of(theirs)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in tensors_of(ours).items())


# --- the tokenizer -----------------------------------------------------------------------------------------------


CORPUS = [line for line in re.split(r"(?<=\n)", open("docs/models/families.md").read()[:9000] + "def f(x):\n\treturn  [x]\n\n\n日本語 日本\n" * 9) if line]
TEXTS = ["", " ", "Hello  world", "\n\n\n", " a\n\n b\t\tc", "日本語 😀 é́ \u200b", "<|turn>user\nHi<turn|>\n", "▁▁", "x" * 50, "def f(x):\n    return [x]\n"]


def gemma4_tokenizers():
    """A vocabulary of Gemma 4's kind: (transformers' tokenizer of it, what llama.cpp's converter writes of it)."""
    from transformers import GemmaTokenizer
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|tool_response>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n", "\n\n\n"]
    family = tokenizers.Tokenizer(models.BPE())
    family.normalizer = normalizers.Replace(" ", "▁")
    family.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=1100, limit_alphabet=90, special_tokens=special, show_progress=False))
    model = json.loads(family.to_str())["model"]
    merges = [*map(tuple, model["merges"]), ("\n", "\n"), ("\n\n", "\n")]
    theirs = GemmaTokenizer(vocab=model["vocab"], merges=merges, additional_special_tokens=["<|turn>", "<turn|>", "<|tool_response>"])
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    types = [3 if i < 8 else 6 if i < 264 else 1 for i in range(len(tokens))]
    types[5:8] = 3, 3, 4                # the converter shows tokens of tools
    return theirs, {
        "general.architecture": "gemma4", "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [-1000.0] * len(tokens),
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": [" ".join(merge) for merge in merges], "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": True}


def test_a_gguf_s_tokenizer_matches_transformers(tmp_path):
    theirs, metadata = gemma4_tokenizers()
    path = write_gguf(tmp_path / "vocabulary.gguf", {}, {}, metadata)
    text = gguf_text(path, read_gguf(path)[0])
    assert (text.bos_token, text.eos_token, text.add_bos, text.stop_tokens) == (2, 1, True, {1, 6, 7})
    ours, dice = open_tokenizer(text), np.random.default_rng(3)
    words = "".join(CORPUS)
    cut = [words[start:start + 60] for start in dice.integers(0, len(words) - 60, 40)]
    for text in [part for whole in TEXTS + cut for part in re.split(r"<[a-z_|]*>", whole)]:       # special tokens are text in a message
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == text.replace("▁", " ")
    for key in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"):     # llama.cpp does not believe older files
        del metadata[key]
    again = gguf_text(path, metadata | {"tokenizer.ggml.add_bos_token": False})
    assert again.add_bos and open_tokenizer(again).encode("a b") == ours.encode("a b")
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(ConfigError, match="tokenizer.ggml.merges is missing"):
        gguf_text(path, metadata)


# --- embeddings of each layer ------------------------------------------------------------------------------------


ROWS = 600


def large_table(tmp_path, form):
    """A tiny model whose embeddings of each layer have rows of several pages, from a file of this form."""
    model = make_model("gemma4", vocab_size=ROWS, vocab_size_per_layer_input=ROWS, hidden_size_per_layer_input=1024)
    if form == "folder":
        return save(model, tmp_path), model
    letters = small_gguf_metadata("gpt-2")
    tokens = letters["tokenizer.ggml.tokens"] + [f"<{i}>" for i in range(ROWS - len(letters["tokenizer.ggml.tokens"]))]
    metadata = letters | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * ROWS}
    return as_gguf(tmp_path / "tiny.gguf", model, quantized=form == "q8_0", metadata=metadata), model


def resident(rows):
    """Of each row of a MappedRows, whether all of its pages are in memory; and how many pages of the table are."""
    page, table = mmap.PAGESIZE, rows.table
    begin = address_of(table) // page * page
    pages = -(-(address_of(table) + table.nbytes - begin) // page)
    held = (ctypes.c_ubyte * pages)()
    assert not ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(pages * page), held)
    held = np.frombuffer(held, np.uint8) & 1
    starts = address_of(table) - begin + np.arange(len(table)) * table[0].nbytes
    return [bool(held[start // page:-(-(start + table[0].nbytes) // page)].all()) for start in starts], int(held.sum())


def forget(rows, path):
    """Drop the table's pages from memory, as the system does when it needs them."""
    advise((rows.table,), "MADV_DONTNEED")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(rows)[1]


@pytest.mark.parametrize("form", ["folder", "f32", "q8_0"])
def test_a_token_reads_one_row_of_the_file(form, tmp_path):
    """A token reads one row of the file, and a prompt's rows are read ahead."""
    path, _ = large_table(tmp_path, form)
    settings = Settings(model=str(path), dtype="float32", max_batch=4, kv_cache_memory=4 << 20)
    model, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
    rows = engine.transformer.layer_embed
    assert isinstance(rows, MappedRows) and rows.nbytes == 0 and rows.file_bytes == rows.table.nbytes
    file = path / "model.safetensors" if form == "folder" else path
    if forget(rows, file) > 4:
        pytest.skip("this file system keeps what it is asked to forget")
    per_row = -(-rows.table[0].nbytes // mmap.PAGESIZE) + 1
    greedy = SamplingParams(temperature=0.0)
    tokens = tokens_of(engine, [assignment("a", [7], greedy, 6)])["a"]
    assert len(tokens) == 6 and {7, *tokens[:5]} <= {row for row, held in enumerate(resident(rows)[0]) if held}
    assert resident(rows)[1] <= len({7, *tokens}) * per_row + 4       # and none of their neighbours
    for name, token in (("c", 9), ("d", 11)):
        engine.add(assignment(name, [token], greedy, 4))
    steps = 0
    while engine.busy:
        kept, steps = forget(rows, file), steps + 1
        engine.step()
        assert resident(rows)[1] <= kept + 2 * per_row      # a row of each sequence
    assert steps >= 4
    forget(rows, file)
    engine.add(assignment("b", [5, 300, 301, 302, 599], greedy, 1))
    for _ in range(1000):               # the disk answers when it can
        held = resident(rows)[0]
        if all(held[row] for row in (5, 300, 301, 302, 599)):
            break
        os.sched_yield()
    assert all(held[row] for row in (5, 300, 301, 302, 599)) and sum(held) < 20


def test_gauges_say_what_stays_in_the_file(dense, caplog):
    """The memory line and the gauges say what stays in the file and what is kept of a token."""
    settings = Settings(model=str(dense[0]), dtype="float32", kv_cache_memory=4 << 20, verbose=True)
    with caplog.at_level("INFO", logger="chat_server"):
        model, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
    kept = 4 * (3 * 2 * (2 * 16) + 2 * 2 * (2 * 32))     # of five layers with two heads of keys; the last three read theirs
    assert any("GB of embeddings of each layer stay in the file, of which a token reads one row" in line and f"({kept:,} bytes a token) = " in line
               for line in caplog.messages)
    found = Gauges(engine).read()
    assert (found["kv_token_bytes"], found["mapped_bytes"]) == (kept, 4 * 288 * 8 * 32) and found.keys() == NO_GAUGES.keys()


@pytest.mark.skipif(decode_core() is None, reason="torch computes everything then")
@pytest.mark.parametrize("name", GEMMA4_CONFIGS)
def test_torch_computes_gemma_4_on_a_gpu(name, tmp_path, caplog):
    """torch computes Gemma 4 on a GPU, and one line says so."""
    spec = spec_of(tmp_path, name)
    assert choose_backend("cuda", spec) and load_kernels("cuda", spec).backend.name == "torch/reference"
    [line] = caplog.messages
    assert "attention of several kinds on a GPU, which this model needs: torch computes instead" in line


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16", "F32"])
def test_rows_of_each_type_are_the_whole_table_s(kind):
    gguf_type, values = gguf.GGMLQuantizationType[kind], np.random.default_rng(2).standard_normal((9, 512), np.float32)
    tensor = SimpleNamespace(tensor_type=gguf_type, data=gguf.quantize(values, gguf_type))
    out, whole = torch.empty(4, 512), gguf.dequantize(tensor.data, gguf_type).astype(np.float32)
    out.copy_(torch.from_numpy(mapped_table(tensor).look_up(np.array([8, 0, -1, 3]))))
    assert torch.equal(out, torch.from_numpy(whole[[8, 0, 0, 3]]))
