"""Which model, nanochat checkpoints, GGUF files."""

import ctypes
import functools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chat_server
import gguf
import numpy
import patching
import psutil
import pytest
import torch
from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub import default_model
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.folder import find_models
from chatlm.common.hub.stamps import gguf_parts
from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from chatlm.common.text.tokenizer import compile_chat_template
from chatlm.worker.arrays.gguf_types import ROWS, TYPES, WITHOUT_VALUES, block_of
from chatlm.worker.arrays.kinds import kind_of
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ops.tensors import dtype_of, tensor_of
from chatlm.worker.weights.families.plain import exaone4, olmo2
from chatlm.worker.weights.families.table import FAMILIES, GGUF_FAMILIES
from chatlm.worker.weights.formats.gguf.file import read_gguf, read_gguf_file, readable
from chatlm.worker.weights.formats.gguf.texts import Texts
from chatlm.worker.weights.load import open_model
from engines import forward_logits, tensors_of
from generations import GENERATIONS
from nightly import WHOLE, by_day
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf


def load(path, dtype="float32", **settings):
    settings = Settings(model=str(path), dtype=dtype, **settings)
    return open_model(resolve_model(settings), settings)


class Reader:
    """One sequence through the model: feed it tokens, get logits (T, V)."""

    def __init__(self, model, pages=40):
        self.transformer = Transformer(model.architecture, dict(model.tensors), load_kernels("cpu"), num_pages=pages, max_tokens=512,
                                       device="cpu", dtype="float32")
        self.tokens, self.table = [], list(range(pages))

    def feed(self, tokens, all_logits=False):
        previous = self.tokens[-1:] or [-1]
        self.tokens += tokens
        batch = Batch(token_ids=tokens, previous_token_ids=(previous + tokens)[:-1], starts=[0, len(tokens)],
                      lengths=[len(self.tokens)], tables=[self.table[:-(-len(self.tokens) // PAGE_SIZE)]],
                      logit_rows=list(range(len(tokens))) if all_logits else [len(tokens) - 1])
        return forward_logits(self.transformer, batch)


# --- which model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A nanochat base folder with empty checkpoints, since only paths matter here."""
    for folder in ("chatsft_checkpoints/d4", "chatsft_checkpoints/d12", "chatrl_checkpoints/d4", "base_checkpoints/d20"):
        (tmp_path / folder).mkdir(parents=True)
        for step in (9, 100):
            (tmp_path / folder / f"model_{step:06d}.pt").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("flags", "expected"), [
    ({}, "sft/d12/100"), ({"source": "rl"}, "rl/d4/100"), ({"model_tag": "d4"}, "sft/d4/100"), ({"step": 9}, "sft/d12/9"),
    ({"model_tag": "d20"}, "base/d20/100"), ({"source": "base", "step": 9}, "base/d20/9")])
def test_source_tag_and_step_are_chosen_as_upstream(base, flags, expected):
    for model in (None, str(base)):
        source = resolve_model(Settings(model=model, **flags))
        assert expected in source.chosen and source.path.exists()
        assert "sft/d4/9" in source.alternatives and expected not in source.alternatives.split(", ")


def test_without_sft_the_next_source_is_used(base):
    """Without SFT the next source is used, and it is logged."""
    shutil.rmtree(base / "chatsft_checkpoints")
    source = resolve_model(Settings())
    assert "rl/d4/100" in source.chosen and "no sft checkpoint" in source.chosen


def test_without_a_depth_the_newest_folder_is_taken(base):
    """Without a depth in any name, the most recent folder is taken."""
    shutil.rmtree(base / "chatsft_checkpoints")
    for name, changed in (("old", 1000), ("newest", 3000), ("newer", 2000)):
        folder = base / "chatsft_checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "model_000001.pt").touch()
        os.utime(folder, (changed, changed))
    assert "sft/newest/1" in resolve_model(Settings()).chosen


@pytest.mark.parametrize("flags", [{"source": "mid"}, {"model_tag": "d99"}, {"step": 7}, {"source": "rl", "model_tag": "d12"}])
def test_an_absent_choice_lists_what_is_there(base, flags):
    """An explicit choice that is not there is an error listing what is."""
    with pytest.raises(ConfigError, match="available: sft/d12/9, sft/d12/100, sft/d4/9, .*base/d20/100"):
        resolve_model(Settings(**flags))


def test_an_explicit_choice_is_never_the_default_model(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    patching.patch(monkeypatch, default_model, "fetch_default_model", lambda progress: pytest.fail("fetched the default model"))
    with pytest.raises(ConfigError, match="-g d4"):
        resolve_model(Settings(model_tag="d4"))


def test_a_tag_or_checkpoints_folder_can_be_given(base):
    assert "sft/d4/100" in resolve_model(Settings(model=str(base / "chatsft_checkpoints" / "d4"))).chosen
    assert "rl/d4/9" in resolve_model(Settings(model=str(base / "chatrl_checkpoints"), step=9)).chosen
    for flags in ({"source": "rl"}, {"model_tag": "d12"}, {"step": 7}):
        with pytest.raises(ConfigError):
            resolve_model(Settings(model=str(base / "chatsft_checkpoints" / "d4"), **flags))


def test_what_is_no_model_says_what_could_be(tmp_path):
    (tmp_path / "note.gguf").write_text("hello")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").touch()
    for model, words in ((tmp_path / "none.gguf", "No such file"), (tmp_path / "note.gguf", "not a GGUF file"),
                         (tmp_path, "note.gguf"), (tmp_path / "hf", "has a config.json, but no \\*.safetensors")):
        with pytest.raises(ConfigError, match=words):
            resolve_model(Settings(model=str(model)))
    write_gguf(tmp_path / "real.gguf", random_llama(), LLAMA_NUMBERS)
    assert resolve_model(Settings(model=str(tmp_path / "real.gguf"))).alternatives == "beside it: note.gguf"
    with pytest.raises(ConfigError, match="-s 3: only for nanochat"):
        resolve_model(Settings(model=str(tmp_path / "real.gguf"), step=3))


def test_choosing_a_model_imports_no_torch(nanochat_fixtures, tmp_path):
    """Choosing a model and building its tokenizer imports neither torch nor numpy."""
    spec = load(nanochat_fixtures / "gen5").text
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    code = f"""
import pickle, sys
from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
resolve_model(Settings(model={str(nanochat_fixtures / "gen5")!r}))
open_tokenizer(pickle.load(open({str(tmp_path / "spec")!r}, "rb"))).render([Message("user", "hi")])
print([name for name in ("torch", "numpy", "gguf", "transformers") if name in sys.modules])"""
    folder = Path(chat_server.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout == "[]\n"


# --- what may not be read -------------------------------------------------------------------------------


def without_privileges():
    """Run in a child before Python: root may then no longer read and write what the permission bits
    forbid."""
    if os.geteuid() == 0:
        PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                os._exit(99)


def generate(*arguments, code="sys.exit(c.main(sys.argv[1:]))", **environment):
    """Run the generate command as an ordinary user; returns its exit status and its output."""
    code = f"import chat_server as c, os, sys\n{code}"
    command = [sys.executable, "-c", code, "generate", "--prompt", "Hi"]
    run = subprocess.run([*command, *map(str, arguments)], cwd=Path(chat_server.__file__).parent,
                         env=os.environ | environment, preexec_fn=without_privileges, capture_output=True,
                         text=True, timeout=100)
    if run.returncode == 99:
        pytest.skip("root's privileges cannot be dropped here")
    return run.returncode, run.stderr


def one_line(outcome, *words):
    status, text = outcome
    last = text.splitlines()[-1]
    assert status == 2 and "Traceback" not in text and last.startswith("chat_server: "), text
    assert all(word in last for word in words), last


@pytest.mark.parametrize("model, locked", by_day([
    ("x.gguf", "x.gguf"), ("folder", "folder"), ("folder/x.gguf", "folder"), ("folder/below/more", "folder"),
    ("base", "base"), ("base", "base/chatsft_checkpoints"), ("base", "base/chatsft_checkpoints/d4"),
    ("base", "base/chatsft_checkpoints/d4/model_000650.pt"),
    ("base", "base/chatsft_checkpoints/d4/meta_000650.json"),
    ("base", "base/tokenizer/tokenizer.pkl")], ("base", "base/tokenizer/tokenizer.pkl")))
def test_a_model_that_may_not_be_read_is_one_line(tmp_path, nanochat_fixtures, model, locked):
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / locked).chmod(0)
    try:
        one_line(generate(tmp_path / model), str(tmp_path / locked), "Permission denied")
    finally:
        (tmp_path / locked).chmod(0o700)


def test_paths_that_cannot_be_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.gguf")       # opening it would wait for a writer
    for model, words in (
            (tmp_path / "loop", "loop"), (tmp_path / "file" / "x.gguf", "Not a directory"),
            ("a" * 300, "name too long"), ("~nobody-here/x.gguf", "~nobody-here"),
            (tmp_path / "pipe.gguf", "a pipe; it must be a regular file"), ("a\0b", "null")):
        with pytest.raises(ConfigError, match=words):
            resolve_model(Settings(model=str(model)))


def test_a_user_who_cannot_write_at_home_gets_an_error(tmp_path):
    """A user without a home or who may not write there gets an error."""
    (tmp_path / "mine").mkdir(mode=0o500)
    (tmp_path / "locked").mkdir(mode=0)
    one_line(generate(HOME="here"), "no home folder", "set HOME", "give MODEL")
    mine, locked = tmp_path / "mine", tmp_path / "locked"
    one_line(generate(HOME="/dev/null"), "/dev/null/.cache", "Not a directory", "Set HOME")
    one_line(generate(HOME=str(mine)), str(mine / ".cache"), "Permission denied", "Set HOME")
    one_line(generate(HOME=str(locked)), str(locked / ".cache/nanochat"), "Permission denied")
    (tmp_path / "locked").chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user whom nobody knows")
def test_an_unknown_user_learns_of_the_missing_home():
    """A user unknown to the system learns that there is no home. Files are still root's to read: Python itself may lie in root's home."""
    unknown = "os.setreuid(54321, 0)\ndel os.environ['HOME']\nsys.exit(c.main(sys.argv[1:]))"
    one_line(generate(code=unknown), "no home folder", "set HOME", "give MODEL")


# --- nanochat --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_nanochat_checkpoints_answer_as_upstream(nanochat_fixtures, generation):
    model = load(nanochat_fixtures / generation)
    assert f"generation {generation[-1]} " in model.description
    tokenizer = open_tokenizer(model.text)
    for case in json.loads((nanochat_fixtures / generation / "oracle.json").read_text())["cases"]:
        reader, prompt = Reader(model), tokenizer.render([Message(**message) for message in case["messages"]])
        assert prompt == case["prompt_ids"]
        logits = reader.feed(prompt)[0]
        assert (logits - torch.tensor(case["next_logits"])).abs().max() <= 2e-3
        greedy = []
        for _ in case["greedy"]:
            greedy.append(int(logits.argmax()))
            logits = reader.feed(greedy[-1:])[0]
        assert greedy == case["greedy"] and tokenizer.decode(greedy) == case["text"]


def test_a_nanochat_softcap_can_be_overridden(nanochat_fixtures):
    assert load(nanochat_fixtures / "gen3").architecture.head.softcap == 15 and load(nanochat_fixtures / "gen3", softcap=20.0).architecture.head.softcap == 20


def test_the_context_can_only_be_shortened(nanochat_fixtures):
    assert load(nanochat_fixtures / "gen2").context_length == 512
    assert load(nanochat_fixtures / "gen2", context_length=100).context_length == 100
    with pytest.raises(ConfigError, match="513 is more than the model's 512"):
        load(nanochat_fixtures / "gen2", context_length=513)


@pytest.fixture
def broken(nanochat_fixtures, tmp_path):
    """A copy of generation 5 to break: .model, .meta, .pickle and .edit(change of the state dict)."""
    base = shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base")
    folder = base / "chatsft_checkpoints" / "d4"

    class Broken:
        path, model, meta = base, folder / "model_000650.pt", folder / "meta_000650.json"
        pickle = base / "tokenizer" / "tokenizer.pkl"

        def edit(self, change):
            state = torch.load(self.model, weights_only=True)
            change(state)
            torch.save(state, self.model)

        def error(self):
            with pytest.raises(ConfigError) as caught:
                load(base)
            return str(caught.value)
    return Broken()


def test_all_wrong_tensors_are_listed(broken):
    """Missing, unknown and misshapen tensors are all listed."""
    def change(state):
        del state["transformer.h.1.mlp.c_fc.weight"], state["smear_gate.weight"]
        state["transformer.h.9.attn.c_q.weight"] = torch.zeros(2, 3)
        state["lm_head.weight"] = torch.zeros(320, 63)
    broken.edit(change)
    error = broken.error()
    assert str(broken.model) in error
    for part in ("missing transformer.h.1.mlp.c_fc.weight (256, 64)", "missing smear_gate.weight (1, 24)",
                 "unknown transformer.h.9.attn.c_q.weight (2, 3)", "lm_head.weight is (320, 63) instead of (320, 64)"):
        assert part in error


def test_keys_of_two_generations_are_an_error(broken):
    broken.edit(lambda state: state.update({"transformer.h.3.attn.ve_gate.weight": torch.zeros(2, 32)}))
    assert "transformer.h.3.attn.ve_gate.weight is (2, 32) instead of (2, 12)" in broken.error()


def test_a_truncated_checkpoint_is_named(broken):
    for size in (broken.model.stat().st_size // 2, 100, 0):
        os.truncate(broken.model, size)
        assert str(broken.model) in broken.error()


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("what", ["model", "pickle"])
def test_a_hostile_pickle_runs_nothing(broken, what, tmp_path):
    hostile = Hostile()
    hostile.path = tmp_path / "was-run"
    if what == "model":
        torch.save({"x": hostile}, broken.model)
    else:
        broken.pickle.write_bytes(pickle.dumps(hostile))
    error = broken.error()
    assert str(getattr(broken, what)) in error and "system" in error and not hostile.path.exists()


def tiktoken_pickle(state):
    """A pickle of an Encoding with any state: BUILD on an object made without __init__."""
    return b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81" + pickle.dumps(state, 4)[2:-1] + b"b."


@pytest.mark.parametrize("state", [
    "gpt2", {"pat_str": "x"}, {"pat_str": "x", "mergeable_ranks": {"a": 1}, "special_tokens": {"b": 2}}, None,
    {"pat_str": "x", "mergeable_ranks": {b"a": 0}, "special_tokens": {"<|bos|>": 1}, "extra": 1}, ("a", {"b": 1})])
def test_a_tokenizer_state_must_be_the_plain_dict(broken, state):
    broken.pickle.write_bytes(tiktoken_pickle(state))
    assert f"{broken.pickle} is not a tiktoken Encoding" in broken.error()


def test_a_tokenizer_without_chat_tokens_is_refused(broken):
    """A tokenizer without chat tokens or of another size is refused."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    broken.pickle.write_bytes(tiktoken_pickle({"name": "x", "pat_str": "x", "mergeable_ranks": ranks,
                                               "special_tokens": {"<|bos|>": 256}}))
    assert "it has 257 tokens, the model 284; missing special tokens: <|user_start|>, " in broken.error()


def test_a_cut_or_missing_tokenizer_is_named(broken):
    """A cut tokenizer is refused, and a missing one says where it was looked for."""
    os.truncate(broken.pickle, 1000)
    assert str(broken.pickle) in broken.error()
    broken.pickle.unlink()
    assert str(broken.pickle) in broken.error() and str(broken.model.parent / "tokenizer.pkl") in broken.error()


def test_a_tokenizer_next_to_the_checkpoint_is_found(broken):
    shutil.move(broken.pickle, broken.model.parent / "tokenizer.pkl")
    assert load(broken.path).text.kind == "nanochat"


@pytest.mark.parametrize(("meta", "words"), [
    (None, "meta_000650.json: No such file"), ("{", "truncated: it has 1 bytes"), ("[1]", "not a nanochat meta file"),
    ('{"model_config": {"n_layer": "4"}}', "model_config.sequence_len is missing"), ('{"model_config": 3}', "not a nanochat meta file"),
    ("PATTERN", 'window_pattern is "SQ"'), ("HEADS", "n_head is 4; it must be a multiple of 3")])
def test_a_bad_meta_file_is_named(broken, meta, words):
    good = json.loads(broken.meta.read_text())
    if meta is None:
        broken.meta.unlink()
    elif meta in ("PATTERN", "HEADS"):
        good["model_config"] |= {"window_pattern": "SQ"} if meta == "PATTERN" else {"n_kv_head": 3}
        broken.meta.write_text(json.dumps(good))
    else:
        broken.meta.write_text(meta)
    assert re.search(words, broken.error())


# --- GGUF --------------------------------------------------------------------------------------------------------------------
# K-quants and others that the package cannot make: random bytes, with the 16-bit scales at these offsets set to small numbers
BLOCK_SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
                "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "TQ1_0": [52], "TQ2_0": [64],
                "IQ3_S": [0], "IQ3_XXS": [0], "IQ2_S": [0], "IQ2_XS": [0], "IQ2_XXS": [0], "IQ1_S": [0], "IQ1_M": [], "NVFP4": []}


def random_blocks(kind, rows, columns, dice):
    """(rows, bytes) of random valid blocks."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = dice.integers(0, 256, (rows * columns // elements, size), dtype=numpy.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = dice.integers(115, 122, len(blocks))
    if kind.name == "IQ1_M":                # whose scale lies in four nibbles
        blocks[:, 55] &= 0xA0
    for offset in BLOCK_SCALES.get(kind.name, []):
        blocks[:, offset:offset + 2] = dice.normal(0, 0.01, (len(blocks), 1)).astype(numpy.float16).view(numpy.uint8)
    if kind.name in ("F16", "BF16"):
        plain = dice.normal(0, 1, rows * columns).astype(numpy.float32)
        blocks = gguf.quantize(plain, kind).view(numpy.uint8)
    return blocks.reshape(rows, -1)


def unturned(rows, head_size):
    """Indexes that turn the row order of llama GGUF files (interleaved pairs) into half-split order."""
    order = [head * head_size + index for head in range(len(rows) // head_size)
             for index in [*range(0, head_size, 2), *range(1, head_size, 2)]]
    return rows[order]


@pytest.mark.skipif(decode_core() is None, reason="weights stay as stored only where decode_core runs")
@pytest.mark.parametrize("name", [*BLOCK_SCALES, "F16", "BF16", "F32"])
def test_weights_stay_as_stored_or_the_log_says_so(tmp_path, name):
    """Weights stay as stored, or the log says what they became."""
    kind, dice = gguf.GGMLQuantizationType[name], numpy.random.default_rng(2)
    stored = {key: (random_blocks(kind, *tensor.shape, dice), kind) if tensor.ndim == 2 and name != "F32" else tensor
              for key, tensor in random_llama().items()}
    # q, k and v are merged into one matrix
    stored["blk.0.attn_v.weight"] = random_llama()["blk.0.attn_v.weight"]
    model = load(write_gguf(tmp_path / "tiny.gguf", stored, LLAMA_NUMBERS), None)
    becomes = "BF16" if name == "F32" else name
    from chatlm.worker.kernels.tiles import Arena, Matrix
    held = Matrix(Arena(1 << 20), becomes.lower(), *model.architecture.shapes()["0.down"]).nbytes
    assert model.tensors["0.down"].nbytes == held
    assert not model.grows
    down, exact = model.tensors["0.down"].read(), torch.from_numpy(gguf.dequantize(*stored["blk.0.ffn_down.weight"])
                                                            if name != "F32" else stored["blk.0.ffn_down.weight"])
    if becomes in ("F16", "BF16"):
        [down] = down
        assert kind_of(down) == {"F16": "float16", "BF16": "bfloat16"}[becomes]
        assert torch.equal(tensor_of(down), exact.to(dtype_of(kind_of(down))))
    else:
        values = torch.from_numpy(gguf.dequantize(down.parts[0][1], gguf.GGMLQuantizationType[becomes]))
        scale = exact.view(-1, 32).abs().amax(-1, keepdim=True) / 127
        error = (values - exact).view(-1, 32).abs()
        # half a step, and the rounding to float16
        assert down.kind == becomes.lower() and (error <= (0 if name == becomes else 0.57 * scale + 4e-6)).all()
    if name == "F32":
        assert "re-quantized from F32 to BF16: 8 tensors (token_embd.weight" in model.description
    else:
        assert "re-quantized from F32 to Q8_0: 1 tensors (blk.0.attn_v.weight" in model.description
        qkv = model.tensors["0.qkv"].read()
        first = "q8_0" if name in ("F16", "BF16") else name.lower()
        assert qkv.kind == " with ".join(sorted({first, "q8_0"})) and qkv.shape == (512, 256)
        changed = {"F16": "re-quantized from F16 to Q8_0: 2 tensors (blk.0.attn_q.weight", "BF16": "re-quantized from BF16 to Q8_0: 2 tensors"}
        assert changed.get(name, "") in model.description
        assert model.description.count("re-quantized") == 1 + (name in changed)


MIXED = {"attn_q": "Q4_K", "attn_k": "IQ4_XS", "attn_v": "Q6_K", "attn_output": "Q5_K", "ffn_gate": "Q4_K", "ffn_up": "Q5_K",
         "ffn_down": "MXFP4", "token_embd": "Q6_K"}
SMALL = {"attn_q": "IQ2_XS", "attn_k": "Q2_K", "attn_v": "Q4_K", "attn_output": "IQ3_S", "ffn_gate": "IQ2_XXS", "ffn_up": "Q3_K",
         "ffn_down": "IQ3_XXS", "token_embd": "Q2_K"}        # as files of two and three bits mix them


@pytest.mark.skipif(decode_core() is None, reason="weights stay as stored only where decode_core runs")
@pytest.mark.parametrize("kinds", [MIXED, SMALL], ids=["four bits and more", "two and three bits"])
def test_a_file_of_many_types_computes_its_values(tmp_path, kinds):
    """Mixed as by llama-quantize: q, k and v of one matrix differ, and so do gate and up; logits beside float32's."""
    dice, plain = numpy.random.default_rng(2), random_llama(numbers=LLAMA_NUMBERS | {"llama.block_count": 2})
    def packed(name, tensor):
        kind = next((gguf.GGMLQuantizationType[kind] for part, kind in kinds.items() if part in name), None)
        if not kind:
            return tensor
        rows = random_blocks(kind, *tensor.shape, dice)
        blocks = rows.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
        for offset in BLOCK_SCALES[kind.name]:          # a hundredth, so that attention looks at more than one token
            small = blocks[:, offset:offset + 2].copy().view(numpy.float16) / 100
            blocks[:, offset:offset + 2] = small.astype(numpy.float16).view(numpy.uint8)
        return rows, kind
    stored = {name: packed(name, tensor) for name, tensor in plain.items()}
    path = write_gguf(tmp_path / "mixed.gguf", stored, LLAMA_NUMBERS | {"llama.block_count": 2})
    model = load(path, None)
    assert "re-quantized" not in model.description
    tensors = tensors_of(model)
    for whole, parts in (("0.qkv", ("attn_q", "attn_k", "attn_v")), ("0.gate_up", ("ffn_gate", "ffn_up"))):
        assert tensors[whole].kind == " with ".join(sorted(kinds[part].lower() for part in parts))
    packed_bytes = sum(tensor[0].nbytes for tensor in stored.values() if isinstance(tensor, tuple))
    held = [tensor for tensor in tensors.values() if hasattr(tensor, "parts")]
    assert sum(rows.nbytes for tensor in {id(tensor): tensor for tensor in held}.values() for _, rows in tensor.parts) == packed_bytes
    ids = list(range(3, 43))
    batch = Batch(token_ids=ids, previous_token_ids=[-1, *ids[:-1]], starts=[0, 40], lengths=[40], tables=[[0, 1, 2]],
                  logit_rows=list(range(40)))
    exact = Reader(load(path)).feed(ids, all_logits=True)
    limits = {"max_tokens": 64, "max_rows": 64}
    kernels = load_kernels("cpu", model.architecture, **limits)
    assert kernels.row_invariant
    ours = forward_logits(Transformer(model.architecture, dict(model.tensors), kernels, num_pages=3, device="cpu", dtype=None, **limits), batch)
    assert (ours - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("name", [*BLOCK_SCALES, "F16", "BF16", "F32"])
def test_every_quantization_loads_the_package_s_bits(tmp_path, name):
    """Every quantization loads bit equal to the package's dequantization."""
    kind, dice, plain = gguf.GGMLQuantizationType[name], numpy.random.default_rng(1), random_llama()
    stored = {key: (random_blocks(kind, *tensor.shape, dice), kind) if tensor.ndim == 2 and name != "F32" else tensor
              for key, tensor in plain.items()}
    path = write_gguf(tmp_path / "tiny.gguf", stored, LLAMA_NUMBERS)
    expected = {key: gguf.dequantize(value[0], kind) if isinstance(value, tuple) else value for key, value in stored.items()}
    for dtype in ("float32", "bfloat16"):
        tensors = tensors_of(load(path, dtype))
        wanted = {"embed": expected["token_embd.weight"], "0.output": expected["blk.0.attn_output.weight"],
                  "0.down": expected["blk.0.ffn_down.weight"],
                  "0.gate_up": numpy.concatenate([expected[f"blk.0.ffn_{part}.weight"] for part in ("gate", "up")]),
                  "0.qkv": numpy.concatenate([unturned(expected["blk.0.attn_q.weight"], 64),
                                              unturned(expected["blk.0.attn_k.weight"], 64), expected["blk.0.attn_v.weight"]])}
        for ours, theirs in wanted.items():
            assert torch.equal(tensors[ours], torch.from_numpy(theirs).to(dtype_of(dtype))), ours
        assert torch.equal(tensors["0.ffn_norm"], torch.from_numpy(plain["blk.0.ffn_norm.weight"]))
        assert tensors["0.ffn_norm"].dtype == torch.float32 and "head" not in tensors


def mapped_bytes(path):
    """Of this process; other tests may keep the file open."""
    return sum(part.size for part in psutil.Process().memory_maps(grouped=False) if part.path == str(path))


def test_the_default_model_has_the_expected_tensors(default_model_path):
    """The default model's tensors are exactly those the model expects."""
    before = mapped_bytes(default_model_path)
    model = load(default_model_path, "bfloat16")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    assert shapes | {"head": shapes["embed"]} == model.architecture.shapes()
    assert {name: given.read().nbytes for name, given in model.tensors.items()} == {
        name: given.nbytes for name, given in model.tensors.items()}
    assert model.context_length == 8192 and model.architecture.attentions[0].rope.base == 100_000 and "210 Q4_1" in model.description
    assert mapped_bytes(default_model_path) > before
    del model
    assert mapped_bytes(default_model_path) == before, "the file is still mapped: weights are held twice"


def test_a_model_split_into_several_files_is_one(tmp_path):
    whole = load(write_gguf(tmp_path / "tiny.gguf", random_llama(), LLAMA_NUMBERS))
    write_gguf(tmp_path / "split.gguf", random_llama(), LLAMA_NUMBERS, split_max_tensors=4)
    parts = [tmp_path / f"split-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert sorted(tmp_path.glob("split*")) == parts
    for path in (parts[0], parts[2]):
        model, theirs = load(path), tensors_of(whole)
        assert model.name == "split" and model.architecture == whole.architecture
        for name, tensor in tensors_of(model).items():
            assert torch.equal(tensor, theirs[name]), name
    (tmp_path / "loud").mkdir()
    loud = [tmp_path / "loud" / path.with_suffix(".GGUF").name for path in parts]
    for path, copy in zip(parts, loud):
        copy.write_bytes(path.read_bytes())
    assert load(loud[1]).name == "split" and gguf_parts(loud[0]) == loud
    [found] = find_models(tmp_path / "loud")
    assert (found.path, found.name) == (loud[0], "split")
    data = parts[1].read_bytes()
    for content, words in ((data[:-64], "split-00002-of-00003.gguf|truncated"), (None, "cannot read .*split-00002-of-00003.gguf: No such file")):
        parts[1].unlink()
        if content:
            parts[1].write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            load(parts[0])
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ConfigError, match="renamed.gguf: split.count is 3, so its name must end with -00001-of-00003.gguf"):
        load(tmp_path / "renamed.gguf")


PROSE = """Tea reached Europe by sea. In 1610 a Dutch ship brought the first crates from Hirado to Amsterdam, and for decades it
stayed a medicine, sold by the ounce. By 1750 the price had fallen twenty-fold; 4,000,000 pounds a year passed London's docks.
"What is it about a cup of tea?" asked a clerk. Nobody knew, but everybody drank. def brew(minutes: int = 3) -> str:
    return f"{minutes} minutes at 95°C"
Die Kanne war heiß, der Löffel aus Silber, und draußen regnete es. 日本では、茶道は一つの芸術である。"""


@pytest.mark.slow
def test_default_model_logits_match_transformers(default_model_path, monkeypatch):
    from transformers import AutoModelForCausalLM
    with monkeypatch.context() as patch:
        # it makes the same table of names once for each of 400 modules, and reads the file's 100,000 words three times
        for name in ("get_tensor_name_map", "GGUFReader"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        theirs = AutoModelForCausalLM.from_pretrained(str(default_model_path.parent), gguf_file=default_model_path.name,
                                                      dtype="float32")
    model = load(default_model_path)
    tokenizer = open_tokenizer(model.text)
    tokens = tokenizer.render([Message("user", PROSE)]) + tokenizer.encode(PROSE)
    assert len(tokens) > 300
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    reader = Reader(model)
    ours = torch.cat([reader.feed(tokens[:200], all_logits=True), reader.feed(tokens[200:], all_logits=True)])
    assert (ours - expected).abs().max() <= 2e-2
    top_two = expected.topk(2).values
    clear = top_two[:, 0] - top_two[:, 1] > 4e-2
    assert clear.sum() > 250 and torch.equal(ours.argmax(1)[clear], expected.argmax(1)[clear])


def llama_of_transformers(**config):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    vocab = len(small_gguf_metadata("gpt-2")["tokenizer.ggml.tokens"])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, **config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 2 else 1.0)
    return model


def as_gguf(path, model, numbers):
    """What llama.cpp's converter writes: rotary pairs interleaved."""
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    size, tensors = model.model.layers[0].self_attn.head_dim, {}
    for name, tensor in model.state_dict().items():
        module, kind = re.sub(r"model\.layers\.\d+\.", "", name).rsplit(".", 1)
        layer = re.search(r"layers\.(\d+)\.", name)
        if names[module] in ("attn_q", "attn_k"):
            tensor = tensor.view(-1, 2, size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        tensors[(f"blk.{layer[1]}." if layer else "") + f"{names[module]}.{kind}"] = tensor.numpy()
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    config = model.config
    base = numpy.array(config.rope_parameters["rope_theta"]) ** (-numpy.arange(0, size, 2) / size)
    if config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = (base / model.model.rotary_emb.inv_freq.numpy()).astype(numpy.float32)
    return write_gguf(path, tensors, {
        "llama.block_count": 2, "llama.context_length": 512, "llama.embedding_length": 64, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": size,
        "llama.attention.value_length": size, "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]), **numbers})


@pytest.mark.parametrize(("config", "numbers"), [
    ({}, {}), ({"tie_word_embeddings": True, "head_dim": 32}, {}), ({"attention_bias": "qkv"}, {}),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
     {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 64, "rope_theta": 5e5}}, {})],
    ids=["untied", "tied, wide heads", "biases", "linear rope", "llama 3 rope"])
def test_every_llama_variant_matches_transformers(tmp_path, config, numbers):
    biases = config.get("attention_bias") == "qkv"
    theirs = llama_of_transformers(**{**config, "attention_bias": biases})
    if biases:
        for layer in theirs.model.layers:
            layer.self_attn.o_proj.bias = None
    path = as_gguf(tmp_path / "tiny.gguf", theirs, numbers)
    tokens = torch.randint(0, theirs.config.vocab_size, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    ours = Reader(load(path)).feed(tokens, all_logits=True)
    assert (ours - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_the_reader_s_arrays_are_the_package_s(tmp_path):
    metadata = small_gguf_metadata("gpt-2") | {"x.strings": ["a", "", "é日🎉"], "x.numbers": [1, 2, 3], "x.floats": [0.5, 1.5],
                                               "x.flags": [True, False], "x.flag": True, "x.text": "ü"}
    path = write_gguf(tmp_path / "tiny.gguf", random_llama(), LLAMA_NUMBERS, metadata)
    ours, tensors = read_gguf(path)
    theirs = gguf.GGUFReader(path)
    assert ours == {name: field.contents() for name, field in theirs.fields.items()}
    assert [(t.name, t.data_offset, t.n_bytes) for t in tensors.values()] == [(t.name, t.data_offset, t.n_bytes) for t in theirs.tensors]


def test_tensor_types_and_names_are_the_package_s():
    assert {TYPES[name]: block_of(name) for name in ROWS} == gguf.GGML_QUANT_SIZES
    assert [kind.name for kind in gguf.GGML_QUANT_SIZES] == list(ROWS)
    for name, (_, _, size) in ROWS.items():
        try:
            gguf.dequantize(numpy.zeros(size, numpy.uint8), TYPES[name])
        except NotImplementedError:
            assert name in WITHOUT_VALUES or name == "Q1_0"     # tests/worker/weights/formats/test_few_bits.py has its values
        else:
            assert name not in WITHOUT_VALUES
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    newer = {"cohere2moe", "laguna", "muse-glimmer"}          # than the package gguf, which does not know these architectures yet
    for architecture, family in GGUF_FAMILIES.items():
        if architecture in newer:
            assert architecture not in architectures
            continue
        theirs, row = gguf.get_tensor_name_map(architectures[architecture], 1), FAMILIES[family]
        for ours, names in row.all_tensors.items():
            mapped = [theirs.get_name(name.replace("experts.{}", "experts").format(0), (".weight", ".bias")) for name in names]
            if all(mapped) and ours not in row.gguf.names and not (ours == "ffn_norm" and row.model in (olmo2, exaone4)):
                expected = [name.replace("blk.0.", "blk.{}.") + ".weight" * name.endswith("sinks") for name in mapped]
                assert [*row.gguf_names[ours]] == expected, (architecture, ours)


def test_a_changed_header_reads_as_in_the_package(tmp_path):
    """A header with some other bytes is read as the package reads it or refused."""
    whole = write_gguf(tmp_path / "tiny.gguf", {"a": numpy.ones((4, 32), numpy.float32)}, {}, {
        "x.strings": ["a", "é日"], "x.numbers": [1, 2], "x.text": "ü", "x.many": ["text"] * 1200, "general.alignment": 64}).read_bytes()
    dice, path, read = random.Random(7), tmp_path / "changed.gguf", 0
    for _ in range(400 if WHOLE else 150):
        changed = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            changed[dice.choice((dice.randrange(200), dice.randrange(len(whole))))] = dice.choice((0, 1, 7, 8, 9, 255, dice.randrange(256)))
        path.write_bytes(changed)
        try:
            with readable(path):
                ours, tensors = read_gguf_file(path)
        except ConfigError:
            continue
        lists = {key: [*value] if isinstance(value, Texts) else value for key, value in ours.items()}
        theirs, read = gguf.GGUFReader(path), read + 1
        try:
            expected = {name: field.contents() for name, field in theirs.fields.items()}
        except UnicodeDecodeError:      # what is no text in a list, we replace
            continue
        assert repr(lists) == repr(expected)     # NaN as well
        assert [(t.name, t.data_offset, t.data.tobytes()) for t in tensors.values()] == [
            (t.name, t.data_offset, t.data.tobytes()) for t in theirs.tensors]
    assert read > (50 if WHOLE else 20)


def test_a_truncated_gguf_is_named_wherever_cut(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", random_llama(), LLAMA_NUMBERS)
    whole = path.read_bytes()
    for size in [5, 16, 30, 200, 700, 2000, 4000, 6000, 9000, 12000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="tiny.gguf"):
            load(path)


def test_wrong_tensors_of_a_gguf_are_listed(tmp_path):
    """Missing, unknown and misshapen tensors of a GGUF are listed."""
    tensors = random_llama()
    del tensors["blk.0.ffn_up.weight"]
    tensors |= {"blk.0.ffn_gate_exps.weight": tensors["blk.0.ffn_gate.weight"], "output_norm.weight": numpy.ones(32, numpy.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", tensors, LLAMA_NUMBERS)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for part in (str(path), "missing blk.0.ffn_up.weight (512, 256)", "unknown blk.0.ffn_gate_exps.weight (512, 256)",
                 "output_norm.weight is (32,) instead of (256,)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("change", "words"), [
    ({"general.architecture": "mamba"}, "this server cannot run mamba yet; it runs: Llama"),
    ({"llama.rope.scaling.type": "dynamic"}, 'rope.scaling.type is "dynamic"; it must be one of none, linear, yarn'),
    ({"llama.rope.dimension_count": 66}, "rope.dimension_count is 66; it must be an integer from 2 to 64"), ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv is a list of 2; it must be an integer"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing")])
def test_what_a_gguf_needs_and_we_lack_is_named(tmp_path, change, words):
    metadata = {**LLAMA_NUMBERS, **small_gguf_metadata("gpt-2"), **change}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    path = write_gguf(tmp_path / "tiny.gguf", random_llama(), {}, metadata)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_type_the_package_cannot_decode_is_named(tmp_path):
    tensors, kind = random_llama(), gguf.GGMLQuantizationType.Q8_K
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    tensors["blk.0.ffn_down.weight"] = (numpy.zeros((256, 512 // elements * size), numpy.uint8), kind)
    path = write_gguf(tmp_path / "tiny.gguf", tensors, LLAMA_NUMBERS)
    with pytest.raises(ConfigError, match="blk.0.ffn_down.weight is of type Q8_K, which the gguf package cannot"):
        load(path)


@pytest.mark.parametrize(("library", "model"), [("tokenizers", "gguf"), ("tiktoken", "nanochat"), ("jinja2", "gguf")])
def test_a_missing_library_names_the_pip_line(monkeypatch, default_model_path, nanochat_fixtures, library, model):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"pip install {library}"):
        loaded = load(default_model_path if model == "gguf" else nanochat_fixtures / "gen1")
        open_tokenizer(loaded.text)
        compile_chat_template(loaded.text.chat_template)


def test_only_rare_gguf_types_need_the_package(tmp_path, monkeypatch, default_model_path):
    tensors, kind = random_llama(), gguf.GGMLQuantizationType.Q2_K
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    tensors["blk.0.ffn_down.weight"] = (numpy.zeros((256, 512 // elements * size), numpy.uint8), kind)
    path = write_gguf(tmp_path / "tiny.gguf", tensors, LLAMA_NUMBERS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    tensors_of(load(default_model_path))
    with pytest.raises(ConfigError, match="packed weights need.* pip install gguf"):
        tensors_of(load(path))


def test_a_checkpoint_file_finds_its_folder(base):
    path = base / "chatrl_checkpoints" / "d4" / "model_000009.pt"
    assert "rl/d4/9" in resolve_model(Settings(model=str(path))).chosen
    assert "rl/d4/9" in resolve_model(Settings(model=str(path), step=9)).chosen
    for flags in ({"step": 100}, {"source": "sft"}):
        with pytest.raises(ConfigError, match="step|-i"):
            resolve_model(Settings(model=str(path), **flags))
    with pytest.raises(ConfigError, match="available: rl/d4/9, rl/d4/100"):
        resolve_model(Settings(model=str(path.with_name("model_000777.pt"))))


def test_a_named_base_folder_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "none"))
    patching.patch(monkeypatch, default_model, "fetch_default_model", lambda progress: pytest.fail("fetched the default model"))
    with pytest.raises(ConfigError, match="NANOCHAT_BASE_DIR is .*none, which is not a folder"):
        resolve_model(Settings())


@pytest.mark.parametrize("model, near", [
    ("chta", "did you mean the command chat?"), ("zzz", "'zzz'. MODEL may be"),
    ("chat", "no model at 'chat'; the command chat must come first, before all flags. --help")])
def test_a_misspelled_command_is_recognised(model, near):
    with pytest.raises(ConfigError, match=re.escape(near)):
        resolve_model(Settings(model=model, commands=("serve", "chat")))
