"""Checks how much memory a model takes at which context, whether this machine has it, and how fast the model
is here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError
from chatlm.common.memory import available_memory
from chatlm.common.sizes import shown_bytes
from chatlm.worker.doctor.findings import Findings, error, note, warning
from chatlm.worker.doctor.running import CPU, ready, step
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.memory_plan import plan_model, prefill_chunk
from chatlm.worker.ranks.alone import RankAlone
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.loaded.sizes import weight_bytes

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.doctor.examined_model import ExaminedModel
    from chatlm.worker.kernels.kernels import Kernels
    from chatlm.worker.memory_plan import MemoryPlan
    from chatlm.worker.model.pages import LayerGroups
    from chatlm.worker.weights.loaded.model import LoadedModel

CONTEXTS = 4096, 32_768        # and the model's own
TRIED_BYTES = 3 << 30          # of weights: larger models take long to load, and their speed is estimated
PROMPT = 128
ANSWER = 32
TRIAL_S = 2.0


class FitPlan(NamedTuple):
    """The memory that a model takes with some settings, on a CPU."""

    kernels: Kernels
    groups: LayerGroups
    memory: MemoryPlan
    chunk: int

    @classmethod
    def of(cls, model: LoadedModel, settings: Settings) -> FitPlan:
        settings = replace(settings, drafts="none")
        plan = plan_model(model, model.architecture, settings, CPU, RankAlone())
        return cls(plan.kernels, plan.groups, plan.memory, prefill_chunk(settings, CPU))

    def cache(self, context: int) -> int:
        """The bytes of one sequence's keys, values and states."""
        pages = PagePool(0, self.groups.windows).pages_for(context, self.chunk)
        return pages * self.memory.page_bytes + self.memory.state_bytes

    def longest(self, free: int, most: int) -> int:
        """The longest context that fits in this much memory, a multiple of 1,024 tokens; 0 if none fits."""
        low = 0
        high = most // 1024
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.memory.without_cache + self.cache(
                middle * 1024) <= free else (low, middle - 1)
        return most if self.memory.without_cache + self.cache(most) <= free else 1024 * low


def check_fit(examined: ExaminedModel) -> Findings:
    """Memory: weights, and a sequence of several lengths, against what is free here."""
    model = examined.model
    settings = examined.settings
    free = available_memory()
    plan = FitPlan.of(model, settings)
    taken = plan.memory.without_cache
    most = model.context_length
    if model.architecture.of_texts:
        yield note(f"takes {shown_bytes(taken)}, of {shown_bytes(free)} that are free", bytes=taken,
                   free=free)
        return
    lighter = [*lighter_flags(examined, plan)]
    contexts = sorted({min(context, most) for context in (*CONTEXTS, most)})
    needed = {context: taken + plan.cache(context) for context in contexts}
    if taken > free:
        yield error(f"the weights and buffers take {shown_bytes(taken)}, and {shown_bytes(free)} are free "
                    "here",
                    advice=" or ".join(text for text, fits in lighter if fits <= free)
                    or "it needs a larger machine, or a file with fewer bits a weight", bytes=taken,
                    free=free)
        return
    words = ", ".join(f"{shown_bytes(size)} with a context of {context:,}"
                      f"{' (its own)' if context == most else ''}" for context, size in needed.items())
    if needed[most] <= free:
        yield note(f"takes {words}; {shown_bytes(free)} are free here", needed=dict_of(needed), free=free)
        return
    fitting = plan.longest(free, most)
    advice = [f"--context-length {fitting}"] * (fitting > 0)
    if settings.kv_cache_dtype == "auto" and (half := with_cache(examined, "q8_0")):
        advice.append(f"--kv-cache-dtype q8_0 ({half.longest(free, most):,} tokens fit)")
    advice += [f"{text} ({shown_bytes(size)} less)" for text, size in
               ((text, taken - size) for text, size in lighter if "--quantize" in text)]
    yield note(f"takes {words}, and {shown_bytes(free)} are free here: about {fitting:,} tokens fit",
               advice=" or ".join(advice), needed=dict_of(needed), free=free, longest=fitting)


def dict_of(needed: dict[int, int]) -> dict[str, int]:
    """The plan as an object of JSON."""
    return {str(context): size for context, size in needed.items()}


def with_cache(examined: ExaminedModel, kind: str) -> FitPlan | None:
    """The plan with another type of keys and values; None if the model cannot have it."""
    try:
        return FitPlan.of(examined.model, replace(examined.settings, kv_cache_dtype=kind))
    except ConfigError:
        return None


def lighter_flags(examined: ExaminedModel, plan: FitPlan) -> list[tuple[str, int]]:
    """(a flag that makes the weights smaller, the bytes that the model then takes)."""
    found = []
    taken = plan.memory.without_cache
    if examined.settings.dtype == "float32":
        found.append(("--dtype bfloat16", taken - plan.memory.weights // 2))
    if plan.memory.quantizes:
        found += [(f"--quantize {kind}", taken - plan.memory.weights + weight_bytes(examined.model, kind))
                  for kind in ("q8_0", "q4_k") if fits_blocks(examined.model, kind)]
    return found


def fits_blocks(model: LoadedModel, kind: str) -> bool:
    """Whether all rows can be divided into blocks of 256 columns, as some types need."""
    return not kind.endswith("_k") or model.architecture.width % 256 == 0


def check_speed(examined: ExaminedModel) -> Findings:
    """Tokens per second: of a short trial, or of a large model from how fast memory is read."""
    model = examined.model
    plan = FitPlan.of(model, examined.settings)
    needed = plan.memory.without_cache + plan.cache(PROMPT + ANSWER)
    if model.architecture.of_texts or needed > available_memory():
        return
    quicker = "--quantize q4_k" if fits_blocks(model, "q4_k") else "--quantize q4_0"
    advice = f"{quicker} is faster, and loses a little" if plan.memory.quantizes else ""
    if plan.memory.weights > TRIED_BYTES:
        read = bytes_per_token(model, examined.settings)
        bandwidth = read_bandwidth(examined.threads)
        speed = bandwidth / read
        yield note(f"about {speed:,.1f} tokens per second for one answer, estimated: a token reads "
                   f"{shown_bytes(read)}, and {examined.threads} threads read {shown_bytes(bandwidth)} a "
                   "second",
                   advice=advice, tokens_per_s=round(speed, 2), measured=False)
    else:
        began = time.monotonic()
        prompt, answer = trial(examined)
        yield note(f"{answer:,.1f} tokens per second for one answer, {prompt:,.0f} of prompts (measured now, "
                   f"with {examined.threads} threads)", advice=advice, tokens_per_s=round(answer, 2),
                   prompt_tokens_per_s=round(prompt, 1), measured=True,
                   took_s=round(time.monotonic() - began, 2))
        speed = answer
    if speed < 1:
        yield warning("an answer takes more than a second for each token here", advice=advice
                      or "take a smaller model")


def bytes_per_token(model: LoadedModel, settings: Settings) -> int:
    """The bytes of weights that each token of one sequence reads: all but the embedding, and of experts only
    the chosen ones."""
    made = model.architecture
    idle = ["layer_embed"] if made.tied else ["embed", "layer_embed"]
    experts = [name for name in model.tensors if name.rpartition(".")[2].startswith("expert_")]
    whole = weight_bytes(model, settings.quantize, idle)
    rest = weight_bytes(model, settings.quantize, [*idle, *experts])
    chosen, count = (made.experts.router.chosen, made.experts.count) if made.experts else (1, 1)
    return rest + (whole - rest) * chosen // count


def read_bandwidth(threads: int, size: int = 64 << 20) -> float:
    """The bytes per second that this many threads read from memory together; the best of three
    measurements."""
    parts = [numpy.ones(size // 8, numpy.uint64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        def once() -> float:
            began = time.perf_counter()
            list(pool.map(numpy.bitwise_or.reduce, parts))
            return threads * size / (time.perf_counter() - began)

        return max(once() for _ in range(3))


def trial(examined: ExaminedModel) -> tuple[float, float]:
    """(tokens of a prompt, tokens of an answer) per second."""
    settings = examined.settings
    model = open_model(examined.source, settings, "cpu")
    length = min(PROMPT + ANSWER, model.context_length)
    transformer = ready(model, replace(settings, drafts="none"), length)
    ids = numpy.random.default_rng(0).integers(0, min(model.architecture.vocab_size, 1000), length).tolist()
    prompt = max(length - ANSWER, 1)

    def compute(begin: int, end: int):
        step(transformer, ids, begin, end, [end - begin - 1])

    compute(0, prompt)  # the first step pays what only it must
    prompt_s = timed(lambda: compute(0, prompt))
    began = time.perf_counter()
    answered = 0
    for at in range(prompt, length):
        compute(at, at + 1)
        answered += 1
        if time.perf_counter() - began > TRIAL_S:
            break
    answer_s = time.perf_counter() - began
    return prompt / prompt_s, answered / answer_s if answered else math.nan


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
