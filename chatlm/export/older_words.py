"""A config.json in the words of transformers 5 and of transformers 4, so that both read the same model.

Version 5 has `rope_parameters`, an object for all layers or one for each type of layer. Version 4 does not
know it, and without `rope_theta` and `rope_scaling` takes a base of 10,000 without a word. What version 4
cannot do, the card says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TYPE_CHECKING

from chatlm.worker.weights.formats.rope_scaling import ORIGINAL
from chatlm.worker.weights.rules import LAYER_TYPES

if TYPE_CHECKING:
    from chatlm.worker.model.blocks.model import Model

FULL, LOCAL = LAYER_TYPES
PART = "partial_rotary_factor"
FACTORS = "short_factor", "long_factor"
# where version 4 looks for the number of experts. Version 5 takes either name
EXPERTS = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts",
           "olmoe": "num_experts"}
NEEDS_5 = "It needs transformers 5"
UNKNOWN_TO_4 = ("ministral3", "nanochat")  # model types


def with_older_words(config: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """A config with the keys of version 4 beside those of version 5."""
    family = config["model_type"]
    counts = {}
    if family in EXPERTS:
        names = {EXPERTS[family], *({"num_experts", "num_local_experts"} & config.keys())}
        counts = dict.fromkeys(sorted(names), model.experts.count if model.experts else 0)
    return older_rope(config) | dict(config) | counts


def older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What version 4 needs to know of rope_parameters."""
    stated = config.get("rope_parameters")
    if not isinstance(stated, dict) or not stated:
        return {}
    by_type = isinstance(stated.get(FULL), dict)
    rope = stated[FULL] if by_type else stated
    older: dict[str, Any] = {"rope_theta": rope.get("rope_theta"), PART: rope.get(PART)}
    if by_type and isinstance(stated.get(LOCAL), dict):
        older["rope_local_base_freq"] = stated[LOCAL].get("rope_theta")
    if rope.get("rope_type") == "longrope":
        older[ORIGINAL] = rope.get(ORIGINAL)
        older["rope_scaling"] = {"type": "longrope"} | {name: rope.get(name) for name in FACTORS}  # no more
    elif rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in ("rope_theta", PART)}
    return {key: value for key, value in older.items() if value is not None}


def notes_on_versions(config: Mapping[str, Any]) -> Iterator[str]:
    """Sentences for the card about what version 4 does not do as version 5 does."""
    family = config["model_type"]
    if family in UNKNOWN_TO_4:
        yield f"{NEEDS_5}: version 4 does not know this architecture."
    if family == "nanochat_generations":
        yield f"{NEEDS_5}: its code calls functions of that version."
    if family == "qwen2_moe" and config.get("use_sliding_window"):
        yield f"{NEEDS_5}: version 4 gives other layers a window."
    if family == "gemma2":
        yield ("With transformers 4 load it with `attn_implementation=\"eager\"`: its other kinds of "
               "attention leave out the softcap.")
