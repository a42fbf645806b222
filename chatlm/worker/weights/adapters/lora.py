"""LoRA adapters, merged into the weights at load."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, error_text, printable, shown
from chatlm.common.hub.adapter_folders import is_other_base
from chatlm.common.log import log
from chatlm.worker.arrays.kinds import kind_of, same
from chatlm.worker.weights.changes import Change, Copy
from chatlm.worker.weights.files.finite import all_below
from chatlm.worker.weights.files.safetensors_file import read_safetensors_file
from chatlm.worker.weights.rules import Rule, checked, read_json

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.changes import FileSlice


Changes = dict[str, list[Change | Copy]]  # of each matrix or vector
LORA_KEYS = {"r": Rule(int, 1, 1 << 16), "lora_alpha": Rule(float, -10**6, 10**6), "use_rslora": Rule(bool)}
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}  # values for some modules, of the same keys
MOST_NAMED = 12  # of a model's matrices, by an error
# The layout of the product, or how training went; all other keys must be empty or false.
LORA_INERT = set("""alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core modules_to_save peft_type
    peft_version qalora_group_size rank_pattern revision target_modules task_type""".split())


def read_adapters(settings: Settings, shapes: Mapping[str, tuple], slices: Mapping[str, list[FileSlice]],
                  names: Iterable[str] = (),
                  tied: Seq[str] = ()) -> tuple[Changes, str]:
    """What the --lora folders change in each matrix of a file, copies first, and a description for the log.

    `shapes` are by the file's names, `slices` by Hugging Face's. `names` are what the model is called, as far
    as known. `tied`: Hugging Face's names of an embedding and of the head that is the same matrix."""
    added, described = add_adapters(settings, whole_shapes(shapes, slices), names, tied)
    placed: Changes = {}
    for theirs, changes in added.items():
        for file_slice in slices[theirs]:
            placed.setdefault(file_slice.name, []).extend(change.at(file_slice) for change in changes)
    return placed, described


def whole_shapes(shapes: Mapping[str, tuple], slices: Mapping[str, list[FileSlice]]) -> dict[str, tuple]:
    """The shapes of Hugging Face's matrices, which a file stores in these slices of its own."""
    whole = {}
    for theirs, parts in slices.items():
        rows = sum(shapes[part.name][0] for part in parts)
        whole[theirs] = parts[0].whole or (rows, *shapes[parts[0].name][1:])
    return whole


def add_adapters(settings: Settings, shapes: Mapping[str, tuple], names: Iterable[str],
                 tied: Seq[str] = ()) -> tuple[Changes, str]:
    """Like `read_adapters`, by Hugging Face's names."""
    added: Changes = {}
    folders = [Path(folder).expanduser() for folder in settings.lora]
    for folder in folders:
        for name, changes in read_adapter(folder, shapes, names, tied).items():
            both = (*added.get(name, ()), *changes)
            copies = [change for change in both if isinstance(change, Copy)]
            if any(not same(copy.weight, copies[0].weight) for copy in copies):
                raise ConfigError(f"--lora {folder} has its own {name}, and so does an earlier adapter; "
                                  "they cannot both replace the model's")
            added[name] = [*copies[:1], *(change for change in both if isinstance(change, Change))]
    if not added:
        return added, ""
    names = ", ".join(printable(folder.name) for folder in folders)
    return added, f"; LoRA {names} merged into {len(added)} matrices"


def other_base(base, names: Iterable[str]) -> str:
    """A note that an adapter was made for a model with another name; "" if it was not."""
    if not is_other_base(base, names := [*names]):
        return ""
    return (f"this adapter was made for {shown(base)} (base_model_name_or_path), but the model is "
            f"{printable(names[0])}")


def read_adapter(folder: Path, shapes: Mapping[str, tuple], names: Iterable[str] = (),
                 tied: Seq[str] = ()) -> Changes:
    """What one adapter changes in each matrix. If it was made for a model with another name, it is refused if
    it does not fit. If it fits, a warning says so: the name may be a folder on another machine."""
    path = folder / "adapter_config.json"
    config = lora_config(path)
    other = other_base(config.get("base_model_name_or_path"), names)
    try:
        changes = fitting_changes(folder, config, shapes, tied)
    except ConfigError as error:
        if not other:
            raise
        raise ConfigError(f"{error}; {other}") from None
    if other:
        log.warning("%s: %s: unless they have the same weights, its answers will be wrong", path, other)
    return changes


def fitting_changes(folder: Path, config: dict, shapes: Mapping[str, tuple],
                    tied: Seq[str] = ()) -> Changes:
    """What an adapter with this config changes in matrices of these shapes. As in peft's tuners/lora, scaling
    is alpha / rank, or alpha / sqrt(rank) with rslora."""
    path = folder / "adapter_config.json"
    tensors = folder / "adapter_model.safetensors"
    modules, copies = lora_pairs(tensors, shapes)
    config |= {key: fitted_values(path, config[key], modules) for key in PATTERNS}
    targets = config.get("target_modules")
    saved_modules = modules_to_save(path, config, tensors, copies)
    target_modules = targeted_modules(path, targets, modules)
    changes = fitting_copies(tensors, copies, shapes)
    share_copies(changes, tied, saved_modules)
    # peft adds the head to an embedding that it shall stay tied to, and does not name it
    adds_head = config.get("ensure_weight_tying") and any(
        "Aembedding_" in modules[module] for module in target_modules)
    for module, pair in modules.items():
        own = own_name(module, shapes)
        name = f"{own}.weight"
        if len(shapes.get(name, ())) != 2:
            matrices = [name for name, shape in shapes.items() if len(shape) == 2]
            known = ", ".join(name.removesuffix(".weight") for name in matrices[:MOST_NAMED])
            raise ConfigError(f"{tensors}: {own} is not a weight matrix of this model; it has {known} ..")
        if module not in target_modules and not adds_head:
            words = targets if isinstance(targets, str) else ", ".join(targets or ())
            raise ConfigError(f"{tensors}: {module} is not among the target_modules of {path.name}, which "
                              f"are {printable(words)}")
        changes.setdefault(name, []).append(lora_change(tensors, config, module, pair, shapes[name]))
    return changes


def modules_to_save(path: Path, config: Mapping, tensors: Path, copies: Iterable[str]) -> Seq[str]:
    """The modules that the config says were trained whole. ConfigError unless the file of `tensors` has
    `copies` of all of them."""
    rule = Rule(str, many=True, optional=True)
    modules = checked(path, "modules_to_save", config.get("modules_to_save"), rule) or ()
    copied = [f".{copy.rpartition('.')[0]}" for copy in copies]
    for module in modules:
        if not any(name.endswith(f".{module}") for name in copied):
            raise ConfigError(f"{tensors}: {shown(module)} of modules_to_save is missing")
    return modules


def fitting_copies(path: Path, copies: Mapping[str, numpy.ndarray],
                   shapes: Mapping[str, tuple]) -> Changes:
    """The whole matrices and vectors of an adapter's file. ConfigError if the model has none of that name and
    shape."""
    fitting: Changes = {}
    for name, tensor in copies.items():
        if shapes.get(name) != tuple(tensor.shape):
            has = f"is {shapes[name]}" if name in shapes else "does not exist"
            kind = "matrix" if tensor.ndim > 1 else "vector"
            module = printable(name.removesuffix(".weight"))
            raise ConfigError(f"{path} contains a whole {kind} {module} {tuple(tensor.shape)}, which in this "
                              f"model {has}: it was made for another")
        fitting[name] = [Copy(tensor)]
    return fitting


def share_copies(changes: Changes, tied: Seq[str], saved: Iterable[str]):
    """In a model that ties them, a whole embedding or head is both. If modules_to_save names it, it was
    trained alone, and is not."""
    if not tied:
        return
    for name, other in (tied, reversed(tied)):
        was_trained_alone = any(f".{name}".endswith(f".{module}.weight") for module in saved)
        if name in changes and other not in changes and not was_trained_alone:
            changes[other] = list(changes[name])


ORIGINAL = re.compile(r"\.original_module\.\w+$")  # the base's matrix, beside that of modules_to_save
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
WHOLE = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer|\.modules_to_save)?(\.weight|\.bias)")


def lora_pairs(path: Path, shapes: Mapping[str, tuple]) -> tuple[dict[str, dict[str, numpy.ndarray]],
                                                                 dict[str, numpy.ndarray]]:
    """An adapter's file: module, as the file and its config name it -> its matrices A and B; and name in the
    model -> a whole matrix or vector."""
    modules: dict[str, dict[str, numpy.ndarray]] = {}
    copies: dict[str, numpy.ndarray] = {}
    for name, tensor in read_safetensors_file(path).items():
        if ORIGINAL.search(name):
            continue
        factor = FACTOR.fullmatch(name)
        whole = WHOLE.fullmatch(name)
        is_copy = whole and ".lora_" not in name and "float" in kind_of(tensor) and tensor.ndim in (1, 2)
        if not (tensor.ndim == 2 if factor else is_copy):
            raise ConfigError(f"{path}: {shown(name)} is neither lora_A nor lora_B nor a model's matrix or "
                              "vector")
        if tensor.size and not all_below(tensor):
            raise ConfigError(f"{path}: {printable(name)} has a value that is NaN or infinite")
        if factor:
            module, embedding, which = factor.groups()
            modules.setdefault(module, {})[which + (embedding or "")] = tensor
        elif whole:
            copies[own_name(whole[1], shapes) + whole[2]] = tensor
    if not modules and not copies:
        raise ConfigError(f"{path} has no tensors")
    return modules, copies


def own_name(module: str, shapes: Mapping[str, tuple]) -> str:
    """The name of an adapter's module in the files of a language model without images. peft has the names of
    transformers' modules, which are not always those of the published files."""
    name = re.sub(r"^backbone\.", "model.", module.replace("language_model.", "", 1))
    if f"{name}.weight" in shapes:
        return name
    published = name.replace(".shared_experts.", ".shared_expert.")  # Laguna
    return published if f"{published}.weight" in shapes else name


def lora_config(path: Path) -> dict:
    """An adapter_config.json, checked: it may ask only for products that are added to the weights."""
    config = read_json(path)
    checked(path, "peft_type", config.get("peft_type"), Rule(str, choices=("LORA",)))
    for key, rule in LORA_KEYS.items():
        usual = False if rule.value_type is bool else None
        checked(path, key, config.setdefault(key, usual), rule)
    for key, value in config.items():
        asks_nothing = value in (None, False, "none", {}, [])
        if key not in LORA_INERT and not asks_nothing and key not in LORA_KEYS:
            raise ConfigError(f"{path}: {key} is {shown(value)}; such adapters are not supported")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in ("gaussian", "eva", "orthogonal"):
        raise ConfigError(f"{path}: init_lora_weights is {shown(start)}, which changed the base model too; "
                          "convert the adapter to plain LoRA as peft documents")
    for key, same_as in PATTERNS.items():
        values = config.get(key) or {}
        config[key] = values
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {key} is {shown(values)}; it must be an object")
        for module, value in values.items():
            checked(path, f"{key}.{module}", value, LORA_KEYS[same_as])
    return config


PATTERN_SECONDS = 5
MATCH = """import json, re, sys
patterns, texts = json.load(sys.stdin)
for pattern in patterns:
    print(json.dumps([text for text in texts if re.fullmatch(pattern, text)]), flush=True)"""


def matching(path: Path, patterns: Seq[str], texts: Iterable[str], before: str = "") -> list[set[str]]:
    """For each regular expression of a file, the texts that match it in full after `before`. ConfigError for
    one that is invalid or takes too long. Some would take years, so any that repeat something run in another
    process."""
    texts = list(texts)
    wholes = [f"{before}(?:{pattern})" for pattern in patterns]
    pattern = ""
    try:
        for pattern in patterns:
            re.compile(pattern)
        if not re.search(r"[*+?{]", "".join(patterns)):
            return [{text for text in texts if re.fullmatch(whole, text)} for whole in wholes]
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{path}: {shown(pattern)} is not a regular expression: {error_text(error)}") from None
    try:
        done = subprocess.run([sys.executable, "-I", "-c", MATCH], input=json.dumps([wholes, texts]).encode(),
                              capture_output=True, timeout=PATTERN_SECONDS)
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.output or b""
    matches = [set(json.loads(line)) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
    if len(matches) < len(patterns):
        raise ConfigError(f"{path}: {shown(patterns[len(matches)])} takes more than {PATTERN_SECONDS} s or "
                          "too much memory to match the names of modules")
    return matches


def fitted_values(path: Path, patterns: Mapping[str, float], modules: Iterable[str]) -> dict[str, float]:
    """module -> the value of the first pattern that matches the end of its name, as in peft."""
    values: dict[str, float] = {}
    for names, value in zip(matching(path, [*patterns], modules, r"(?:.*\.)?"), patterns.values()):
        values = dict.fromkeys(names, value) | values
    return values


def targeted_modules(path: Path, targets, modules: Iterable[str]) -> set[str]:
    """The modules that target_modules names: by a regular expression, or by a list of names or ends of
    names."""
    if isinstance(targets, str):
        return set(modules) if targets == "all-linear" else matching(path, [targets], modules)[0]
    ends = checked(path, "target_modules", targets, Rule(str, many=True, optional=True)) or ()
    return {module for module in modules if f".{module}".endswith(tuple(f".{end}" for end in ends))}


def lora_change(path: Path, config: Mapping, module: str, pair: Mapping[str, numpy.ndarray],
                shape: tuple[int, ...]) -> Change:
    """The change of one module, its rank and shapes checked against the config and the model."""
    embedding = "Aembedding_" in pair
    end = "embedding_" if embedding else ""
    rank = config["rank_pattern"].get(module, config["r"])
    (N, K) = reversed(shape) if embedding else shape
    expected = {f"A{end}": (rank, K), f"B{end}": (N, rank)}
    if (shapes := {key: tuple(tensor.shape) for key, tensor in pair.items()}) != expected:
        raise ConfigError(f"{path}: {module} has lora_A and lora_B of the shapes {[*shapes.values()]}; with "
                          f"rank {rank} they must be {[*expected.values()]}")
    alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return Change(pair[f"A{end}"], pair[f"B{end}"], scaling, embedding)
