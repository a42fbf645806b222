"""`scaled_rope`: how heads turn in contexts longer than those that a model was first trained on.

The formulas are those of transformers' modeling_rope_utils.py. Each type of scaling divides the rotary
frequencies (D/2,) by factors of its own; a row of SCALINGS has its parameters and its function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.common.log import log
from chatlm.worker.weights.rules import MOST_POSITIONS, Rule, checked

ORIGINAL = "original_max_position_embeddings"
ORIGINAL_RULE = Rule(int, 2, MOST_POSITIONS)
RULES = {  # all others are positive numbers
    ORIGINAL: ORIGINAL_RULE,
    **dict.fromkeys(("truncate", "finetuned"), Rule(bool)), "extrapolation_factor": Rule(float, 1, 1),
    **dict.fromkeys(("short_factor", "long_factor"), Rule(float, 0.01, 10**6, many=True)),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), Rule(float, 0, 10**3, optional=True))}
POSITIVE = Rule(float, 0.01, 10**6)
UNUSED = {"finetuned": False, "extrapolation_factor": 1.0}  # checked, without effect
# of DeepSeek-R1-0528-Qwen3-8B; what vLLM multiplies the usual factor by
ATTN_FACTOR = ("%s: %s has attn_factor %.3f, which is not used, as in transformers and llama.cpp: yarn "
               "multiplies queries and keys by %.3f")


class Scaling(NamedTuple):
    """What a file states of rotary scaling, and of the model whose heads turn."""

    path: Path
    name: str                # of the object, in errors
    stated: Mapping[str, Any]
    base: float
    size: int                # dims of a head that turn
    positions: int           # the longest context, as the file states it
    context: int | None      # of the server; None: the model's own

    def value(self, key: str, default: Any = None, length: int | None = None) -> Any:
        stated = self.stated.get(key)
        rule = RULES.get(key, POSITIVE)
        return checked(self.path, f"{self.name}.{key}", default if stated is None else stated, rule, length)

    @property
    def original(self) -> int:
        """The context before scaling."""
        return self.value(ORIGINAL, self.positions)

    @property
    def stretch(self) -> float:
        """The factor; if it is not stated, by how much the context was stretched."""
        return self.value("factor", self.positions / self.original)

    @property
    def frequencies(self) -> numpy.ndarray:
        """(size / 2,)"""
        return self.base ** -(numpy.arange(0, self.size, 2) / self.size)


def scaled_rope(path: Path, name: str, rope: Mapping, base: float, size: int, positions: int,
                context: int | None) -> dict[str, Any]:
    """max_positions and what becomes a Rope: rope_base, rope_size, rope_factors, rope_scale.

    `rope` is a rope_scaling or rope_parameters object, whose `name` errors give. longrope uses its long
    factors for all positions if the server's `context` (None: the model's) is longer than the original one;
    dynamic scaling uses the factor for the `context`."""
    kind = checked(path, f"{name}.rope_type", rope.get("rope_type", rope.get("type", "default")),
                   Rule(str, choices=tuple(SCALINGS)))
    parameters, fields_of = SCALINGS[kind]
    known = [*parameters.split(), "rope_type", "type", "rope_theta", "partial_rotary_factor"]
    if unknown := [key for key in rope if key not in known and rope[key] is not None]:
        raise ConfigError(f"{path}: {name} has the key {shown(unknown[0])}; known for the type {kind} "
                          f"are {', '.join(known)}")
    scaling = Scaling(path, name, rope, base, size, positions, context)
    fields = {"max_positions": positions, "rope_base": base, "rope_size": size}
    if kind == "default":
        return fields
    for key, usual in UNUSED.items():
        scaling.value(key, usual)
    return fields | fields_of(scaling)


def unscaled_fields(scaling: Scaling) -> dict[str, Any]:
    return {}


def dynamic_fields(scaling: Scaling) -> dict[str, Any]:
    """A larger base for a longer context, which the server's decides."""
    factor = scaling.value("factor")
    positions = scaling.positions
    size = scaling.size
    length = min(max(scaling.context or 0, positions), int(max(factor, 1) * positions))
    stretched = scaling.base * (factor * length / positions - (factor - 1))**(size / max(size - 2, 1))
    return {"max_positions": length, "rope_base": stretched}


def linear_fields(scaling: Scaling) -> dict[str, Any]:
    """Every frequency is divided by the factor."""
    scaling.value(ORIGINAL, scaling.positions)
    return {"rope_factors": numbers(numpy.full(scaling.size // 2, scaling.value("factor")))}


def llama3_fields(scaling: Scaling) -> dict[str, Any]:
    """High frequencies are kept, low ones divided by the factor, with a slope between."""
    original = scaling.original
    factor = scaling.value("factor")
    low = scaling.value("low_freq_factor")
    high = scaling.value("high_freq_factor")
    kept = (original * scaling.frequencies / (2 * math.pi) - low) / (high - low or 1e-3)
    return {"rope_factors": partly_divided(kept, factor)}


def yarn_fields(scaling: Scaling) -> dict[str, Any]:
    """Dims that turn often in the original context are kept, slow ones divided by the factor, with a slope
    between. Queries and keys grow with the logarithm of the factor (https://arxiv.org/abs/2309.00071)."""
    original = scaling.original
    factor = scaling.stretch
    size = scaling.size

    def dim_that_turns(turns: float) -> float:
        """The dim that turns so often in the original context."""
        return size * math.log(original / (2 * math.pi * turns)) / (2 * math.log(scaling.base))

    low = dim_that_turns(scaling.value("beta_fast", 32.0))
    high = dim_that_turns(scaling.value("beta_slow", 1.0))
    if scaling.value("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, size - 1)
    kept = 1 - (numpy.arange(size // 2) - low) / (high - low or 1e-3)
    rope_scale = yarn_scale(scaling, factor)
    return {"rope_scale": rope_scale, "max_positions": max(scaling.positions, int(factor * original)),
            "rope_factors": partly_divided(kept, factor)}


def yarn_scale(scaling: Scaling, factor: float) -> float:
    """What yarn multiplies queries and keys by."""
    growth = math.log(max(factor, 1))
    over = scaling.value("mscale")
    under = scaling.value("mscale_all_dim")
    if not (over and under):
        over, under = 1, 0
    scale = scaling.value("attention_factor") or (0.1 * over * growth + 1) / (0.1 * under * growth + 1)
    unused = scaling.value("attn_factor", 1.0)
    if unused != 1 and not math.isclose(unused, scale, rel_tol=1e-4):
        log.info(ATTN_FACTOR, scaling.path, scaling.name, unused, scale)
    return scale


def longrope_fields(scaling: Scaling) -> dict[str, Any]:
    """Factors of its own for each frequency, in two lists: for contexts up to the original one, and for
    longer ones (https://arxiv.org/abs/2402.13753)."""
    original = scaling.original
    growth = math.log(max(scaling.stretch, 1))
    half = scaling.size // 2
    factors = {length: scaling.value(f"{length}_factor", None, half) for length in ("short", "long")}
    length = "long" if (scaling.context or scaling.positions) > original else "short"
    scale = scaling.value("attention_factor")
    own = f"{length}_mscale"
    if not scale and scaling.stated.get(own):
        scale = scaling.value(own)
    return {"rope_scale": scale or math.sqrt(1 + growth / math.log(original)),
            "rope_factors": numbers(numpy.asarray(factors[length]))}


def partly_divided(kept: numpy.ndarray, factor: float) -> tuple[float, ...]:
    """What frequencies are divided by: 1 where `kept` (D/2,) is 1 or more, the factor where it is 0 or
    less."""
    kept = numpy.clip(kept, 0, 1)
    return numbers(1 / (kept + (1 - kept) / factor))


def numbers(factors: numpy.ndarray) -> tuple[float, ...]:
    return tuple(factors.tolist())


SCALINGS: dict[str, tuple[str, Callable[[Scaling], dict[str, Any]]]] = {  # rope_type -> its parameters
    "default": ("", unscaled_fields),
    "linear": (f"factor {ORIGINAL} finetuned", linear_fields),
    "dynamic": (f"factor {ORIGINAL} finetuned", dynamic_fields),
    "llama3": (f"factor low_freq_factor high_freq_factor {ORIGINAL}", llama3_fields),
    "yarn": (f"factor {ORIGINAL} beta_fast beta_slow attention_factor mscale mscale_all_dim truncate "
             "attn_factor extrapolation_factor finetuned", yarn_fields),
    "longrope": (f"short_factor long_factor {ORIGINAL} factor attention_factor short_mscale long_mscale",
                 longrope_fields)}


def growing_queries(fields: Mapping, beta: float | None, original: int, context: int | None) -> dict:
    """max_positions, and q_growth if the server's `context` makes Ministral 3's queries grow."""
    if beta and (context or 0) > original:
        return {"q_growth": (beta, original)}
    return {"max_positions": min(fields["max_positions"], original if beta else MOST_POSITIONS)}
