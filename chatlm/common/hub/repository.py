"""What a repository of the Hugging Face hub is called, and which of its files are a model."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Set
from pathlib import Path

from chatlm.common.errors import ConfigError
from chatlm.common.hub.nanochat_checkpoints import published
from chatlm.common.hub.short_names import SHORT_NAMES
from chatlm.common.hub.trainer_files import is_litgpt


SPLIT_GGUF = r"(?i)-\d{5}-of-\d{5}(?=\.gguf$)"  # the end of a name when a model has several files
BESIDE_MODEL = r"(?i).*(?<![a-z])(mmproj|imatrix)(?![a-z])[^/]*"  # GGUF files that are no models
ENCODER = r"(?i)(?:(.+)[-_.])?mmproj[^/]*\.gguf"  # an image encoder; in its name may be that of its model
WHOLE = "model.safetensors"             # all weights in one file
INDEX = "model.safetensors.index.json"  # names the files that share the weights
# how a folder may say what its tokenizer is, the best first
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "qwen.tiktoken")
FOLDER_FILES = {"config.json", "generation_config.json", INDEX, *TOKENIZERS, "added_tokens.json",
                "tokenizer_config.json", "special_tokens_map.json",
                "chat_template.jinja", "chat_template.json",
                "additional_chat_templates/tool_use.jinja", "modules.json", "1_Pooling/config.json",
                "config_sentence_transformers.json", "sentence_bert_config.json",
                "preprocessor_config.json", "processor_config.json",
                "hf_quant_config.json", "quantize_config.json", "quant_config.json"}
DENSE_FILES = r"\d+_Dense/(config\.json|model\.safetensors)"  # an embedder's layers after its pooling


def hub_model(text: str) -> tuple[str, str] | None:
    """(repository, file or "") if MODEL is a short name or has the form of a Hugging Face id."""
    text = SHORT_NAMES.get(text.lower().replace(":", "-"), text)
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([^:\\]+))?", text, re.ASCII)
    if not match or not match[2] and Path(text).suffix.lower() == ".gguf":
        return None
    return match[1], match[2] or ""


def hub_files(repository: str, file: str, names: Iterable[str]) -> list[str]:
    """The repository's files that make up the model: a GGUF file, a nanochat checkpoint, or a folder's
    config.json, weights and so on.

    `file` names a GGUF file or a checkpoint. The end of a GGUF file's name is enough, such as `Q8_0`."""
    names = set(names)
    if not file and (folder := folder_files(names)):
        return folder
    parts = collections.defaultdict(list)  # by the name without the part's number
    for name in sorted(name for name in names if name.lower().endswith(".gguf")):
        parts[re.sub(SPLIT_GGUF, "", name)].append(name)
    ggufs = models_among(parts)
    if (checkpoint := published(names, file)) and (file or not ggufs):
        return checkpoint
    end = (file or "q4_k_m").lower().removesuffix(".gguf")
    chosen = [name for name, files in parts.items() if file in (name, *files)]
    if not chosen:
        chosen = [name for name in ggufs if name.lower().removesuffix(".gguf").endswith(end)]
    if not chosen and not file:
        chosen = ggufs
    if len(chosen) == 1:
        return parts[chosen[0]]
    if file:
        lack = f"no single file {file}"
    else:
        lack = "several GGUF files" if ggufs else "no model.safetensors"
    if ggufs:
        there = f"its GGUF files: {', '.join(ggufs)}. Name one: {repository}:FILE"
    else:
        there = f"it has no GGUF file{other_weights(names)}"
    raise ConfigError(f"{repository} has {lack}; {there}")


def folder_files(names: Set[str]) -> list[str]:
    """The files to download of a Hugging Face folder; [] if the names are not those of one."""
    if "config.json" not in names:
        return []
    weights = {name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)}
    described = FOLDER_FILES & names
    described -= {name for name in TOKENIZERS if name != next(iter(tokenizers_of(names)), name)}
    if WHOLE in names:
        weights = {WHOLE}
        described = described - {INDEX}
    if not weights:
        return []
    dense = {name for name in names if re.fullmatch(DENSE_FILES, name)}
    first = ["config.json"]  # many models are refused by it alone
    return first + sorted(described.difference(first)) + sorted(weights | dense)


MMPROJ_TYPES = ("f16", "bf16", "q8_0", "f32")  # best first


def mmproj_for(model: str, names: Iterable[str]) -> list[str]:
    """The image encoder of a GGUF model: of the mmproj*.gguf and NAME-mmproj*.gguf in its folder, where NAME
    begins the model's own name, the one in the best type.

    [] if there is none, or if `model` is no GGUF model."""
    def rank(name: str) -> tuple[int, str]:
        name = name.lower()
        for place, kind in enumerate(MMPROJ_TYPES):
            if re.search(f"(?<![a-z]){kind}", name):
                return place, name
        return len(MMPROJ_TYPES), name

    folder, _, own = model.rpartition("/")
    if not own.lower().endswith(".gguf") or re.fullmatch(BESIDE_MODEL, own):
        return []
    encoders = []
    for name in names:
        place, _, last = name.rpartition("/")
        encoder = re.fullmatch(ENCODER, last)
        if place == folder and encoder and own.lower().startswith((encoder[1] or "").lower()):
            encoders.append(name)
    return sorted(encoders, key=rank)[:1]


def models_among(ggufs: Iterable[str]) -> list[str]:
    """The GGUF files whose names are those of models, or all files if none is."""
    ggufs = list(ggufs)
    return [name for name in ggufs if not re.fullmatch(BESIDE_MODEL, name)] or ggufs


def other_weights(names: Iterable[str]) -> str:
    """The end of a sentence about weights in formats that are not read; "" without any."""
    names = list(names)
    if is_litgpt(names):
        return ("; its files are litgpt's: download them into a folder (`hf download ID --local-dir FOLDER`) "
                "and give that")
    others = [name for name in sorted(names) if re.fullmatch(
        r"pytorch_model.*\.bin|consolidated.*\.pth|.*\.(h5|msgpack|onnx|ckpt|npz)", name)]
    if not others:
        return ""
    return (f"; {others[0]} is in a format that this server does not read: convert it with transformers "
            "(from_pretrained, then save_pretrained writes safetensors)")


def tokenizers_of(names: Iterable[str]) -> list[str]:
    """Which of these files say what the tokenizer is, the best first."""
    names = {*names}
    return [name for name in TOKENIZERS if name in names]


def other_tokenizers(names: Iterable[str]) -> str:
    """The end of a sentence that says what a folder has instead of a tokenizer.json."""
    names = sorted(names)
    others = [name for name in ("vocab.json", "merges.txt", "vocab.txt", "spiece.model",
                                "sentencepiece.bpe.model") if name in names]
    if not others:
        return f"; it has {', '.join(names[:20])}"
    return (f"; it has {' and '.join(others)}, which this server does not read. transformers can write one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
