"""Checks of the values in a model's files, one key at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING, TypeVar

from chatlm.common.errors import ConfigError, printable, shown
from chatlm.common.files import MOST_INDEX, read_object
from chatlm.common.hub.default_model import DEFAULT_FILE
from chatlm.common.log import log

if TYPE_CHECKING:
    from chatlm.common.config import Settings


V = TypeVar("V")


def float_type(settings: Settings, backend) -> str:
    """The type of matrices that become floats: --dtype, else the fastest one here."""
    return settings.dtype or backend.dtype


# Limits far above any real model; sizes beyond them would take long even to compare with the file.
MOST_LAYERS = 10_000
MOST_TENSORS = 1 << 17
MOST_HEADS = 1 << 16
MOST_CHANNELS = 1 << 20
MOST_TOKENS = 1 << 24
MOST_POSITIONS = 1 << 26
MOST_EXPERTS = 1 << 12
LAYER_TYPES = ("full_attention", "sliding_attention")  # of config.json


class Rule(NamedTuple):
    """What a model's file may have under one key. Both the check and its error text are made from it."""

    value_type: type               # int, float (accepts an int too), bool or str
    low: float = -math.inf         # bounds of a number
    high: float = math.inf
    choices: tuple[str, ...] = ()  # allowed texts; () = any
    many: bool = False             # the value is a list of these
    optional: bool = False

    def allows(self, values: list) -> bool:
        types = set(map(type, values))
        if self.value_type in (str, bool):
            return types <= {self.value_type} and (not self.choices or set(values) <= set(self.choices))
        low = max(self.low, -sys.float_info.max)
        high = min(self.high, sys.float_info.max)
        if types == {int}:
            return low <= min(values) and max(values) <= high
        return types <= {int, self.value_type} and all(low <= value <= high for value in values)  # NaN fails

    @property
    def allowed(self) -> str:
        if self.value_type is bool or self.choices:
            one = f"one of {', '.join(self.choices)}" if self.choices else "true or false"
            return f"a list of entries, each {one}" if self.many else one
        if self.low == self.high:
            return f"{self.low:,}"
        noun = {str: "text", int: "integer", float: "finite number"}[self.value_type]
        bounds = f" from {self.low:,} to {self.high:,}" if self.low > -math.inf else ""
        article = "an" if self.value_type is int else "a"
        return (f"a list of {noun}s" if self.many else f"{article} {noun}") + bounds


def checked(path: Path, key: str, value: V | None, rule: Rule, length: int | None = None) -> V:
    """The value, if `rule` allows it; a list must have `length` entries, if that is given.

    Otherwise a ConfigError with the file, the key, the value and what is allowed."""
    result: Any = value
    if value is None and rule.optional:
        return result
    must = rule.allowed
    values = result if rule.many else [result]
    if rule.many and (not isinstance(value, list) or len(value) != (length or len(value))):
        must = must.replace("list of", f"list of {length:,}") if length else must
    elif rule.allows(values):
        return result
    elif rule.many:
        wrong = next(i for i, entry in enumerate(values) if not rule.allows([entry]))
        key = f"{key}[{wrong}]"
        value = values[wrong]
        must = rule._replace(many=False).allowed
    raise ConfigError(f"{path}: {key} is {'missing' if value is None else shown(value)}; it must be {must}")


ROPE_BASE = Rule(float, 2, 10**15)
SHARE_SCALE = Rule(float, 1e-4, 10**6)
JITTER = Rule(float, 0, 1, optional=True)
SAMPLING_KEYS = {  # ours -> the names in generation_config.json and GGUF's general.sampling, the rule
    "temperature": ("temperature", "temp", Rule(float, 0, 2)),
    "top_k": ("top_k", "top_k", Rule(int, 0, 2**31 - 1)),
    "top_p": ("top_p", "top_p", Rule(float, 0, 1)), "min_p": ("min_p", "min_p", Rule(float, 0, 1)),
    "repetition_penalty": ("repetition_penalty", "penalty_repeat", Rule(float, 0.01, 10))}


# of the default model, whose file says nothing: with its authors' temperature of 0.2 and top_p of 0.9 four of
# ten everyday answers go round in circles (bench/figures/answers.json, "endings")
DEFAULT_SAMPLING = {"temperature": 0.3, "min_p": 0.1, "frequency_penalty": 0.2, "presence_penalty": 0.2}
# with its template's own, it rambles about the capital of France (the same, "everyday-facts")
DEFAULT_SYSTEM = "You are a helpful AI assistant."


def own_sampling(path: Path, stated: Mapping, prefix: str = "") -> dict:
    """The fields `sampling`, `sampling_origin` and `notes` of a LoadedModel, from a generation_config.json,
    or with a `prefix` from GGUF metadata. A bad value is left out, with a note."""
    sampling = {}
    notes = []
    for ours, (hf_key, gguf_key, rule) in SAMPLING_KEYS.items():
        key = prefix + gguf_key if prefix else hf_key
        try:
            if (value := checked(path, key, stated.get(key), rule._replace(optional=True))) is not None:
                # GGUF has float32
                sampling[ours] = value if rule.value_type is int else float(f"{value:.7g}")
        except ConfigError as error:
            notes.append(f"Ignored: {error}")
    if not prefix and stated.get("do_sample") is False:
        sampling = {"temperature": 0.0}
    origin = (prefix.rstrip(".") or path.name) if sampling else ""
    if not sampling and path.name == DEFAULT_FILE:
        sampling = DEFAULT_SAMPLING
        origin = "measured by bench/endings.py"
    return {"sampling": sampling, "sampling_origin": origin, "notes": tuple(notes)}


def own_system(path: Path) -> str | None:
    """The system prompt of conversations that send none, `TextSpec.system`."""
    return DEFAULT_SYSTEM if Path(path).name == DEFAULT_FILE else None


def suppressed_in(path: Path, key: str, stated, vocab_size: int) -> frozenset[int]:
    """The tokens that a file lists as never to be drawn, as far as the vocabulary has them."""
    ids = checked(path, key, stated, Rule(int, many=True, optional=True))
    found = frozenset(token for token in ids or () if 0 <= token < vocab_size)
    if len(found) == vocab_size:
        raise ConfigError(f"{path}: {key} has all {vocab_size:,} tokens; at least one must be left")
    return found


def warn_of_templates(path: Path, names: Iterable[str]):
    """Log a warning if a model has chat templates, but none for every chat."""
    if names := printable(", ".join(map(shown, names))):
        log.warning("%s has chat templates named %s, but none named \"default\": they are not "
                    "used", path, names)


def check_divides(path: Path, key: str, size: int, divisor: int, of: str = ""):
    """ConfigError unless `size` is a multiple of `divisor`. `of` says which sizes the divisor is made of."""
    if size % divisor:
        of = of and f" ({of})"
        raise ConfigError(f"{path}: {key} is {size:,}; it must be a multiple of {divisor:,}{of}")


def router_groups(path: Path, config: Mapping) -> tuple[int, int]:
    """How many groups the experts form, and how many of these a token may choose from, checked."""
    experts = config["num_experts"]
    count = config["n_group"]
    kept = config["topk_group"]
    if count == 1:
        return 1, 1
    check_divides(path, "the number of experts", experts, 2 * count if experts < 2 * count else count,
                  "groups of 2 or more, of which there are n_group")
    least = -(-config["num_experts_per_tok"] // (experts // count))
    checked(path, "topk_group", kept, Rule(int, least, count))
    return count, kept


def check_bytes(path: Path, sizes: Mapping[str, int]):
    """ConfigError if tensors need more bytes than their file has. Tensors may share a file's bytes, but their
    copies would not."""
    if (total := sum(sizes.values())) > path.stat().st_size:
        largest = max(sizes, key=sizes.__getitem__)
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, but its tensors would take {total:,} "
                          f"({largest} alone {sizes[largest]:,})")


def read_json(path: Path, needed: bool = True) -> dict:
    """The object in a JSON file; {} if the file is missing and not needed."""
    if not needed and not path.exists():
        return {}
    return read_object(path, MOST_INDEX)
