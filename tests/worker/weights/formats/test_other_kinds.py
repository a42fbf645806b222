"""Values of other kinds in the files of each kind of model: a model, or one line. Never a traceback."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from chatlm.common.errors import ConfigError
from chatlm.worker.weights.formats.folder.description import hf_blocks
import encoders
import families
import nomic_experts
from hub_configs import HUB_CONFIGS
from mutate_values import with_value
from nightly import by_day
from foreign_folders import KINDS

SUPPORT = Path(__file__).parents[3] / "support"
OTHERS = [kind for kind in KINDS if kind not in ("gguf_file", "nanogpt_file")]  # these have bytes alone
EVERY_KIND = [*(("family", name) for name in families.MODELS),
              *(("encoder", name) for name in encoders.MODELS),
              *(("folder", kind) for kind in OTHERS), ("importance", "gguf"), ("importance", "dat")]
CHOSEN = [("family", "llama3.1"), ("encoder", "modernbert"), ("folder", "tekken_folder"),
          ("folder", "sentencepiece_folder"), ("importance", "gguf"), ("importance", "dat")]


def faults_of(folder, seed, count):
    """The mutations of the models in a folder that end in anything but a line."""
    words = [sys.executable, SUPPORT / "mutate_values.py", folder, seed, count]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def make(kind, name, place):
    """A good model of a kind at a place, whose name says what it is."""
    if kind == "family":
        families.save(families.make_model(name), place)
        for file in ("added_tokens", "special_tokens_map", "preprocessor_config"):
            (place / f"{file}.json").write_text('{"a": 1}')
    elif kind == "encoder":
        encoders.save_folder(place, name, encoders.make_encoder(name), dense=[(32, 64, "Tanh", True)])
    elif kind == "folder":
        KINDS[name](place)
    else:
        write_old(place.with_name(f"imatrix.{name}"))


def write_old(path):
    """llama.cpp's older file of importance; in the place of a GGUF file it is replaced by its mutations."""
    numbers = struct.pack("<ii", 7, 32) + struct.pack("<32f", *range(32))
    path.write_bytes(struct.pack("<ii", 1, 3) + b"one" + numbers + struct.pack("<ii", 1, 4) + b"text")


@pytest.mark.parametrize("kind, name", by_day(EVERY_KIND, *CHOSEN))
def test_a_value_of_another_kind_is_a_line(kind, name, tmp_path):
    (tmp_path / "models").mkdir()
    make(kind, name, tmp_path / "models" / "one")
    assert faults_of(tmp_path / "models", 1, 40 if (kind, name) in CHOSEN else 150) == []


def configs():
    """A config.json of each family, in the words of several years."""
    made = {name: config for name, config in HUB_CONFIGS.items()}
    made |= {f"tiny {name}": families.tiny_config(name).to_dict() for name in families.MODELS}
    made |= {f"tiny {name}": encoders.make_encoder(name).config.to_dict() for name in encoders.MODELS}
    made["nomic with experts"] = nomic_experts.CONFIG
    made["nomic of its makers"] = OLDER_NOMIC
    made["gte with ntk"] = GTE
    return made


BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
OLDER_NOMIC = {
    "activation_function": "swiglu", "causal": False, "layer_norm_epsilon": 1e-12, "mlp_fc1_bias": False,
    "mlp_fc2_bias": False, "model_type": "nomic_bert", "n_embd": 768, "n_head": 12, "n_inner": 3072,
    "n_layer": 12,
    "n_positions": 8192, "qkv_proj_bias": False, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None,
    "type_vocab_size": 2, "vocab_size": 30528}
GTE = BASE | {
    "model_type": "new", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 8192,
    "rope_scaling": {"factor": 8.0, "type": "ntk"}, "rope_theta": 20000, "type_vocab_size": 1,
    "vocab_size": 250048}


def refusal_of(path, config):
    """The error for a config; "" if it is one of a model."""
    path.write_text(json.dumps(config))
    try:
        hf_blocks(path, None)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("count", by_day([15, 400], 15))
def test_a_config_with_a_value_of_another_kind_is_a_line(count, tmp_path):
    """Each value of each family's config; a rope_theta that is a list was a traceback."""
    dice = random.Random(3)
    path = tmp_path / "config.json"
    refused = 0
    for name, config in configs().items():
        for _ in range(count):
            what, changed = with_value(dice, config)
            try:
                refused += bool(refusal_of(path, changed))
            except Exception as error:
                raise AssertionError(f"{name}: {what}") from error
    assert refused > count


@pytest.mark.parametrize("config", [OLDER_NOMIC, GTE, nomic_experts.CONFIG], ids=["nomic", "gte", "experts"])
@pytest.mark.parametrize("value", [
    [1000.0], {"a": 1}, "1000", True, float("nan"), float("inf"), 0, -1.0, pytest.param(10**400, id="huge")])
@pytest.mark.parametrize("key", ["rope_theta", "rotary_emb_base"])
def test_a_base_of_rotary_encoders_is_a_number(config, key, value, tmp_path):
    if key == "rotary_emb_base" and config is GTE:
        return
    line = refusal_of(tmp_path / "config.json", config | {key: value})
    assert "rope_theta is" in line and "it must be" in line
