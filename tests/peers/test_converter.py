"""GGUF files that llama.cpp's own converter makes of tiny random models, against the folders that it makes them of.

The converter is in the source package of llama-cpp-python, which the test downloads."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chatlm.common.vision.layout import layout_of
from chatlm.worker.model.blocks.mixers import DeltaRule
from engines import tensors_of
from families import CONVERTED, MODELS, answers, check, clear_cases, kernels_of, load, make_model, save, transformer
from image_conversations import picture_of_size
from other_names import OTHER_NAMES, save_named_otherwise
from peer_packages import llama_cpp
from seeing_engine import asking, logits_of, open_engine
from sight_families import CONVERTED as SEEING, FAMILIES, family_logits, save_family
from sight_qwen import as_published, make_qwen, qwen_logits, save_qwen
from tiny_sight import VOCABULARY


pytestmark = pytest.mark.slow

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 500_000.0}
VARIANTS = {                # name -> (of MODELS, what differs)
    "olmo3 with a factor of its own": ("olmo3", {"rope_parameters": {
        "full_attention": YARN | {"attention_factor": 1.1}, "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0}}}),
    "mistral with mscale": ("mistral", {"sliding_window": None, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}})}
CASES = {name: (name, changes) for name, changes in CONVERTED.items()} | VARIANTS


def complete_tokenizer(folder, rows):
    """The converter wants a merge, tokens for all rows, and one of GLM's."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first = 1 + max(token["id"] for token in tokenizer["added_tokens"])
    tokenizer["model"] |= {"vocab": tokenizer["model"]["vocab"] | {"th": first}, "merges": [["t", "h"]]}
    special = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [special | {"id": id, "content": "<|endoftext|>" if id == first + 1 else f"<|{id}|>"} for id in range(first + 1, rows)]
    tokenizer["model"]["vocab"] |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}       # else transformers numbers them anew
    path.write_text(json.dumps(tokenizer))


def made_seeing(name):
    """A tiny model that sees."""
    return make_qwen(name) if name.startswith("qwen") else FAMILIES[name][0]()


def write_seeing(folder, name):
    folder.mkdir()
    model = made_seeing(name)
    if name.startswith("qwen"):
        save_qwen(folder, model)
        as_published(folder)
    else:
        save_family(folder, name, model)
    complete_tokenizer(folder, VOCABULARY)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end_of_utterance>", "tokenizer_class": "PreTrainedTokenizerFast"}))


def write_named_otherwise(folder, name):
    folder.mkdir()
    save_named_otherwise(name, folder)
    complete_tokenizer(folder, 288)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def write_case(folder, name, changes):
    folder.mkdir()
    save(make_model(name, **changes), folder)
    complete_tokenizer(folder, 288)
    config = json.loads((folder / "config.json").read_text())
    if old := {"gpt2": {"n_ctx": 512}, "cohere2": {"rotary_pct": 1.0}, "phimoe": {"architectures": ["PhiMoEForCausalLM"]}}.get(name):       # as published files have it
        (folder / "config.json").write_text(json.dumps(config | old))
    if MODELS[name][0] == "minimax_m2":         # in its makers' words
        (folder / "config.json").write_text(json.dumps(config | {"rotary_dim": 16, "scoring_func": "sigmoid"}))
    if MODELS[name][0] == "glm4_moe_lite":      # which transformers derives from mlp_layer_types
        (folder / "config.json").write_text(json.dumps(config | {"first_k_dense_replace": 1}))
    if MODELS[name][0] == "mistral4":           # which the converter knows as the text model of others
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Mistral3ForConditionalGeneration"]}))
    if MODELS[name][0] == "hunyuan_v1_moe":     # whose config has lists of all layers' numbers
        layers = config["num_hidden_layers"]
        numbers = {"moe_intermediate_size": config["intermediate_size"], "moe_topk": config["moe_topk"], "num_shared_expert": 1}
        (folder / "config.json").write_text(json.dumps(config | {key: [number] * layers for key, number in numbers.items()}))
    if MODELS[name][0] == "ernie4_5_moe":       # as its makers publish it
        (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1, "moe_layer_end_index": config["num_hidden_layers"] - 1}))
    if MODELS[name][0] == "nemotron_h":         # in its makers' words
        letters = {"linear_attention": "M", "full_attention": "*", "moe": "E"}
        pattern = "".join(letters[kind] for kind in config.pop("layers_block_type"))
        (folder / "config.json").write_text(json.dumps(config | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}))
    if MODELS[name][0] == "granitemoehybrid":   # in its makers' words
        names = {"full_attention": "attention", "linear_attention": "mamba"}
        (folder / "config.json").write_text(json.dumps(config | {"layer_types": [names[kind] for kind in config["layer_types"]]}))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """name -> a folder that also has a model.gguf."""
    home = tmp_path_factory.mktemp("converter")
    script = llama_cpp(home, "convert_hf_to_gguf.py", "conversion/", "gguf-py/") / "convert_hf_to_gguf.py"
    folders = {name: home / f"{index}" for index, name in enumerate(CASES)}
    for name, folder in folders.items():
        write_case(folder, *CASES[name])
    for name in OTHER_NAMES:
        folders[name] = home / name.replace(" ", "-")
        write_named_otherwise(folders[name], name)
    for name in SEEING:
        folders[name] = home / name
        write_seeing(folders[name], name)
    subprocess.run([sys.executable, Path(__file__).parent / "converter.py", script.parent, *folders.values()],
                   capture_output=True, timeout=600, check=True)
    return folders


def numbers(value):
    """Numbers of blocks as a GGUF file has them: in float32, at any depth."""
    if isinstance(value, dict):
        return {name: numbers(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(numbers, value))
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value


def scaled(mixer, its):
    return replace(mixer, rope=replace(mixer.rope, scale=its.rope.scale))


def with_mixers_of(own, original, changed):
    """The blocks of the original; `changed` gets each mixer and the other model's."""
    return replace(original, layers=tuple(replace(layer, mixer=changed(layer.mixer, its.mixer)) for layer, its in zip(original.layers, own.layers)))


@pytest.mark.parametrize("name", [*CASES, *OTHER_NAMES])
def test_llama_cpp_converts_to_the_same_model(converted, name, caplog):
    caplog.set_level("INFO")
    folder = converted[name]
    assert not (folder / "refused").exists(), (folder / "refused").read_text()
    theirs, ours = load(folder), load(folder / "model.gguf")
    own, original = ours.architecture, theirs.architecture
    scales = [{attn.rope.scale for attn in model.attentions} for model in (original, own)]
    turned = name.startswith(("qwen3.5", "qwen3next"))      # its rows lie otherwise, of which the mixers tell: it computes the same
    if turned:
        original = with_mixers_of(own, original, lambda mixer, its: its if isinstance(mixer, DeltaRule) else mixer)
    if name == "mistral with mscale":                       # which the converter leaves out, and llama.cpp does not miss
        assert scales == [{1}, {pytest.approx(1.2079, abs=1e-4)}]
        original = with_mixers_of(own, original, scaled)
    if name == "olmo3 with a factor of its own":            # which the file cannot tell from attn_factor, that nobody uses: llama.cpp reads neither
        assert max(scales[0]) == 1.1 and max(scales[1]) == pytest.approx(1.2079, abs=1e-4)
        assert "has attn_factor 1.100, which is not used" in caplog.text
        original = with_mixers_of(own, original, scaled)
    same = numbers(asdict(original))
    same["max_positions"] = own.max_positions               # of hunyuan the converter says what its makers meant
    assert asdict(own) == same
    if turned:
        cases = clear_cases(make_model(name), lengths=(40,))
        check(answers(transformer(ours, kernels_of("reference", own)), cases), cases)
    for key, tensor in tensors_of(theirs).items():
        assert torch.equal(tensor, tensors_of(ours)[key]), key


@pytest.mark.parametrize("name", SEEING)
def test_llama_cpp_converts_what_sees(converted, name):
    """Its file and its mmproj give transformers' logits from pixels, and the file has the folder's matrices."""
    folder, model = converted[name], made_seeing(name)
    assert not (folder / "refused").exists(), (folder / "refused").read_text()
    theirs, ours = load(folder), load(folder / "model.gguf")
    for key, tensor in tensors_of(theirs).items():
        assert torch.equal(tensor, tensors_of(ours)[key]), key
    engine = open_engine(folder / "model.gguf", prefill_chunk=1024)
    pictures = picture_of_size(170, 100), picture_of_size(20, 50, seed=1)
    ids = asking(engine, *pictures)
    layouts = [layout_of(engine.full_text.vision, picture.width, picture.height) for picture in pictures]
    wanted = qwen_logits(model, ids, pictures, layouts) if name.startswith("qwen") else family_logits(model, name, ids, pictures, layouts)
    assert np.abs(logits_of(engine, ids, pictures) - wanted[-16:]).max() < 1e-4
