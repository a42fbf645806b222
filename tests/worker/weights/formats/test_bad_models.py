"""Whatever a model file holds, it is a model or one line that names the file and what is wrong."""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import gguf
import numpy
import pytest
import torch

import chat_server
import forked
from chatlm.common.config import Settings
from chatlm.common.core import decode_core, installed_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.memory import available_memory
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.build import build_engine
from chatlm.worker.model.tensors import Unread, read_ahead
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.loaded.shards import shard_model, stage_model
from families import make_model, save
from nightly import by_day
from packers import PACKED, pack_folder
from tiny_gguf import (LLAMA_NUMBERS, gguf_bytes, packed_text, random_llama, sentencepiece_metadata,
                       small_gguf_metadata, tensor_info, write_gguf)

METADATA = {**LLAMA_NUMBERS, **small_gguf_metadata("gpt-2")}
TOKENS = METADATA["tokenizer.ggml.tokens"]
NAN, INFINITY = float("nan"), float("inf")


def load(path, **changes):
    """What a worker builds from a file before it reports what it has loaded: (LoadedModel, Engine). Its tokenizer
    is opened as the front opens it."""
    settings = Settings(model=str(path), kv_cache_memory=1 << 20, prefill_chunk=16, max_batch=4, **changes)
    model, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
    try:
        open_tokenizer(model.text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return model, engine


def error_of(path):
    """The error line for a file that is not a model; it must name the file, or one in its folder."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text and text.isprintable() and len(text) < 4100
    return text


# --- GGUF: metadata ------------------------------------------------------------------


@pytest.fixture
def bad_gguf(tmp_path):
    """A function that gives the error for a good tiny GGUF with the given changes (see gguf_bytes)."""
    def error(changes=(), base=METADATA, tensors=None, **more):
        metadata = {key: value for key, value in {**base, **dict(changes)}.items() if value is not None}
        path = tmp_path / "tiny.gguf"
        path.write_bytes(gguf_bytes(metadata, random_llama() if tensors is None else tensors, **more))
        return error_of(path)
    return error


def test_the_good_one_is_a_model(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(gguf_bytes(METADATA, random_llama()))
    model, engine = load(tmp_path / "tiny.gguf")
    assert len(model.architecture.layers) == 1 and engine.tokenizer.decode(engine.tokenizer.encode("hello")) == "hello"


COUNT = "must be an integer from 1 to "
@pytest.mark.parametrize("key, value, words", [
    ("llama.block_count", 2**31, "is 2147483648; it must be an integer from 1 to 10,000"),
    ("llama.block_count", 0, "is 0; it " + COUNT), ("llama.block_count", "2", 'is "2"; it ' + COUNT),
    ("llama.block_count", True, "is true; it " + COUNT),
    ("llama.block_count", None, "is missing; it " + COUNT),
    ("llama.block_count", [1, 1], "is a list of 2; it " + COUNT),
    ("llama.attention.head_count", 0, "is 0; it " + COUNT),
    ("llama.attention.head_count", -4, "is -4; it " + COUNT),
    ("llama.attention.head_count", 3, "is 3; it must be a multiple of 2 (llama.attention.head_count_kv)"),
    ("llama.attention.head_count", 6,
     "llama.embedding_length is 256; it must be a multiple of 12 (2 * llama.attention.head_count)"),
    ("llama.attention.head_count_kv", 0, "is 0; it " + COUNT),
    ("llama.attention.head_count_kv", [2, 1], "is a list of 2; it " + COUNT),
    ("llama.attention.key_length", 33, "is 33; it must be a multiple of 2"),
    ("llama.attention.key_length", 2**40, "is 1099511627776; it must be an integer from 2 to 1,048,576"),
    ("llama.attention.value_length", 32, "is 32; it must be 64"),
    ("llama.rope.dimension_count", 66, "is 66; it must be an integer from 2 to 64"),
    ("llama.embedding_length", 0, "is 0; it " + COUNT), ("llama.embedding_length", 2**62, "it " + COUNT),
    ("llama.embedding_length", 256.0, "is 256.0; it " + COUNT),
    ("llama.feed_forward_length", "wide", 'is "wide"; it ' + COUNT),
    ("llama.context_length", 0, "is 0; it must be an integer from 16 to "),
    ("llama.context_length", 2**63, "it must be an integer from 16 to 67,108,864"),
    ("llama.attention.layer_norm_rms_epsilon", NAN, "is NaN; it must be a finite number from 0 to 1"),
    ("llama.attention.layer_norm_rms_epsilon", -1e-5, "it must be a finite number from 0 to 1"),
    ("llama.rope.freq_base", INFINITY, "is Infinity; it must be a finite number from 2 to 1,000,000,000,"),
    ("llama.rope.freq_base", 0.0, "is 0.0; it must be a finite number from 2"),
    ("llama.rope.freq_base", "10000", "a finite number"),
    ("llama.rope.scaling.type", "dynamic", 'is "dynamic"; it must be one of none, linear'),
    ("llama.rope.scaling.type", 3, "is 3; it must be one of none, linear"),
    ("general.architecture", 5, "is 5; it must be a text"),
    ("tokenizer.ggml.model", "rwkv", 'is "rwkv"; it must be one of gpt2, llama'),
    ("tokenizer.ggml.model", None, "is missing"),
    ("tokenizer.ggml.pre", "vikings", 'is "vikings"; it must be one of default, gpt-2'),
    ("tokenizer.ggml.pre", 1.5, "is 1.5; it must be one"),
    ("tokenizer.chat_template", 12, "is 12; it must be a text"),
    ("tokenizer.chat_template", ["{{ a }}"], "is a list of 1; it must be a text"),
    ("tokenizer.ggml.tokens", [], "tokens has 0 entries; it must have 1 to 270"),
    ("tokenizer.ggml.tokens", None, "is missing; it must be a list"),
    ("tokenizer.ggml.tokens", "abc", "it must be a list of texts"),
    ("tokenizer.ggml.tokens", [1, 2], "tokens[0] is 1; it must be a text"),
    ("tokenizer.ggml.tokens", [*TOKENS, "more"], "tokens has 271 entries; it must have 1 to 270, the number of rows"),
    ("tokenizer.ggml.token_type", [1], "is a list of 1; it must be a list of 270 integers from 0 to 255"),
    ("tokenizer.ggml.token_type", [-1] * 270, "token_type[0] is -1; it must be an integer from 0 to 255"),
    ("tokenizer.ggml.token_type", ["a"] * 270, 'token_type[0] is "a"; it must be'),
    ("tokenizer.ggml.merges", None, "is missing; it must be a list of texts"),
    ("tokenizer.ggml.merges", [2, 3], "merges[0] is 2; it must be a text"),
    ("tokenizer.ggml.merges", ["nospace"], "tokenizer is broken"),
    ("tokenizer.ggml.merges", ["not there"], "tokenizer is broken"),
    ("tokenizer.ggml.eos_token_id", 10**9, "is 1000000000; it must be an integer from 0 to 269"),
    ("tokenizer.ggml.bos_token_id", -1, "is -1; it must be an integer from 0 to 269"),
    ("tokenizer.ggml.eot_token_id", 270, "from 0 to 269"),
    ("tokenizer.ggml.eom_token_id", "2", 'is "2"; it must be an integer'),
    ("tokenizer.ggml.bos_token_id", 1.0, "is 1.0; it must be an integer"),
    ("tokenizer.ggml.add_bos_token", 1, "is 1; it must be true or false"),
    ("tokenizer.ggml.add_bos_token", "yes", "it must be true or false")])
def test_wrong_metadata_says_what_is_allowed(bad_gguf, key, value, words):
    """Metadata of a wrong type or size is named with what is allowed."""
    error = bad_gguf({key: value})
    assert words in error and (key in error or "broken" in words or "embedding_length" in words)


@pytest.mark.parametrize("key, value, words", [
    ("tokenizer.ggml.scores", [1.0], "is a list of 1; it must be a list of 292 finite numbers"),
    ("tokenizer.ggml.scores", None, "is missing"),
    ("tokenizer.ggml.scores", [NAN] * 292, "scores[0] is NaN; it must be a finite number"),
    ("tokenizer.ggml.scores", ["0"] * 292, 'scores[0] is "0"'),
    ("tokenizer.ggml.unknown_token_id", 292, "from 0 to 291"),
    ("tokenizer.ggml.add_space_prefix", 0, "is 0; it must be true or false")])
def test_so_is_what_sentencepiece_needs(bad_gguf, key, value, words):
    base = {**LLAMA_NUMBERS, **sentencepiece_metadata(), "general.architecture": "llama"}
    assert words in bad_gguf({key: value}, base, random_llama(vocab=len(base["tokenizer.ggml.tokens"])))


def test_a_context_beyond_memory_is_refused(tmp_path):
    """A context that memory cannot hold is refused, and a shorter one serves."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes(METADATA | {"llama.context_length": 1 << 26}, random_llama()))
    if available_memory() < 64 << 30:
        assert "a context of 67,108,864 tokens needs 68,719,476,736 bytes for its rotary" in error_of(path)
    _, engine = load(path, context_length=128)
    assert engine.context_length == 128
    assert {len(table) for tables in engine.transformer.rope_tables for table in tables} == {128}


# --- GGUF: layout of the file ---------------------------------------------------------------


NAME = "blk.0.ffn_up.weight"        # (512, 256) float32, which is type 0


@pytest.mark.parametrize("shape, kind, offset, words", [
    ((512, 256), 0, 1 << 40, NAME + '" ends at byte 1,099,'),
    ((512, 256), 0, 2**64 - 32, "ends at byte 18,446,744,073,"),
    ((1 << 31, 1 << 31), 0, 0, "ends at byte 18,446,744,073,7"),        # 0 in 64 bits
    ((0, 256), 0, 0, "has the sizes [256, 0]; it must have 1 to 4, none below 1"),
    ((), 0, 0, "has the sizes []"), ((1,) * 5, 0, 0, "has the sizes [1, 1, 1, 1, 1]"),
    ((512, 250), 2, 0, "has rows of 250; its type needs a multiple of 32"),
    ((512, 256), 200, 0, "is of type 200, which this program does not know"),
    ((512, 256), 31, 0, "is of type Q4_0_4_4, whose rows are mixed for one kind of CPU; take the file of type Q4_0, which"),
    ((512, 256), 38, 0, "is of type IQ4_NL_8_8, whose rows are mixed for one kind of CPU; take the file of type IQ4_NL, which"),
    ((512, 256), 24, 0, NAME + " is of type I8, which the gguf package cannot dequantize"),
    ((256, 512), 0, 0, NAME + " is (256, 512) instead of (512, 256)"),
    ((131072,), 0, 0, NAME + " is (131072,) instead of (512, 256)")])
def test_a_tensor_unlike_its_announcement_is_named(bad_gguf, shape, kind, offset, words):
    """A tensor that is not in the file as announced is named."""
    assert words in bad_gguf(infos={NAME: tensor_info(NAME, shape, kind, offset)})


@pytest.mark.parametrize("name, words", [
    ("blk.0.attn_q.weight", "is there twice"), ("\x1b[2J\n", "unknown ")])
def test_an_impossible_tensor_name_is_an_error(bad_gguf, name, words):
    assert words in bad_gguf(infos={"more": tensor_info(name, (1, 4), 0, 0)})


def test_tensors_that_share_their_bytes_are_refused(bad_gguf):
    infos = {f"blk.{i}.more": tensor_info(f"blk.{i}.more", (512, 256), 0, 0) for i in range(100)}
    assert re.search(r"tiny.gguf has [\d,]+ bytes, but its tensors would take [\d,]+", bad_gguf(infos=infos))


def test_a_missing_or_flat_embedding_is_named(bad_gguf):
    tensors = random_llama()
    flat = tensors | {"token_embd.weight": tensors["token_embd.weight"].ravel()}
    assert "token_embd.weight is (69120,) instead of (270, 256)" in bad_gguf(tensors=flat)
    del tensors["token_embd.weight"]
    assert "missing token_embd.weight (270, 256)" in bad_gguf(tensors=tensors)


def u32(number):
    return number.to_bytes(4, "little")


def u64(number):
    return number.to_bytes(8, "little")


KEY, TEXT, ARRAY = packed_text("general.more"), u32(8), u32(9)


@pytest.mark.parametrize("more, words", [
    ({"keys": KEY + ARRAY + (ARRAY + u64(1)) * 5000}, "no nested arrays"),
    ({"keys": KEY + ARRAY + u32(0) + u64(2**62)}, "an array has 4,611,686,018,427,387,904 values"),
    ({"keys": KEY + ARRAY + TEXT + u64(2**24)}, "truncated"),
    ({"keys": KEY + ARRAY + u32(99) + u64(1)}, "unknown type 99"),
    ({"keys": KEY + u32(99)}, "unknown type 99"),
    ({"keys": KEY + TEXT + u64(2**63)}, "goes on to byte 9,223,372,036,"),
    ({"keys": packed_text("general.architecture") + TEXT + packed_text("llama")}, "is there twice"),
    ({"keys": KEY + TEXT + packed_text(b"\xff\xfe")}, "utf-8"),
    ({"tensor_count": 2**63}, "9,223,372,036,854,775,808 tensors; at most 131,072"),
    ({"tensor_count": 131_000}, "goes on to byte"), ({"key_count": 2**63}, "goes on to byte"), ({"key_count": 3}, "goes on to byte")])
def test_a_header_that_lies_is_one_line(bad_gguf, more, words):
    error = bad_gguf(**more)
    assert re.search("tiny.gguf is (not a readable GGUF file: |truncated: it has )", error) and words in error


def test_a_gguf_cut_anywhere_is_one_line(tmp_path):
    whole, path = gguf_bytes(METADATA, random_llama()), tmp_path / "tiny.gguf"
    header = len(whole) - sum(tensor.nbytes for tensor in random_llama().values())
    for size in {*range(4, 120), *range(120, header, 61), *range(header - 1, header + 2), len(whole) - 1}:
        path.write_bytes(whole[:size])
        assert f"tiny.gguf is truncated: it has {size:,} bytes, and " in error_of(path)


def test_a_file_of_the_other_byte_order_is_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF\0\0\0\3" + bytes(15) + b"\1" + bytes(100))
    assert "byte order" in error_of(path)


# --- nanochat -------------------------------------------------------------------------------------


@pytest.fixture
def nanochat(nanochat_fixtures, tmp_path):
    """A copy of generation 5: .path, .model, .meta, .pickle."""
    class Nanochat:
        path = shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base")
        model = path / "chatsft_checkpoints/d4/model_000650.pt"
        meta = model.with_name("meta_000650.json")
        pickle = path / "tokenizer" / "tokenizer.pkl"

        def error(self):
            return error_of(self.path)
    return Nanochat()


@pytest.mark.parametrize("key, value, words", [
    ("n_layer", 2**31, "n_layer is 2147483648; it must be an integer from 1 to 10,000"),
    ("n_layer", 0, "n_layer is 0; it must"),
    ("n_layer", 9999, "missing transformer.h.4."), ("n_layer", True, "n_layer is true"),
    ("n_layer", None, "n_layer is missing"),
    ("sequence_len", 10**40, "it must be an integer from 16 to 67,108,864"),
    ("sequence_len", 512.0, "sequence_len is 512.0; it must"),
    ("vocab_size", 2**40, "it must be an integer from 1 to 16,777,216"),
    ("vocab_size", 10**7, "it has 284 tokens, the model 10000000"),
    ("n_head", -4, "n_head is -4; it must be"),
    ("n_head", 5, "n_embd is 64; it must be a multiple of 10 (2 * n_head)"),
    ("n_kv_head", 3, "n_head is 4; it must be a multiple of 3 (n_kv_head)"),
    ("n_kv_head", {"a": 1}, "n_kv_head is an object of 1"),
    ("n_embd", 2**20, "instead of (1048576, 4194304)"),
    ("n_embd", "64", 'n_embd is "64"; it must be an integer'),
    ("window_pattern", 3, "window_pattern is 3; it must be a text"),
    ("window_pattern", "SQ", "it must be of S and L"),
    ("window_pattern", ["S"], "window_pattern is a list of 1"),
    ("n_experts", 8, "model_config has the key \"n_experts\"; known are sequence_len")])
def test_a_meta_file_s_sizes_are_checked_first(nanochat, key, value, words):
    """A meta file's sizes are checked before anything is allocated."""
    meta = json.loads(nanochat.meta.read_text())
    meta["model_config"] = {k: v for k, v in {**meta["model_config"], key: value}.items() if v is not None}
    nanochat.meta.write_text(json.dumps(meta))
    assert words in nanochat.error()


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"model_config": ' * 20_000, '{"model_config": {"n_layer": NaN}}', "\ud800", "null", "",
    '{"model_config": {"n_layer": ' + "9" * 5000 + "}}", '{"model_config": [[1]]}'])
def test_a_meta_file_that_is_none_is_named(nanochat, text):
    nanochat.meta.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert str(nanochat.meta) in nanochat.error()


@pytest.mark.parametrize("value, words", [
    (lambda: torch.zeros(320, 64).to_sparse(),
     "it would load torch._utils._rebuild_sparse_tensor, which no checkpoint needs"),
    (lambda: torch.zeros(320, 64).to_sparse_csr(), "it would load torch._utils._rebuild_sparse_tensor"),
    (lambda: torch.zeros(320, 64, device="meta"), "it would load torch._utils._rebuild_meta_tensor_no_storage"),
    (lambda: torch.quantize_per_tensor(torch.zeros(320, 64), 1.0, 0, torch.qint8), "it would load torch._utils._rebuild_qtensor"),
    (lambda: torch.zeros(320, 64, dtype=torch.complex64), "it would load torch.ComplexFloatStorage"),
    (lambda: torch.zeros(320, 64, dtype=torch.int64), "lm_head.weight is int64; it must be one of float32, bfloat16, float16, float64"),
    (lambda: torch.zeros(320, 64, dtype=torch.bool), "is bool; it must be one of"),
    (lambda: torch.nested.nested_tensor([torch.zeros(2, 64), torch.zeros(3, 64)]), "nested"),
    (lambda: torch.zeros(320), "lm_head.weight is (320,) instead of (320, 64)"),
    (lambda: torch.zeros(()), "lm_head.weight is () instead of (320, 64)"),
    (lambda: torch.zeros(320, 64, 1), "is (320, 64, 1) instead of"),
    (lambda: torch.zeros(0), "is (0,) instead of"), (lambda: 3, "lm_head.weight is int; it must"),
    (lambda: [torch.zeros(2)], "lm_head.weight is list; it must"),
    (lambda: torch.zeros(1).expand(1 << 20, 1 << 20), "would take 4,39"), (lambda: "x", "is str; it must")])
@pytest.mark.parametrize("key", ["lm_head.weight", "transformer.h.1.attn.ve_gate.weight"])
def test_what_is_no_dense_float_tensor_is_named(nanochat, value, words, key):
    state = torch.load(nanochat.model, weights_only=True)
    torch.save(state | {key: value()}, nanochat.model)
    error = nanochat.error()
    assert str(nanochat.model) in error and (key in error or "it would load" in error)
    assert key != "lm_head.weight" or words in error


def test_tensors_that_share_memory_are_refused(nanochat):
    """Tensors that share memory are refused before they are copied."""
    state = torch.load(nanochat.model, weights_only=True)
    shared = torch.zeros(1000, 64)
    torch.save(state | {f"more.{i}": shared for i in range(100)}, nanochat.model)
    assert re.search(r"model_000650.pt has [\d,]+ bytes, but its tensors would take [\d,]+", nanochat.error())


@pytest.mark.parametrize("state", [torch.zeros(3), [1], {1: torch.zeros(2)}, {("a", "b"): torch.zeros(2)}])
def test_what_is_no_state_dict_is_named(nanochat, state):
    torch.save(state, nanochat.model)
    assert str(nanochat.model) in nanochat.error()


def test_a_checkpoint_cut_anywhere_is_one_line(nanochat):
    whole = nanochat.model.read_bytes()
    sizes = [*range(5000, len(whole), 97_001), *range(len(whole) - 3000, len(whole), 331)]
    for size in [0, 1, 4, 30, 1000, *sizes]:
        nanochat.model.write_bytes(whole[:size])
        assert str(nanochat.model) in nanochat.error()


BYTES = {bytes([i]): i for i in range(256)}
SPECIALS = {f"<|{name}|>": 279 + i for i, name in enumerate(
    ("bos", "user_start", "user_end", "assistant_start", "assistant_end"))}


def encoding_pickle(ranks=BYTES, specials=SPECIALS, pattern="x"):
    """A pickle of a tiktoken Encoding: BUILD on an object made without __init__."""
    state = {"name": "x", "pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": specials}
    return b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81" + pickle.dumps(state, 4)[2:-1] + b"b."


def test_the_good_pickle_is_a_tokenizer(nanochat):
    nanochat.pickle.write_bytes(encoding_pickle())
    assert load(nanochat.path)[1].tokenizer.vocab_size == 284


@pytest.mark.parametrize("content, words", [
    (encoding_pickle(ranks=BYTES | {b"ab": 17}), "2 tokens have the id 17; each must have its own"),
    (encoding_pickle(specials=SPECIALS | {"<|more|>": 5}), "2 tokens have the id 5"),
    (encoding_pickle(ranks={key: i for key, i in BYTES.items() if i != 65}), "the byte 65 has no token"),
    (encoding_pickle(ranks=BYTES | {b"ab": 10**9}), "to token ids, each an integer from 0 to 16,777,215"),
    (encoding_pickle(ranks=BYTES | {b"ab": -1}), "token ids"),
    (encoding_pickle(ranks=BYTES | {b"ab": 2.0}), "token ids"),
    (encoding_pickle(ranks=BYTES | {"ab": 257}), "token ids"),
    (encoding_pickle(pattern=7), "the pattern is not text"),
    (encoding_pickle(pattern="(" * 9), "tokenizer is broken"),
    # a memo index for which the C unpickler reserves memory
    (b"\x80\x04]r\xff\xff\xff\x7f.", "not a tiktoken Encoding"),
    (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "KeyError: 150"),
    (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".", "truncated: it has 12 bytes"),
    (b"", "truncated"),
    (b"\x80\x04" + b"(" * 100_000 + b".", "not a tiktoken Encoding"),
    (pickle.dumps([1]), "not a tiktoken Encoding")])
def test_a_tokenizer_that_cannot_be_one_is_named(nanochat, content, words):
    nanochat.pickle.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(nanochat.path)
    assert words in str(caught.value) and str(caught.value).isprintable()


# --- anything -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gguf", "nanochat", "packed"])
def test_a_mutated_file_is_a_model_or_one_line(kind, tmp_path):
    """A mutated file is a model or one line, and takes little time and memory."""
    count = os.environ.get("MUTATIONS", "8")
    seed = "7" if "MUTATIONS" in os.environ else {"gguf": "3", "nanochat": "2", "packed": "3"}[kind]        # some of the first few are models
    script = Path(__file__).parents[3] / "support" / "mutate_models.py"
    if kind == "packed":            # made here, where what that takes has been imported
        plain = save(make_model("llama3.1", hidden_size=64, intermediate_size=64, num_hidden_layers=1).bfloat16(), tmp_path / "plain")
        for number, packing in enumerate(PACKED.values()):
            pack_folder(plain, tmp_path / "packed" / f"{number:02}", packing)
    said = tmp_path / "said"
    with said.open("w") as output:
        command = [sys.executable, str(script), kind, seed, count, str(tmp_path)]
        started = forked.template_of("torch", os.environ).fork(command, os.environ, os.getcwd(), *[output.fileno()] * 3)
    assert started.wait(170) == 0, said.read_text()[-3500:]
    assert re.search(rf"\n([1-9]\d*) of {count} became models\n", said.read_text())


# --- NaN and infinity in weights -----------------------------------------------------------------------


needs_core = pytest.mark.skipif(decode_core() is None, reason="weights stay packed only where decode_core runs")


@pytest.fixture(params=["decode_core", "reference"])
def kernels(request, monkeypatch):
    """Both ways to compute: weights in tiles as stored, and torch's matrices."""
    if request.param == "decode_core" and decode_core() is None:
        pytest.skip("weights stay packed only where decode_core runs")
    monkeypatch.setenv("CHAT_SERVER_KERNELS", request.param)
    installed_core.cache_clear()
    yield request.param
    monkeypatch.undo()
    installed_core.cache_clear()


def both_ways(names, values):
    """`values` with both kernels, by day with one of them, alternating."""
    ways = "decode_core", "reference"
    cases = [(*(value if isinstance(value, tuple) else (value,)), way) for value in values for way in ways]
    names = f"{names}, kernels"
    return pytest.mark.parametrize(names, by_day(cases, *[case for number, case in enumerate(cases) if number % 4 in (0, 3)]), indirect=["kernels"])


def refusal(path, **changes):
    """The error line for a model whose weights are not all finite: (the tensor's name, what it has)."""
    with pytest.raises(ConfigError) as caught:
        load(path, **changes)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    found = re.fullmatch(rf"{re.escape(str(path))}\S*: (\S+) has (.+)", text)
    assert found, text
    return found.groups()


def in_type(kind):
    return f"a value that is NaN or infinite in {kind}"


CHECKPOINT = "lm_head.weight transformer.wte.weight value_embeds.1.weight resid_lambdas x0_lambdas smear_gate.weight " \
    "smear_lambda backout_lambda".split() + [f"transformer.h.3.{name}.weight" for name in (
        "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "attn.ve_gate", "mlp.c_fc", "mlp.c_proj")]


@both_ways("name", CHECKPOINT)
def test_a_checkpoint_s_infinite_tensor_is_named(nanochat, name, kernels):
    """A checkpoint's tensor with NaN or infinity is named."""
    state = torch.load(nanochat.model, weights_only=True)
    for value in (NAN, INFINITY, -INFINITY) if name == "transformer.h.3.attn.c_v.weight" else (NAN, -INFINITY):
        spoilt = state[name].clone()
        spoilt.view(-1)[spoilt.numel() * 2 // 3] = value        # the last rows may only fill up the vocabulary
        torch.save(state | {name: spoilt}, nanochat.model)
        found, fault = refusal(nanochat.path)
        assert found == name and "NaN or infinite in " in fault


def test_rows_that_fill_up_a_vocabulary_hold_anything(nanochat, kernels):
    state = torch.load(nanochat.model, weights_only=True)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert len(state[name]) > 284
        state[name][284:] = NAN
    torch.save(state, nanochat.model)
    load(nanochat.path)


def test_what_a_type_cannot_hold_is_refused(nanochat, kernels):
    """What a type cannot hold is refused, and its largest number is not."""
    state, name = torch.load(nanochat.model, weights_only=True), "transformer.h.0.mlp.c_fc.weight"

    def spoil(value, kind=torch.float64):
        spoilt = state[name].to(kind)
        spoilt[7, 9] = value
        torch.save(state | {name: spoilt}, nanochat.model)

    spoil(1e39)
    for kind in ("float32", "bfloat16", "float16"):
        assert refusal(nanochat.path, dtype=kind) == (name, in_type(kind))
    spoil(-3.4e38)
    assert refusal(nanochat.path, dtype="bfloat16") == (name, in_type("bfloat16"))
    load(nanochat.path, dtype="float32")
    spoil(65_520.0)
    assert refusal(nanochat.path, dtype="float16") == (name, in_type("float16"))
    load(nanochat.path, dtype="bfloat16")
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        spoil(-torch.finfo(kind).max, kind)
        load(nanochat.path, dtype=str(kind).removeprefix("torch."))


@needs_core
@pytest.mark.parametrize("quantize", ["q8_0", "q4_1", "q4_k"])
def test_what_quantizing_cannot_hold_is_refused(nanochat, quantize):
    state, name = torch.load(nanochat.model, weights_only=True), "transformer.h.0.attn.c_k.weight"
    for value, fault in ((-9e6, "a value of 65,520 or more, which --quantize cannot pack"), (NAN, in_type("bfloat16")), (60_000.0, None)):
        spoilt = state[name].clone()
        spoilt[3, 5] = value
        torch.save(state | {name: spoilt}, nanochat.model)
        if fault:
            assert refusal(nanochat.path, quantize=quantize) == (name, fault)
        else:
            _, engine = load(nanochat.path, quantize=quantize)
            assert torch.from_numpy(engine.transformer.weights["0.qkv"].dequantize()).isfinite().all()


@needs_core
@pytest.mark.parametrize("name", ["transformer.h.3.attn.ve_gate.weight", "transformer.wte.weight"])
def test_unpacked_tensors_may_be_as_large_as_their_type(nanochat, name):
    """What quantize does not pack may be as large as its type."""
    state = torch.load(nanochat.model, weights_only=True)
    state[name][1, 5] = 9e6
    torch.save(state, nanochat.model)
    load(nanochat.path, quantize="q8_0")
    state[name][1, 5] = INFINITY
    torch.save(state, nanochat.model)
    assert refusal(nanochat.path, quantize="q8_0") == (name, in_type("bfloat16"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives a fresh folder of a tiny random model of transformers', and its tensors."""
    import families
    from safetensors.torch import load_file
    made = {}

    def folder(name, to):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            (families.save_packed(made[name]) if name == "gpt-oss" else families.save(families.make_model(name), made[name]))
        shutil.copytree(made[name], to, dirs_exist_ok=True)
        return to, load_file(to / "model.safetensors")
    return folder


def rewrite(folder, tensors):
    from safetensors.torch import save_file
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


LAYER = "model.layers.2."
@both_ways("family, name, kind", [
    ("llama3.1", "lm_head.weight", torch.bfloat16), ("llama3.1", "model.embed_tokens.weight", torch.float16),
    ("llama3.1", "model.norm.weight", torch.bfloat16), ("llama3.1", LAYER + "input_layernorm.weight", torch.float32),
    ("llama3.1", LAYER + "self_attn.v_proj.weight", torch.float32), ("llama3.1", LAYER + "self_attn.k_proj.bias", torch.bfloat16),
    ("llama3.1", LAYER + "mlp.up_proj.weight", torch.float16), ("llama3.1", LAYER + "mlp.gate_proj.bias", torch.float16),
    ("llama3.1", LAYER + "mlp.down_proj.weight", torch.bfloat16), ("llama3.2", "model.embed_tokens.weight", torch.bfloat16),
    ("qwen3", LAYER + "self_attn.q_norm.weight", torch.bfloat16), ("gemma3", LAYER + "post_feedforward_layernorm.weight", torch.float32),
    ("qwen3moe", LAYER + "mlp.experts.4.up_proj.weight", torch.bfloat16), ("qwen3moe", LAYER + "mlp.gate.weight", torch.float32),
    ("phi3", LAYER + "mlp.gate_up_proj.weight", torch.float16), ("gpt-oss", LAYER + "self_attn.sinks", torch.bfloat16),
    ("gpt-oss", LAYER + "mlp.router.bias", torch.bfloat16)])
def test_a_folder_s_infinite_tensor_is_named(folders, tmp_path, family, name, kind, kernels):
    """A folder's tensor with NaN or infinity is named."""
    folder, tensors = folders(family, tmp_path)
    for value in (NAN, -INFINITY):
        spoilt = tensors[name].to(kind)
        spoilt.view(-1)[spoilt.numel() * 2 // 3] = value
        rewrite(folder, tensors | {name: spoilt})
        found, fault = refusal(folder)
        assert found == name and "NaN or infinite in" in fault


def test_a_tied_head_that_differs_is_looked_at(folders, tmp_path, kernels):
    folder, tensors = folders("llama3.2", tmp_path)
    rewrite(folder, tensors | {"lm_head.weight": torch.full_like(tensors["model.embed_tokens.weight"], NAN)})
    with pytest.raises(ConfigError, match="lm_head.weight has a value that is NaN or infinite"):
        load(folder)


@pytest.mark.parametrize("what", ["scale", "code", "row's scale"])
def test_fp8_weights_with_nan_are_named(folders, tmp_path, what, kernels):
    folder, tensors = folders("llama3.1", tmp_path)
    name = LAYER + "self_attn.k_proj.weight"
    codes, scale = tensors[name].to(torch.float8_e4m3fn), torch.ones(len(tensors[name]) if "row" in what else 1)
    if what == "code":
        codes.view(torch.uint8)[3, 4] = 0xFF
    else:
        scale[-1] = NAN
    rewrite(folder, tensors | {name: codes, name + "_scale": scale})
    assert refusal(folder, dtype="float32") == (name, in_type("float32"))
    rewrite(folder, tensors | {name: tensors[name].to(torch.float8_e4m3fn), name + "_scale": torch.ones(1)})
    load(folder)


def test_mxfp4_scales_that_are_no_number_are_named(folders, tmp_path, kernels):
    folder, tensors = folders("gpt-oss", tmp_path)
    name = LAYER + "mlp.experts.gate_up_proj"
    for exponent, good in ((255, False), (254, False), (252, True), (0, True)):
        scales, blocks = tensors[name + "_scales"].clone(), tensors[name + "_blocks"].clone()
        scales[6, 33, 1], blocks[6, 33, 1] = exponent, 0x77
        rewrite(folder, tensors | {name + "_scales": scales, name + "_blocks": blocks})
        if good:
            load(folder)
        else:
            assert refusal(folder)[0] == LAYER + "mlp.experts.up_proj.weight"       # odd rows


def test_an_adapter_s_nan_is_named(folders, tmp_path, kernels):
    """An adapter's tensor with NaN is named, and so is what it makes of the model's."""
    from safetensors.torch import save_file
    folder, tensors = folders("llama3.1", tmp_path / "base")
    adapter, module = tmp_path / "adapter", LAYER + "self_attn.v_proj"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["v_proj"]}))
    rows, columns = tensors[module + ".weight"].shape

    def save(a, b):
        save_file({f"base_model.model.{module}.lora_{end}.weight": torch.full(shape, value).bfloat16()
                   for end, shape, value in (("A", (1, columns), a), ("B", (rows, 1), b))}, adapter / "adapter_model.safetensors")

    for a, b, end in ((NAN, 1.0, "A"), (1.0, -INFINITY, "B")):
        save(a, b)
        with pytest.raises(ConfigError) as caught:
            load(folder, lora=(str(adapter),))
        words = f"adapter_model.safetensors: base_model.model.{module}.lora_{end}.weight has a value that is NaN or infinite"
        assert str(caught.value).endswith(words)
    save(1e30, 1e30)
    assert refusal(folder, lora=(str(adapter),))[0] == module + ".weight"
    save(1.0, 1.0)
    load(folder, lora=(str(adapter),))


F16_SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
              "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
              "IQ3_S": [0], "IQ3_XXS": [0], "IQ2_S": [0], "IQ2_XS": [0], "IQ2_XXS": [0], "IQ1_S": [0]}


def blocks_of(kind, shape):
    """(rows, bytes) whose codes are all ones, as NaN's bits are, with scales of 2^-10; and the offsets of the scales in a block."""
    size, length = gguf.GGML_QUANT_SIZES[kind]
    blocks = numpy.full((math.prod(shape) // size, length), 255, numpy.uint8)
    for offset in F16_SCALES[kind.name]:
        blocks[:, offset:offset + 2] = numpy.array([2.0**-10], "<f2").view(numpy.uint8)
    return blocks.reshape(shape[0], -1)


@both_ways("name", F16_SCALES)
def test_a_packed_gguf_scale_that_is_nan_is_named(tmp_path, name, kernels):
    """A GGUF's packed tensor whose scale is no number is named."""
    kind, path = gguf.GGMLQuantizationType[name], tmp_path / "tiny.gguf"
    good = {key: (blocks_of(kind, each.shape), kind) if each.ndim == 2 else each for key, each in random_llama().items()}
    load(write_gguf(path, good, LLAMA_NUMBERS))
    size = gguf.GGML_QUANT_SIZES[kind][1]
    for tensor, offset, bits in zip(("blk.0.attn_k.weight", "token_embd.weight", "blk.0.ffn_up.weight"), F16_SCALES[name] * 3,
                                    (0x7E00, 0xFC00, 0x7C00)):
        blocks = good[tensor][0].copy()
        blocks.reshape(-1, size)[-3, offset:offset + 2] = numpy.array([bits], "<u2").view(numpy.uint8)
        write_gguf(path, good | {tensor: (blocks, kind)}, LLAMA_NUMBERS)
        found, fault = refusal(path)
        assert found == tensor and "NaN or infinite" in fault


def test_an_iq1_m_scale_in_four_nibbles_is_looked_at(tmp_path, kernels):
    kind, path, good = gguf.GGMLQuantizationType["IQ1_M"], tmp_path / "tiny.gguf", random_llama()
    good = {key: (numpy.full((each.shape[0], each.shape[1] // 256 * 56), 0x21, numpy.uint8), kind) if each.ndim == 2 else each
            for key, each in good.items()}
    load(write_gguf(path, good, LLAMA_NUMBERS))
    for upper, lower in ((0x7F, 0xF0), (0xFF, 0xC0)):
        blocks = good["blk.0.ffn_up.weight"][0].copy()
        blocks.reshape(-1, 56)[-3, [55, 53]] = upper, lower
        write_gguf(path, good | {"blk.0.ffn_up.weight": (blocks, kind)}, LLAMA_NUMBERS)
        found, fault = refusal(path)
        assert found == "blk.0.ffn_up.weight" and "NaN or infinite" in fault


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "token_embd.weight", "blk.0.attn_norm.weight", "blk.0.ffn_down.weight"])
def test_a_gguf_s_infinite_floats_are_named(tmp_path, kind, name, kernels):
    """A GGUF's floats with NaN or infinity are named."""
    kind, path = gguf.GGMLQuantizationType[kind], tmp_path / "tiny.gguf"
    for value in (NAN, -INFINITY):
        tensors = random_llama()
        tensors[name].flat[-5] = value
        tensors = {key: (gguf.quantize(each, kind), kind) if each.ndim == 2 else each for key, each in tensors.items()}
        assert refusal(write_gguf(path, tensors, LLAMA_NUMBERS))[0] == name


def test_an_overflow_in_loading_is_refused(tmp_path, kernels):
    """What becomes another type in loading, and overflows there is refused."""
    path, q4, tensors = tmp_path / "tiny.gguf", gguf.GGMLQuantizationType["Q4_0"], random_llama()
    tensors["blk.0.attn_v.weight"][3, 5] = 1e8      # a float32 matrix among packed ones becomes Q8_0
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        tensors[name] = gguf.quantize(tensors[name], q4), q4
    write_gguf(path, tensors, LLAMA_NUMBERS)
    if kernels == "decode_core":
        assert refusal(path)[1] == "a Q8_0 scale that is NaN or infinite"
    else:
        load(path)
        assert refusal(path, dtype="float16") == ("blk.0.attn_v.weight", in_type("float16"))


@pytest.mark.parametrize("tp", [1, 2])
def test_each_rank_refuses_what_it_has_a_part_of(folders, tmp_path, tp):
    folder, tensors = folders("qwen3", tmp_path)
    for name, index, guilty in ((LAYER + "self_attn.o_proj.weight", (5, -1), 1), (LAYER + "mlp.gate_proj.weight", (0, 3), 0),
                                ("lm_head.weight", (287, 0), 1)):
        spoilt = tensors[name].clone()
        spoilt[index] = NAN
        rewrite(folder, tensors | {name: spoilt})
        for rank in range(tp):
            settings = Settings(model=str(folder), dtype="float32")
            model = open_model(resolve_model(settings), settings)
            model = shard_model(stage_model(model, 0 if tp == 1 else 1, tp), rank, tp)
            with pytest.raises(ConfigError, match=f": {name} has a value that is NaN or infinite in float32") if tp == 1 or rank == guilty else nullcontext():
                for _, given, found in read_ahead(dict(model.tensors), list(model.tensors)):
                    if isinstance(given, Unread):
                        given.refuse_faults(found, packed=False)


@pytest.mark.slow
def test_a_rank_s_refusal_is_one_line(nanochat):
    state, name = torch.load(nanochat.model, weights_only=True), "transformer.h.3.mlp.c_fc.weight"
    state[name][-1, -1] = NAN                   # of rank 1
    torch.save(state, nanochat.model)
    for layout in (["--tp", "2"], ["--pp", "2"], []):
        run = subprocess.run([sys.executable, chat_server.__file__, "generate", str(nanochat.path), "--prompt", "x", *layout],
                             capture_output=True, text=True, timeout=120)
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert f": {name} has {in_type('bfloat16')}" in run.stderr.splitlines()[-1]
