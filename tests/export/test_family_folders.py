"""Models of llama-like families as Hugging Face folders, from folders, GGUF files and adapters."""

import itertools
import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

from chatlm.common.text.load import open_tokenizer
from exported import export, loaded, opened, our_logits, refused
from families import GGUF_MODELS, MODELS, as_gguf, make_model, save
from fp8 import SCHEMES, save_fp8
from lora import adapt, random_adapter, shapes_of
from nightly import by_day
from packers import PACKED, pack_folder
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf
from tiny_sight import make_smolvlm, save_sight

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(3)).tolist()
FOLDERS = ["llama3.1", "llama3.2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi3-long", "qwen3moe", "mixtral", "olmo3", "glm4", "ernie4.5",
           "exaone4", "ministral3", "seed-oss", "smollm3", "qwen2moe"]
FILES = [name for name in FOLDERS if name in GGUF_MODELS and name not in ("phi3-long", "ministral3")]


def computed(folder):
    with torch.no_grad():
        return loaded(folder)(torch.tensor([IDS])).logits[0]


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_keeps_every_bit(name, tmp_path):
    """Also where our rows are in another order, or norms multiply by 1 + w."""
    save(make_model(name), tmp_path / "source")
    export(tmp_path / "source", "-o", tmp_path / "made", "--shard-size", "100k")
    source, made = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "made")
    source.pop("lm_head.weight", None) if "lm_head.weight" not in made else None
    assert source.keys() == made.keys()
    for key in source:
        exact = torch.equal(source[key], made[key])
        assert exact or "norm" in key and "gemma" in name and torch.allclose(source[key], made[key], atol=1e-6), key
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "made")("Hello")["input_ids"]


@pytest.mark.parametrize("name, quantized", by_day([*itertools.product(FILES, (False, True))], *zip(FILES, itertools.cycle((False, True)))))
def test_a_gguf_file_becomes_a_folder_that_computes_the_same(name, quantized, tmp_path):
    file = as_gguf(tmp_path / "tiny.gguf", make_model(name, **GGUF_MODELS[name]), quantized=quantized)
    export(file, "-o", tmp_path / "made", "--dtype", "float32")
    assert (computed(tmp_path / "made") - our_logits(file, IDS)).abs().max() <= 5e-5      # transformers rounds angles to float32
    card = (tmp_path / "made" / "README.md").read_text()
    assert ("dequantized" in card) == quantized and "license:" not in card


def test_packed_weights_become_bfloat16_unless_asked(tmp_path):
    file = as_gguf(tmp_path / "tiny.gguf", make_model("llama2"), quantized=True)
    export(file, "-o", tmp_path / "made")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "made").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "made/config.json").read_text())["dtype"] == "bfloat16"
    assert "rounded to bfloat16" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize("scheme", ["fp8", "deepseek", "awq", "gptq-4", "bnb-nf4"])
def test_a_packed_folder_becomes_a_plain_one(scheme, tmp_path):
    model = make_model("llama2")
    if scheme in SCHEMES:
        save_fp8(model, tmp_path / "source", scheme)
    else:
        save(model, tmp_path / "plain")
        pack_folder(tmp_path / "plain", tmp_path / "source", PACKED[scheme])
    export(tmp_path / "source", "-o", tmp_path / "made", "--dtype", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "made/config.json").read_text())
    assert (computed(tmp_path / "made") - our_logits(tmp_path / "source", IDS)).abs().max() <= 5e-5


def test_a_gguf_s_tokenizer_and_template_go_along(tmp_path):
    file = as_gguf(tmp_path / "tiny.gguf", make_model("llama3.2"))
    export(file, "-o", tmp_path / "made")
    ours, theirs = opened(file).text, transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    tokenizer = open_tokenizer(ours)
    for text in ("Hello  world\n", "日本語 é ½", ""):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.bos_token_id in (ours.bos_token, None) and theirs.eos_token_id == ours.eos_token
    assert (theirs.encode("a")[0] == ours.bos_token) == ours.add_bos


@pytest.mark.parametrize("kind", ["folder", "gguf", "packed"])
def test_adapters_are_merged(kind, tmp_path):
    model = make_model("llama3.2")
    save(model, tmp_path / "folder")
    source = tmp_path / "folder" if kind == "folder" else as_gguf(tmp_path / "tiny.gguf", model, quantized=kind == "packed")
    adapter = random_adapter(tmp_path / "adapter", *shapes_of(tmp_path / "folder"), size=0.2)
    export(source, "-o", tmp_path / "made", "--lora", adapter, "--dtype", "float32")
    made = computed(tmp_path / "made")
    assert (made - our_logits(source, IDS, lora=(str(adapter),))).abs().max() <= 5e-5
    assert (made - our_logits(source, IDS)).abs().max() > 1e-2
    assert "LoRA adapter adapter is merged" in (tmp_path / "made" / "README.md").read_text()


def test_an_adapter_s_own_head_unties_it(tmp_path):
    """The config says tied, and the merged head is another matrix."""
    model = make_model("llama3.2")
    save(model, tmp_path / "source")
    adapt(model, tmp_path / "adapter", targets=["q_proj", "lm_head"])
    export(tmp_path / "source", "-o", tmp_path / "made", "--lora", tmp_path / "adapter")
    assert json.loads((tmp_path / "made/config.json").read_text())["tie_word_embeddings"] is False
    assert (computed(tmp_path / "made") - our_logits(tmp_path / "source", IDS, lora=(str(tmp_path / "adapter"),))).abs().max() <= 5e-5


@pytest.mark.parametrize("name", ["phi3-long", "ministral3"])
def test_what_a_config_cannot_say_is_refused(name, tmp_path, capfd):
    """A GGUF file has only the result of some scalings. What it means would be guessed."""
    file = as_gguf(tmp_path / "tiny.gguf", make_model(name))
    assert "a config.json cannot state all of this model" in refused(capfd, file, "-o", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("name", ["granite", "gpt-oss", "qwen3.5", "lfm2"])
def test_a_refused_family_is_named_with_those_that_can(name, tmp_path, capfd):
    file = as_gguf(tmp_path / "tiny.gguf", make_model(name))
    line = refused(capfd, file, "-o", tmp_path / "made")
    assert MODELS[name][0] in line and "nanochat's and those of llama, mistral" in line
    assert not (tmp_path / "made").exists()


def test_a_model_that_sees_is_not_blinded_in_silence(tmp_path, capfd):
    save_sight(tmp_path / "source", "smolvlm", make_smolvlm())
    assert "would lose its image encoder" in refused(capfd, tmp_path / "source", "-o", tmp_path / "made")


def test_a_license_is_taken_from_the_source_and_never_invented(tmp_path):
    save(make_model("llama2"), tmp_path / "source")
    for number, (card, words, expected) in enumerate([
            ("", [], None), ("---\nlicense: apache-2.0\n---\n", [], "apache-2.0"), ("---\nlicense: apache-2.0\n---\n", ["--license", "mit"], "mit"),
            ("license: mit", [], None), ("---\nlicense: [x\n", [], None)]):
        (tmp_path / "source" / "README.md").write_text(card)
        export(tmp_path / "source", "-o", tmp_path / str(number), *words)
        lines = (tmp_path / str(number) / "README.md").read_text().splitlines()
        assert [line for line in lines if line.startswith("license:")] == [f"license: {expected}"] * (expected is not None)


def test_weights_that_are_no_numbers_are_refused(tmp_path, capfd):
    tensors = random_llama()
    tensors["blk.0.ffn_up.weight"][3, 5] = numpy.nan
    file = write_gguf(tmp_path / "m.gguf", tensors, LLAMA_NUMBERS, small_gguf_metadata("gpt-2"))
    assert "blk.0.ffn_up.weight has a value that is NaN" in refused(capfd, file, "-o", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
def test_the_default_model_answers_the_same_in_transformers(default_model_path, tmp_path):
    export(default_model_path, "-o", tmp_path / "made", "--dtype", "float32")
    assert (computed(tmp_path / "made") - our_logits(default_model_path, IDS)).abs().max() <= 1e-3


@pytest.mark.parametrize("name, words", [
    ("llama2", {"rope_theta": 1e4}), ("qwen3", {"rope_theta": 1e6}),
    ("llama3.1", {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    ("gemma3", {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("glm4", {"partial_rotary_factor": 0.5}), ("mixtral", {"num_local_experts": 6})])
def test_a_config_has_the_words_of_transformers_4_too(name, words, tmp_path):
    """tests/peers/test_older_transformers.py compares what both versions compute."""
    file = as_gguf(tmp_path / "tiny.gguf", make_model(name, **GGUF_MODELS[name]))
    export(file, "-o", tmp_path / "made")
    config = json.loads((tmp_path / "made/config.json").read_text())
    for key, value in words.items():
        pairs = [(config[key], value)] if not isinstance(value, dict) else [
            (config[key][each], inner) for each, inner in value.items()]
        for found, right in pairs:
            assert found == right or isinstance(right, float) and found == pytest.approx(right), key
