"""A good model of each kind that a folder may have, with all the files that the program looks for in it."""

import base64
import json
import shutil
from pathlib import Path

from encoders import make_encoder, save_folder
from families import make_model, save, write_tokenizer
from lora import random_adapter, shapes_of
from tiny_gguf import LLAMA_NUMBERS, random_llama, write_gguf
from tiny_nanogpt import ARGS, random_state, write, write_meta

FIXTURES = Path(__file__).parents[1] / "fixtures"


def write_json(path, value):
    path.write_text(json.dumps(value))


def family_folder(folder):
    save(make_model("llama2"), folder)
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "special_tokens_map.json", {})
    write_json(folder / "added_tokens.json", {})
    write_json(folder / "chat_template.json", {"chat_template": "{{ messages }}"})
    write_json(folder / "quantize_config.json", {})
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ messages[0].content }}")
    return folder


def sentencepiece_folder(folder):
    save(make_model("llama2", vocab_size=2000), folder)
    (folder / "tokenizer.json").unlink()
    shutil.copy(FIXTURES / "tokenizers/llama.model", folder / "tokenizer.model")
    return folder


def tekken_folder(folder):
    save(make_model("llama2", vocab_size=300), folder)
    (folder / "tokenizer.json").unlink()
    write_json(folder / "tekken.json", tekken())
    return folder


def tekken(**changes):
    vocabulary = [{"rank": rank, "token_bytes": base64.b64encode(bytes([rank])).decode()}
                  for rank in range(256)]
    config = {"pattern": r"\p{L}+|.", "default_vocab_size": 276, "default_num_special_tokens": 20}
    return {"config": config | changes, "vocab": vocabulary}


def litgpt_folder(folder):
    shutil.copytree(FIXTURES / "litgpt/qwen3", folder)
    write_tokenizer(folder)
    return folder


def nanogpt_file(folder):
    write(folder, random_state(ARGS), ARGS)
    write_meta(folder / "meta.pkl")
    return folder / "ckpt.pt"


def gguf_file(folder):
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", random_llama(), LLAMA_NUMBERS)
    shutil.copy(folder / "tiny.gguf", folder / "mmproj-tiny.gguf")
    return folder / "tiny.gguf"


def nanochat_file(folder):
    shutil.copytree(FIXTURES / "nanochat/gen5", folder)
    model = next(folder.rglob("model_*.pt"))
    (model.parent / "sft.log").write_text("step 00001 (99.9%) | loss: 1.25 |\n")
    return model


def adapted_folder(folder):
    save(make_model("llama2"), folder)
    random_adapter(folder / "adapter", *shapes_of(folder), base_model_name_or_path="org/llama")
    return folder


def embedder_folder(folder):
    save_folder(folder, "bert", make_encoder("bert"), dense=[(32, 64, "Tanh", True)])
    return folder


KINDS = {make.__name__: make for make in (
    family_folder, sentencepiece_folder, tekken_folder, litgpt_folder, nanogpt_file, gguf_file, nanochat_file,
    adapted_folder, embedder_folder)}
