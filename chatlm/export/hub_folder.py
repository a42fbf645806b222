"""Writes a `HubModel` as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.files import copy_file
from chatlm.common.hub.local import Progress
from chatlm.common.program import in_program, program_root
from chatlm.common.text.load import open_tokenizer
from chatlm.export.hub_model import HubModel
from chatlm.export.safetensors_files import bytes_of, write_weights
from chatlm.export.tiktoken_json import ASSISTANT_END, CHAT_TEMPLATE, tokenizer_json
from chatlm.export.unfinished import check_room
from chatlm.worker.weights.text.pipelines import begins_with

if TYPE_CHECKING:
    from chatlm.common.messages.requests import TextSpec

CODE_FOLDER = "chatlm/export/hub_code"


def write_folder(folder: Path, target: Path, model: HubModel, card: str, most: int, progress: Progress):
    """Write all files of a model into `folder`, which will become `target`. The weights come last: what is
    wrong with a tokenizer is found before gigabytes are written.

    most: bytes of one file of weights."""
    whole = sum(map(bytes_of, model.weights))
    check_room(folder, target, whole)
    for path in model.copied:
        place = folder / path.relative_to(path.parent if path.parent.name != "additional_chat_templates"
                                          else path.parent.parent)
        place.parent.mkdir(exist_ok=True)
        copy_file(path, place)
    if not model.copied:
        for name, data in text_files(model):
            (folder / name).write_bytes(data)
    for name in model.code:
        code = in_program(program_root(), f"{CODE_FOLDER}/{name}").read_bytes()
        (folder / name).write_bytes(code)
    (folder / "config.json").write_bytes(as_json(model.config))
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_weights(folder, model.weights, most, lambda name, done: progress(
        f"writing {name}", done / max(whole, 1)))


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def text_files(model: HubModel) -> Iterator[tuple[str, bytes]]:
    """The tokenizer, the chat template and generation_config.json."""
    text = model.text
    payload = text.payload
    template = text.chat_template
    if text.kind == "nanochat":
        payload = tokenizer_json(text)
        template = CHAT_TEMPLATE
    elif text.add_bos and text.bos_token is not None:
        payload = with_bos(text)
    yield "tokenizer.json", payload
    names = token_names(text)
    options: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.get("max_position_embeddings")}
    options |= {f"{role}_token": name for role, name in names.items()}
    yield "tokenizer_config.json", as_json(options)
    if template:
        yield "chat_template.jinja", template.encode()
    ends = set(text.stop_tokens)
    if text.eos_token is not None:
        ends.add(text.eos_token)
    generation: dict[str, Any] = {"bos_token_id": text.bos_token, "eos_token_id": sorted(ends) or None,
                                  "pad_token_id": text.eos_token} | model.sampling
    yield "generation_config.json", as_json({key: value for key, value in generation.items()
                                             if value is not None})


def token_names(text: TextSpec) -> dict[str, str]:
    """The tokens that begin and end texts, by their roles."""
    if text.kind == "nanochat":
        return {"bos": "<|bos|>", "eos": ASSISTANT_END, "pad": ASSISTANT_END}
    names_of = {token: name for name, token in open_tokenizer(text).named_tokens.items()}
    names = {role: names_of.get(token) for role, token in (
        ("bos", text.bos_token), ("eos", text.eos_token), ("pad", text.eos_token)) if token is not None}
    return {role: name for role, name in names.items() if name}


def with_bos(text: TextSpec) -> bytes:
    """A tokenizer.json that puts the first token before each text, as its source does."""
    made = json.loads(text.payload)
    name = token_names(text).get("bos")
    if made.get("post_processor") is None and name:
        made["post_processor"] = begins_with(name, text.bos_token or 0)
    return json.dumps(made, ensure_ascii=False).encode()
