"""LoRA adapters, merged into the weights at load."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, printable, require_library, shown
from chatlm.worker.weights.assemble import read_safetensors_file
from chatlm.worker.weights.finite import all_below
from chatlm.worker.weights.rules import Rule, checked, read_json

if TYPE_CHECKING:
    import torch
    from chatlm.common.config import Settings


class Change(NamedTuple):
    """What an adapter adds to a weight (N, K): scaling * b @ a, in the order of Hugging Face's rows."""

    a: Any           # (rank, K)
    b: Any           # (N, rank)
    scaling: float
    embedding: bool  # its matrices are (rank, N) and (K, rank)

    def delta(self) -> torch.Tensor:
        product = self.b.float() @ self.a.float() * self.scaling
        return product.T if self.embedding else product


LORA_KEYS = {"r": Rule(int, 1, 1 << 16), "lora_alpha": Rule(float, -10**6, 10**6), "use_rslora": Rule(bool)}
# The layout of the product, or how training went; all other keys must be empty or false.
LORA_INERT = set("""alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying
    eva_config exclude_modules inference_mode init_lora_weights layers_pattern layers_to_transform
    loftq_config lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size
    rank_pattern revision target_modules task_type""".split())


def refuse_adapters(settings: Settings, base: str):
    if settings.lora:
        raise ConfigError(f"--lora {settings.lora[0]}: {base}; adapters merge into Hugging Face folders and "
                          "GGUF files")


def read_adapters(settings: Settings, targets: Mapping[str, tuple]) -> tuple[dict[str, list[Change]], str]:
    """What the folders of --lora add to each of the model's matrices, and a description of them.

    `targets` has their shapes by Hugging Face's names. See peft's tuners/lora: scaling is alpha / rank, or
    alpha / sqrt(rank) with rslora."""
    added: dict[str, list[Change]] = {}
    for folder in map(Path, settings.lora):
        folder = folder.expanduser()
        config, tensors = lora_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
        require_library("safetensors", "a LoRA adapter")
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in read_safetensors_file(tensors).items():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", name)
            if not match or tensor.ndim != 2:
                raise ConfigError(f"{tensors}: {shown(name)} is not a matrix lora_A or lora_B")
            if tensor.numel() and not all_below(tensor):
                raise ConfigError(f"{tensors}: {printable(name)} has a value that is NaN or infinite")
            module = match[1].replace("language_model.", "", 1)
            pairs.setdefault(module, {})[match[3] + (match[2] or "")] = tensor
        for module, pair in pairs.items():
            if f"{module}.weight" not in targets:
                known = ", ".join(name.removesuffix(".weight") for name in list(targets)[:12])
                raise ConfigError(f"{tensors}: {module} is no weight matrix of this model; it has {known} ..")
            change = lora_change(tensors, config, module, pair, targets[f"{module}.weight"])
            added.setdefault(f"{module}.weight", []).append(change)
        if not pairs:
            raise ConfigError(f"{tensors} has no tensors")
    names = ", ".join(printable(Path(folder).name) for folder in settings.lora)
    return added, f"; LoRA {names} merged into {len(added)} matrices" if added else ""


def lora_config(path: Path) -> dict:
    """An adapter_config.json that asks for nothing but the sum of the weights and a product."""
    config = read_json(path)
    checked(path, "peft_type", config.get("peft_type"), Rule(str, choices=("LORA",)))
    for key, rule in LORA_KEYS.items():
        checked(path, key, config.setdefault(key, False if rule.value_type is bool else None), rule)
    for key, value in config.items():
        usual = value in (None, False, "none", {}, [])
        if key not in LORA_INERT and not usual and key not in LORA_KEYS:
            raise ConfigError(f"{path}: {key} is {shown(value)}; adapters with it are not supported")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in ("gaussian", "eva", "orthogonal"):
        raise ConfigError(f"{path}: init_lora_weights is {shown(start)}, which changed the base model too; "
                          "convert the adapter to plain LoRA as peft documents")
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise ConfigError(f"{path}: {key} is {shown(pattern)}; it must be an object")
        for module, value in pattern.items():
            checked(path, f"{key}.{module}", value, LORA_KEYS["r" if key[0] == "r" else "lora_alpha"])
    return config


def lora_change(path: Path, config: Mapping, module: str, pair: Mapping[str, torch.Tensor],
                shape: tuple[int, ...]) -> Change:
    """The change of one module, its rank and shapes checked against the config and the model."""
    def own(pattern: str, usual: float) -> float:  # peft's keys are regular expressions of a name's end
        matching = (value for key, value in config[pattern].items()
                    if re.match(rf"(.*\.)?({key})$", module))
        return next(matching, usual)

    embedding, targets = "Aembedding_" in pair, config.get("target_modules")
    end = "embedding_" if embedding else ""
    is_target = (re.fullmatch(targets, module) or targets == "all-linear" if isinstance(targets, str) else
                 any(module == target or module.endswith(f".{target}") for target in targets or ()))
    if not is_target:
        targets = targets if isinstance(targets, str) else ", ".join(map(str, targets or ()))
        raise ConfigError(f"{path}: {module} is not among the target_modules of adapter_config.json, which "
                          f"are {printable(targets)}")
    rank = own("rank_pattern", config["r"])
    (N, K) = reversed(shape) if embedding else shape
    expected = {f"A{end}": (rank, K), f"B{end}": (N, rank)}
    if (shapes := {key: tuple(tensor.shape) for key, tensor in pair.items()}) != expected:
        raise ConfigError(f"{path}: {module} has lora_A and lora_B of the shapes {[*shapes.values()]}; with "
                          f"rank {rank} they must be {[*expected.values()]}")
    alpha = own("alpha_pattern", config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return Change(pair[f"A{end}"], pair[f"B{end}"], scaling, embedding)
