"""How a rank will compute its share of a model, and the memory that takes; no weight is read for that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.hub.adapter_folders import bytes_of_adapters
from chatlm.common.memory import available_memory
from chatlm.worker.arrays.kinds import item_bytes
from chatlm.worker.device import gpu_memory
from chatlm.worker.engine.kvcache import PagePool, longest_context
from chatlm.worker.engine.limits import FREE_ROWS
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.pages import KvType, PageLayout, group_layers
from chatlm.worker.model.transformer import page_layout
from chatlm.worker.weights.loaded.sizes import is_float, weight_bytes

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.drafting import DraftPlan
    from chatlm.worker.kernels.kernels import Kernels
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.pages import LayerGroups
    from chatlm.worker.ranks.alone import RankAlone
    from chatlm.worker.weights.loaded.model import LoadedModel


def prefill_chunk(settings: Settings, device: Device) -> int:
    """Tokens of prompts in a step. A GPU needs more of them than a CPU to be busy."""
    return settings.prefill_chunk or (2048 if device.type == "cuda" else 256)


def step_tokens(model: Model, settings: Settings, device: Device) -> int:
    """The most tokens of prompts in a step. A model that embeds whole texts computes one of any length at
    once."""
    return max(prefill_chunk(settings, device), model.max_positions if model.of_texts else 0)


def layers_of_floats(model: Model, kv: KvType) -> str:
    """A warning of layers whose keys and values stay floats although --kv-cache-dtype is q8_0; "" if there
    are none. ConfigError if all layers do."""
    layers = model.attentions
    floats = [attn for attn in layers if not kv.packs(attn)]
    if not kv.packed or not floats:
        return ""
    sizes = ", ".join(map(str, sorted({size for attn in floats for size in kv.unpacked_sizes(attn)})))
    what = "parts of latents" if floats[0].values_in_keys else "heads"
    rule = f"q8_0 needs {what} whose size is a power of two, at least 32"
    if len(floats) == len(layers):
        raise ConfigError(f"--kv-cache-dtype q8_0: all layers have {what} of {sizes}; {rule}")
    return (f"keys and values of {len(floats)} of {len(layers)} layers stay {kv.floats}: their {what} have a "
            f"size of {sizes}, and {rule}")


class ModelPlan(NamedTuple):
    """How a rank will compute its shard of a model."""

    kernels: Kernels
    groups: LayerGroups  # the layers that share pages
    max_tokens: int      # of a step
    max_rows: int        # of logits in a step
    memory: MemoryPlan


def plan_model(model: LoadedModel, whole: Model, settings: Settings, device: Device,
               ranks: RankAlone, drafts: Seq[DraftPlan] = ()) -> ModelPlan:
    """The plan for a rank's shard of a model, of which the `whole` is given too. drafts: what drafts for it
    needs memory of the same device."""
    own = model.architecture
    max_rows = max(settings.max_batch, FREE_ROWS)
    max_tokens = step_tokens(own, settings, device) + max_rows
    if own.of_texts and (ranks.stages > 1 or ranks.tp > 1):
        raise ConfigError("--tp and --pp: a model that embeds whole texts runs in one process")
    # what the ranks sum: a residual stream, as wide as decode_core pads it, or rows of logits
    part = max(max_tokens * own.padded().width, max_rows * (own.rows.count if own.rows else 0))
    kernels = load_kernels(
        device, own, max_tokens=max_tokens, max_rows=max_rows, quantize=settings.quantize, whole=whole,
        fine=settings.arithmetic == "fine", join=ranks.join and partial(ranks.join, part_bytes=4 * part))
    whole = kernels.computed(whole)
    own = kernels.computed(own)
    # all stages have the same tables
    apart = kernels.backend.groups_layers and ranks.stages == 1 and not own.of_texts
    kv = KvType("float32") if own.of_texts else kernels.kv_type(settings.kv_cache_dtype, model.dtype)
    layers_of_floats(whole, kv)
    groups = group_layers((whole if ranks.stages == 1 else own).by_layer, own.max_positions, apart, kv)
    limits = {"max_tokens": max_tokens, "max_rows": max_rows}
    memory = plan_memory(model, whole, kernels, groups, kv, ranks, settings, device, limits)
    memory = memory._replace(tower=model.tower.nbytes if model.tower else 0)
    for draft in drafts:  # as many tokens fit in its pages
        memory = memory._replace(draft_model=memory.draft_model + draft.nbytes,
                                 page_bytes=memory.page_bytes + draft.page_share(groups))
    return ModelPlan(kernels, groups, max_tokens, max_rows, memory)


def plan_memory(model: LoadedModel, whole: Model, kernels: Kernels, groups: LayerGroups, kv: KvType,
                ranks: RankAlone, settings: Settings, device: Device,
                limits: Mapping[str, int]) -> MemoryPlan:
    """The memory for a rank's shard of a model, of which the `whole` is given too. limits: max_tokens and
    max_rows of a step.

    Each rank has its own GPU, but the ranks of a replica share their machine's memory."""
    shared = device.type != "cuda"
    copies = ranks.here if shared else 1
    own = kernels.computed(model.architecture)
    page_bytes = page_layout(own, groups, kv).page_bytes
    state_bytes = model.architecture.state_bytes
    if shared and not whole.of_texts:
        each = [attn and attn.of_all_ranks(ranks.tp) for attn in whole.by_layer]
        together = groups if ranks.stages == 1 else group_layers(each, 0, apart=False, kv=kv)
        count = ranks.tp * ranks.stages
        page_bytes = -(-PageLayout.of(together, each, kv).page_bytes * ranks.here // count)
        state_bytes = -(-whole.state_bytes * ranks.here // count)
    buffers = own.buffer_sizes(limits["max_tokens"], limits["max_rows"], "float32").values()
    activations = sum(rows * columns * item_bytes(kind) for rows, columns, kind in buffers)
    pool = PagePool(0, groups.windows)
    chunk = prefill_chunk(settings, device)
    of_step = limits["max_tokens"] // PAGE_SIZE + 2 * limits["max_rows"]
    return MemoryPlan(
        settings, device,
        weights=copies * weight_bytes(model, settings.quantize),
        activations=copies * activations,
        page_bytes=page_bytes,
        full=pool.pages_for(model.context_length, chunk),
        fewest=pool.pages_for(4 * PAGE_SIZE, chunk),
        grows=model.grows and f". {model.grows}",
        quantizes=kernels.backend.quantizes and has_float_matrices(model) and not settings.quantize,
        state_bytes=state_bytes,
        longest=own.max_positions,
        token_bytes=kv.unit * sum(kv.slot_size(attn) for attn in whole.attentions),
        mapped=sum(getattr(tensor, "file_bytes", 0) for tensor in model.tensors.values()),
        kv=kv,
        adapters=-(-copies * bytes_of_adapters(settings.adapter) // ranks.stages),
        of_step=of_step if whole.of_texts else 0)


def has_float_matrices(model: LoadedModel) -> bool:
    shapes = model.architecture.shapes()
    return any(len(shapes[name]) > 1 and is_float(tensor, shapes[name])
               for name, tensor in model.tensors.items())


FITS = "The model fits"


class MemoryPlan(NamedTuple):
    """How much of a device's memory a model takes, and how many KV pages fit."""

    settings: Settings
    device: Device
    weights: int      # bytes
    activations: int  # bytes
    page_bytes: int   # of one KV page
    full: int         # pages of a sequence that fills the context
    fewest: int       # pages of a sequence of 64 tokens: fewer pages are useless
    grows: str = ""   # a sentence, see LoadedModel
    quantizes: bool = False  # would --quantize make the weights smaller?
    state_bytes: int = 0  # of a sequence's state, where layers keep one
    longest: int = 0      # tokens of the longest text that may be scored
    token_bytes: int = 0  # that all layers of the model cache per token
    mapped: int = 0       # bytes that stay in the file, see MappedRows
    kv: KvType = KvType()
    adapters: int = 0     # bytes of adapters served with it, at most
    of_step: int = 0      # pages for the texts of a step, where no later step reads them
    draft_model: int = 0  # bytes of one without its pages, which `page_bytes` includes
    tower: int = 0        # bytes of what sees images

    @property
    def without_cache(self) -> int:
        """Bytes of everything but the KV cache."""
        return self.weights + self.adapters + self.activations + self.drafts + self.draft_model + self.tower

    @property
    def drafts(self) -> int:
        """Bytes of the same memory that texts to draft from may take."""
        here = self.device.type == "cpu" and self.settings.drafts != "none" and not self.of_step
        return self.settings.draft_memory if here else 0

    @property
    def prefixes(self) -> int:
        """Bytes of the same memory that prefixes which outlive the workers may take."""
        return (self.settings.prefix_memory or 0) if self.device.type == "cpu" else 0

    def memory(self) -> tuple[int, int]:
        """(free bytes, total bytes) of the device; the total of a machine's memory is not needed: 0."""
        return gpu_memory(self.device) if self.device.type == "cuda" else (available_memory(), 0)

    def pages(self) -> int:
        """KV pages to allocate: --kv-cache-memory, or a share of the memory left by the weights. ConfigError
        if they hold less than 64 tokens."""
        if self.of_step:
            return self.of_step
        free, total = self.memory()
        budget = self._cache_budget(free, total)
        if self.state_bytes:  # a quarter is for snapshots of states
            budget -= budget // 4
        most = self.settings.max_batch * self.full  # more could not be used
        pages = min(budget // max(self.page_bytes, 1), most)
        if pages >= self.fewest:
            return pages
        needed = self.fewest * self.page_bytes
        raise ConfigError(f"{max(budget, 0):,} bytes for the KV cache hold {max(pages, 0)} pages of "
                          f"{PAGE_SIZE} tokens; at least {self.fewest} ({needed:,} bytes) are needed: "
                          f"{self._remedy(needed, free, total)}")

    def _cache_budget(self, free: int, total: int) -> int:
        """Bytes for the KV cache and states."""
        settings = self.settings
        if settings.kv_cache_memory is not None:
            return settings.kv_cache_memory
        if self.device.type == "cuda":
            return int(free - self.without_cache - total * (1 - settings.gpu_memory_utilization))
        # other programs want memory too: one full context or 1 GiB, up to an eighth of free memory
        free = max((free - self.prefixes) // max(settings.num_workers, 1) - self.without_cache, 0)
        return min(max(1 << 30, self.full * self.page_bytes), free // 8)

    def _remedy(self, needed: int, free: int, total: int) -> str:
        """The flag and value that give the KV cache the bytes it needs."""
        if self.settings.kv_cache_memory is not None or self.device.type != "cuda":
            return f"--kv-cache-memory {(needed >> 20) + 1}M"
        share = (total - free + self.without_cache + needed) / total
        remedy = f"--gpu-memory-utilization {math.ceil(share * 100) / 100:.2f}"
        return f"{remedy} (more than there is)" if share > 1 else remedy

    def states(self, num_pages: int) -> tuple[int, int]:
        """(sequences that may run at once, snapshots) beside this many KV pages. The states of each of the
        two get a quarter of the cache; at most --max-batch sequences may run, and at least 8. A stage that
        keeps no states, or nothing else, leaves the choice to the others."""
        if not (self.state_bytes and self.page_bytes):
            return self.settings.max_batch, num_pages
        quarter = num_pages * self.page_bytes // 3 // self.state_bytes
        running = min(self.settings.max_batch, max(FREE_ROWS, quarter))
        return running, min(quarter, num_pages)

    def cache_bytes(self, num_pages: int) -> int:
        """Bytes of this many KV pages and of the states that go with them."""
        return num_pages * self.page_bytes + self.state_bytes * (sum(self.states(num_pages)) + FREE_ROWS)

    def context(self, num_pages: int, groups: LayerGroups) -> int:
        """The longest text that fits in this many pages, in tokens."""
        if self.of_step:
            return self.longest
        pool = PagePool(num_pages, groups.windows)
        return longest_context(pool, self.longest, prefill_chunk(self.settings, self.device))

    def within(self, budget: int) -> MemoryPlan:
        """The plan with a fixed KV cache size that leaves room for other models in `budget` bytes, unless the
        operator has set one. A worker then takes that much, whatever is free when it starts."""
        if self.settings.kv_cache_memory is not None or self.of_step:
            return self
        rest = budget - self.without_cache
        cache = min(max(1 << 30, self.full * self.page_bytes), budget // 8, rest)
        least = self.fewest * self.page_bytes
        cache = max(cache, 2 * least if self.state_bytes else least)
        return self._replace(settings=replace(self.settings, kv_cache_memory=cache))

    def line(self, num_pages: int) -> str:
        """Whether the model fits, in words, with the flag that helps. ConfigError if the weights alone do not
        fit."""
        free, total = self.memory()
        cache = self.cache_bytes(num_pages)
        needed = self.without_cache + cache + self.prefixes
        line = (f"{self._sum(num_pages)} = {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free on "
                f"{self.device}")
        if self.mapped:
            line += (f"; the {self.mapped / 1e9:,.2f} GB of embeddings of each layer stay in the file, of "
                     "which a token reads one row")
        if self.device.type == "cuda":
            line += f", of {total / 1e9:,.2f} GB; other programs hold the rest"
        line += self.grows
        if needed <= free:
            return f"{FITS}: {line}"
        if self.weights + self.activations > free:
            remedies = [*self._lighter_flags(), "a smaller model"]
            raise ConfigError(f"the model does not fit: {line}. Try {' or '.join(remedies)}")
        if needed - free <= self.prefixes:
            room = free - needed + self.prefixes
            return f"The model may not fit: {line}. --prefix-memory {room >> 20}M helps"
        return (f"The model may not fit: {line}. --kv-cache-memory {free - needed + cache >> 20}M or a "
                "shorter --context-length helps")

    def _sum(self, num_pages: int) -> str:
        """What takes memory, with its bytes."""
        parts = [("weights", self.weights, "")]
        parts += [(name, nbytes, "") for name, nbytes in (
            ("adapters", self.adapters), ("drafts", self.drafts), ("draft model", self.draft_model),
            ("images", self.tower)) if nbytes]
        parts += [("activations", self.activations, "")]
        cache_bytes = self.cache_bytes(num_pages)
        if self.of_step:
            parts.append(("keys and values of a step", cache_bytes, ""))
        else:
            parts.append(("KV cache", cache_bytes, f"{self._states_line(num_pages)} "
                                                   f"({self.token_bytes:,} bytes a token)"))
        if self.prefixes:
            parts.append(("prefixes", self.prefixes, ""))
        return " + ".join(f"{name} {nbytes / 1e9:,.2f} GB{more}" for name, nbytes, more in parts)

    def _states_line(self, num_pages: int) -> str:
        if not self.state_bytes:
            return ""
        running, snapshots = self.states(num_pages)
        return f" with {running} states and {snapshots} snapshots"

    def _lighter_flags(self) -> list[str]:
        """Flags that make the weights smaller."""
        settings = self.settings
        return [flag for flag, helps in (
            ("--dtype bfloat16", settings.dtype == "float32"), ("--num-workers 1", settings.num_workers > 1),
            ("--quantize q4_0", self.quantizes)) if helps]
