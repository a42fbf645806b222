"""What to serve in place of the default model, which only demonstrates: the best that fits the memory and is
fast enough here."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from chatlm.common.invocation import program_command
from chatlm.common.memory import available_memory, read_bandwidth

# The bytes that weights, 4,096 tokens of keys and values, and both processes take; those of the file; MODEL
BETTER = (
    (20_500_000_000, 18_560_000_000, "Qwen/Qwen3-30B-A3B-GGUF:Qwen3-30B-A3B-Q4_K_M.gguf"),
    (6_500_000_000, 5_030_000_000, "Qwen/Qwen3-8B-GGUF:Qwen3-8B-Q4_K_M.gguf"),
    (3_900_000_000, 2_500_000_000, "Qwen/Qwen3-4B-GGUF:Qwen3-4B-Q4_K_M.gguf"),
    (3_000_000_000, 1_830_000_000, "Qwen/Qwen3-1.7B-GGUF:Qwen3-1.7B-Q8_0.gguf"),
    (1_700_000_000, 640_000_000, "Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf"))
SHARE = 0.8               # of free memory that a model may take: other programs grow too
FAST_ENOUGH = 10.0        # tokens per second, about as fast as one reads
SHARE_OF_BANDWIDTH = 0.7  # that decoding on a CPU reaches: 0.67 to 0.9 on a Zen 4
BESIDE_S = 0.001          # that a token takes beside reading the weights


class MemoryRate:
    """How fast this machine reads memory, which takes nearly all of a token's time on a CPU."""

    def __init__(self):
        self.bytes_per_s = 0.0  # 0: not known

    def measure(self):
        """Measure it, once. Takes 0.1 s; call it in a thread, and while nothing else computes."""
        if not self.bytes_per_s and available_memory() > 1 << 30:
            self.bytes_per_s = read_bandwidth(min(16, os.cpu_count() or 1))

    def expected_speed(self, name: str, size: int) -> float | None:
        """Estimate how many tokens per second a file of `size` bytes would write with nothing else running;
        None if that is not known."""
        if not (self.bytes_per_s and size):
            return None
        read_s = size * active_share(name) / (SHARE_OF_BANDWIDTH * self.bytes_per_s)
        return round(1 / (read_s + BESIDE_S), 1)


MEMORY_RATE = MemoryRate()  # this machine's


class BetterModel(NamedTuple):
    name: str                         # MODEL; "" if none fits
    tokens_per_second: float | None   # expected here; None: not known


def only_demonstrates(model: str) -> bool:
    return model.startswith("SmolLM2-135M")


def better_model(free: float, rate: MemoryRate = MEMORY_RATE) -> BetterModel:
    """The first of BETTER that fits in `free` bytes and is fast enough; if none is, the fastest that fits."""
    fitting = [BetterModel(model, rate.expected_speed(model, size))
               for needed, size, model in BETTER if needed <= SHARE * free]
    for better in fitting:
        if better.tokens_per_second is None or better.tokens_per_second >= FAST_ENOUGH:
            return better
    return max(fitting, key=lambda better: better.tokens_per_second or 0.0, default=BetterModel("", None))


def warning_of(model: str) -> str:
    """The line of the start-up log about a model that only demonstrates; "" about others."""
    return only_demonstrates(model) * (
        "This is a demonstration model of 135 million parameters, which is often wrong")


def advice_of(model: str, free: float, rate: MemoryRate = MEMORY_RATE) -> str:
    """What to run instead of a model that only demonstrates; "" for others, or if nothing better fits."""
    better = better_model(free, rate)
    if not only_demonstrates(model) or not better.name:
        return ""
    speed = ""
    if better.tokens_per_second:
        speed = f", about {better.tokens_per_second:,.0f} tokens a second here"
    return f"A better model that fits{speed}: {program_command()} {better.name}"


def parameters_of(name: str) -> int:
    """Estimate a model's parameters from its name: 8B, 0.6b, 30B-A3B, 8x7B. 0 if the name says nothing."""
    match = re.search(r"(?<![A-Za-z\d.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z\d])", name.lower())
    if not match:
        return 0
    return int(int(match[1] or 1) * float(match[2]) * {"b": 1e9, "m": 1e6}[match[3]])


def active_share(name: str) -> float:
    """Estimate from its name which share of its weights a model reads for a token: 30B-A3B reads a tenth."""
    active = re.search(r"(?<![A-Za-z\d])[Aa](\d+(?:\.\d+)?)[Bb](?![A-Za-z\d])", name)
    whole = parameters_of(name)
    return min(1.0, float(active[1]) * 1e9 / whole) if active and whole else 1.0
