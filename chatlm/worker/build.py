"""Memory plan, transformer and engine of a worker or a rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.hub.adapters import bytes_of_adapters
from chatlm.common.hub.local import no_progress
from chatlm.common.log import log
from chatlm.common.memory import available_memory
from chatlm.worker.arrays.kinds import FLOATS, Device, item_bytes
from chatlm.worker.device import gpu_memory
from chatlm.worker.drafting import DraftHelp, plan_drafters
from chatlm.worker.engine.engine import Engine
from chatlm.worker.engine.kvcache import PagePool, longest_context
from chatlm.worker.engine.lookup import TOKEN_BYTES, Lookup
from chatlm.worker.engine.model_drafts import ModelDrafts
from chatlm.worker.engine.pieces import open_for_answers
from chatlm.worker.engine.limits import FREE_ROWS
from chatlm.worker.model.kernels import Backend, choose_backend, load_kernels
from chatlm.worker.model.pages import KvType, PageLayout, group_layers
from chatlm.worker.model.tower import Tower, chunk_work
from chatlm.worker.model.transformer import Transformer, page_layout
from chatlm.worker.ranks.ranks import PlannedRank, RankAlone
from chatlm.worker.weights.adapters import adapter_reader
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.shards import shard_model, stage_model
from chatlm.worker.weights.sizes import is_float, weight_bytes

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.hub.local import Progress
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.drafting import DraftPlan
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.kernels import Kernels
    from chatlm.worker.model.pages import LayerGroups
    from chatlm.worker.ranks.ranks import RankZero
    from chatlm.worker.weights.rules import LoadedModel


def prefill_chunk(settings: Settings, device: Device) -> int:
    """A GPU needs more rows than a CPU to be busy."""
    return settings.prefill_chunk or (2048 if device.type == "cuda" else 256)


def step_tokens(model: Model, settings: Settings, device: Device) -> int:
    """The most tokens of prompts in a step, which takes a whole text of a model that embeds such."""
    return max(prefill_chunk(settings, device), model.max_positions if model.of_texts else 0)


CANNOT_CHAT = ("It has no chat template, so it cannot chat: it continues texts, for /v1/completions, "
               "/api/generate, and the commands generate and chat")
IS_BASE = ("It is a base checkpoint, which was not taught to chat: it continues texts. Those who ask for a "
           "chat get one: /v1/chat/completions, a button of the page, --conversation")
EMBEDS = ("It makes vectors of texts, for /v1/embeddings, /api/embed, /v1/score and the command embed; it "
          "cannot chat")
RANKS = "It ranks documents for a query, for /v1/rerank and /v1/score; it cannot chat"


# Chunks of prompts that take about as long as a part of an image. Others wait for a step besides, which may
# be a chunk, and for no more than two chunks.
STAGE_CHUNKS = 1
FLOAT_TYPES = (*FLOATS, "f32", "f16", "bf16")  # of matrices, as tensors and as tiles call them


def make_tower(model: LoadedModel, transformer: Transformer, settings: Settings, device: Device,
               chunk: int) -> Tower | None:
    """What sees images, if the model does. Where the model's own matrices are quantized, the tower's layers
    of floats become q8_0: no more exact than what reads their results, and 2.3 times as fast."""
    if not model.eyes:
        return None
    quantized = bool(transformer.matrix_types) and transformer.matrix_types[0] not in FLOAT_TYPES
    quantize = settings.quantize or (
        "q8_0" if quantized and transformer.kernels.backend.quantizes else None)
    return Tower(model.eyes, device, dtype=model.dtype, quantize=quantize,
                 part=STAGE_CHUNKS * chunk_work(model.architecture, chunk, quantized))


def build_engine(source: ModelSource, settings: Settings, device: Device,
                 progress: Progress = no_progress, ranks: RankZero | None = None,
                 opened: Callable[[LoadedModel], None] = lambda model: None,
                 draft_help: DraftHelp | None = None) -> tuple[LoadedModel, Engine]:
    """opened: called before any weight is read. draft_help: which drafts the start may go without."""
    model = open_model(source, settings, device)
    if (vision := model.text.vision) and vision.two_sided:  # a step must hold all rows of a picture
        settings = replace(settings, prefill_chunk=max(prefill_chunk(settings, device), vision.tokens))
    opened(model)
    try:
        tokenizer = open_for_answers(model.text, model.vocabulary)  # the front also reads its chat template
    except ConfigError as error:
        raise ConfigError(f"{source.path}: {error}") from None
    if embedder := model.text.embedder:
        model.notes += (RANKS if embedder.pooling == "rank" else EMBEDS,)
    elif not tokenizer.has_chat_template:
        model.notes += (CANNOT_CHAT,)
    elif tokenizer.continues_texts:
        model.notes += (IS_BASE,)
    state_bytes = model.architecture.state_bytes
    chunk = prefill_chunk(settings, device)
    draft_help = draft_help or DraftHelp()
    texts = draft_help.texts(settings.draft_text)
    drafts = plan_drafters(model, settings, device, chunk, progress, draft_help)
    drafts = those_that_fit(drafts, model, settings, device, draft_help)
    model, transformer, num_pages, context, max_batch = build_transformer(
        model, source, settings, device, progress, ranks, drafts)
    tower = make_tower(model, transformer, settings, device, chunk)
    drafters = []
    for draft in drafts:
        with draft_help.optional(draft.flag):
            drafters.append(draft.load(tokenizer.stop_tokens, transformer, num_pages, progress))
    model.notes += tuple(drafter.line() for drafter in drafters)
    lookup = Lookup(settings.draft_memory // TOKEN_BYTES)
    if settings.drafts != "none":
        lookup.read(texts, tokenizer.encode)
    return model, Engine(transformer, tokenizer, transformer.kernels, num_pages=num_pages,
                         max_batch=max_batch, context_length=context,
                         prefill_chunk=chunk, drafts=settings.drafts, ranks=ranks,
                         state_bytes=state_bytes, ranking=model.ranking, head=model.head, lookup=lookup,
                         draft_models=[*map(ModelDrafts, drafters)], tower=tower)


def those_that_fit(drafts: Seq[DraftPlan], model: LoadedModel, settings: Settings, device: Device,
                   draft_help: DraftHelp) -> Seq[DraftPlan]:
    """What drafts, without a draft model for which there is no memory. If it is needed, the plan of the model
    says so. The first of several ranks drafts, and asks no other here."""
    if draft_help.terms.needed or not any(draft.source for draft in drafts):
        return drafts
    with draft_help.optional("--draft-model"):
        rank = PlannedRank(settings, 0)
        share = share_of_rank(model, rank, settings)
        _, _, _, plan = plan_model(share, model.architecture, settings, device, rank, drafts)
        plan.line(plan.pages())
        return drafts
    return [draft for draft in drafts if not draft.source]


def build_transformer(
        model: LoadedModel, source: ModelSource, settings: Settings, device: Device, progress: Progress,
        ranks: RankAlone | None, drafts: Seq[DraftPlan] = ()
) -> tuple[LoadedModel, Transformer, int, int, int]:
    """Load the weights, or a rank's shards of them, and allocate the KV pages. Also returns the number of
    pages, the longest text they hold, and how many sequences may run at once. drafts: what must fit too."""
    ranks = ranks or RankAlone()
    whole = model.architecture
    model = share_of_rank(model, ranks, settings)
    if model.dtype is None and not choose_backend(device, model.architecture).as_stored:
        # torch computes this share of a model that decode_core would compute, and reads no packed matrices
        settings = replace(settings, dtype=Backend(device.type).dtype)
        model = share_of_rank(open_model(source, settings, device), ranks, settings)
    kernels, groups, limits, plan = plan_model(model, whole, settings, device, ranks, drafts)
    num_pages = ranks.min_over_ranks(plan.pages())
    context = plan.context(num_pages, groups)
    if context < model.context_length and model.architecture.has_rope_factors:  # longrope's
        model = open_model(source, replace(settings, context_length=context), device)
        model = share_of_rank(model, ranks, settings)
    line = plan.line(num_pages)
    if settings.verbose or not line.startswith(FITS):
        log.info("%s", line)
    for warning in (layers_of_floats(kernels.computed(whole), plan.kv), loss_of(settings.quantize)):
        if warning:
            log.warning("%s", warning)
    running, snapshots = (ranks.min_over_ranks(count) for count in plan.states(num_pages))
    transformer = Transformer(model.architecture, model.tensors, kernels, num_pages=num_pages, device=device,
                              dtype=model.dtype, num_slots=running + FREE_ROWS + snapshots, groups=groups,
                              kv=plan.kv, read_adapter=adapter_reader(model), progress=progress,
                              max_tokens=limits["max_tokens"], max_rows=limits["max_rows"])
    return model, transformer, num_pages, context, running


# The mean KL from float weights' next tokens to those of a type: the default model, rows filled up to whole
# blocks (bench/RESULTS.md)
LOSSES = {"q3_k": 1.05, "q2_k": 6.2}


def loss_of(quantize: str | None) -> str:
    """What --quantize costs where that is much, in words; "" elsewhere."""
    if quantize not in LOSSES:
        return ""
    return (f"--quantize {quantize}: on the default model, of 135 million parameters, the mean KL from its "
            f"float weights is {LOSSES[quantize]} (q4_k: 0.08). Larger models lose less; compare before use")


def layers_of_floats(model: Model, kv: KvType) -> str:
    """Which layers stay floats although --kv-cache-dtype is q8_0, in words; "" if none. ConfigError if all
    do."""
    layers = model.attentions
    floats = [attn for attn in layers if not kv.packs(attn)]
    if not kv.packed or not floats:
        return ""
    sizes = ", ".join(map(str, sorted({size for attn in floats for size in kv.unpacked_sizes(attn)})))
    rule = "q8_0 needs heads whose size is a power of two, at least 32"
    if len(floats) == len(layers):
        raise ConfigError(f"--kv-cache-dtype q8_0: all layers have heads of {sizes}; {rule}")
    return (f"keys and values of {len(floats)} of {len(layers)} layers stay {kv.floats}: their heads have a "
            f"size of {sizes}, and {rule}")


def share_of_rank(model: LoadedModel, ranks: RankAlone, settings: Settings) -> LoadedModel:
    """A rank's share of a model not yet read. ConfigError if it cannot be divided that way."""
    model = stage_model(model, ranks.rank // ranks.tp, ranks.stages)  # the same for all ranks of a stage
    return shard_model(model, ranks.rank % ranks.tp, ranks.tp, settings.quantize)


def plan_model(model: LoadedModel, whole: Model, settings: Settings, device: Device,
               ranks: RankAlone, drafts: Seq[DraftPlan] = ()
               ) -> tuple[Kernels, LayerGroups, dict[str, int], MemoryPlan]:
    """How a rank will compute its shard of a model, of which the `whole` is given too: the kernels, the
    layers that share pages, the limits of a step, and the memory needed, also for what drafts. No weight is
    read. """
    own = model.architecture
    rows = max(settings.max_batch, FREE_ROWS)
    limits = {"max_tokens": step_tokens(own, settings, device) + rows, "max_rows": rows}
    if own.of_texts and (ranks.stages > 1 or ranks.tp > 1):
        raise ConfigError("--tp and --pp: a model that embeds whole texts runs in one process")
    # what the ranks sum: a residual stream, as wide as decode_core pads it, or rows of logits
    part = max(limits["max_tokens"] * own.padded().width, rows * (own.rows.count if own.rows else 0))
    kernels = load_kernels(
        device, own, **limits, quantize=settings.quantize, whole=whole, fine=settings.arithmetic == "fine",
        join=ranks.join and partial(ranks.join, part_bytes=4 * part))
    whole = kernels.computed(whole)
    own = kernels.computed(own)
    # all stages have the same tables
    apart = kernels.backend.groups_layers and ranks.stages == 1 and not own.of_texts
    kv = KvType("float32") if own.of_texts else kernels.kv_type(settings.kv_cache_dtype, model.dtype)
    layers_of_floats(whole, kv)
    groups = group_layers((whole if ranks.stages == 1 else own).by_layer, own.max_positions, apart, kv)
    plan = plan_memory(model, whole, kernels, groups, kv, ranks, settings, device, limits)
    plan = plan._replace(tower=model.eyes.nbytes if model.eyes else 0)
    for draft in drafts:  # as many tokens fit in its pages
        plan = plan._replace(draft_model=plan.draft_model + draft.taken,
                             page_bytes=plan.page_bytes + draft.page_share(groups))
    return kernels, groups, limits, plan


def plan_memory(model: LoadedModel, whole: Model, kernels: Kernels, groups: LayerGroups, kv: KvType,
                ranks: RankAlone, settings: Settings, device: Device,
                limits: Mapping[str, int]) -> MemoryPlan:
    """The plan for a rank's shard of a model, of which the `whole` is given too.

    Each rank has its own GPU, but the ranks of a replica share their machine's memory."""
    shared = device.type != "cuda"
    own = kernels.computed(model.architecture)
    state_bytes = model.architecture.state_bytes
    page_bytes = page_layout(own, groups, kv).page_bytes
    if shared and not whole.of_texts:
        each = [attn and replace(attn, kv_heads=max(attn.kv_heads, ranks.tp)) for attn in whole.by_layer]
        together = groups if ranks.stages == 1 else group_layers(each, 0, apart=False, kv=kv)
        page_bytes = PageLayout.of(together, each, kv).page_bytes
        page_bytes, state_bytes = (-(-size * ranks.here // (ranks.tp * ranks.stages))
                                   for size in (page_bytes, whole.state_bytes))
    buffers = own.buffer_sizes(limits["max_tokens"], limits["max_rows"], "float32").values()
    activations = sum(rows * columns * item_bytes(kind) for rows, columns, kind in buffers)
    copies = ranks.here if shared else 1
    pool = PagePool(0, groups.windows)
    token_bytes = kv.unit * sum(kv.slot_size(attn) for attn in whole.attentions)
    shapes = model.architecture.shapes()
    floats = any(len(shapes[name]) > 1 and is_float(tensor, shapes[name])
                 for name, tensor in model.tensors.items())
    full, fewest = (pool.pages_for(length, prefill_chunk(settings, device))
                    for length in (model.context_length, 4 * PAGE_SIZE))
    return MemoryPlan(settings, device, copies * weight_bytes(model, settings.quantize), copies * activations,
                      page_bytes, full, fewest, model.grows and f". {model.grows}",
                      kernels.backend.quantizes and floats and not settings.quantize, state_bytes,
                      own.max_positions, token_bytes,
                      sum(getattr(tensor, "file_bytes", 0) for tensor in model.tensors.values()), kv,
                      -(-copies * bytes_of_adapters(settings.adapter) // ranks.stages),
                      limits["max_tokens"] // PAGE_SIZE + 2 * limits["max_rows"] if whole.of_texts else 0)


FITS = "The model fits"


class MemoryPlan(NamedTuple):
    """How much of a device's memory a model takes, and how many KV pages fit."""

    settings: Settings
    device: Device
    weights: int      # bytes
    activations: int  # bytes
    page_bytes: int   # of one KV page
    full: int         # pages of a sequence that fills the context
    fewest: int       # pages of one of 64 tokens: fewer are useless
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
    def taken(self) -> int:
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
        """KV pages to allocate: --kv-cache-memory, or a share of the memory left by the weights;
        ConfigError below 64 tokens."""
        settings, (free, total), taken = self.settings, self.memory(), self.taken
        if self.of_step:
            return self.of_step
        if settings.kv_cache_memory is not None:
            budget = settings.kv_cache_memory
        elif self.device.type == "cuda":
            budget = int(free - taken - total * (1 - settings.gpu_memory_utilization))
        else:  # other programs want memory too: one full context or 1 GiB, up to an eighth of free memory
            free = max((free - self.prefixes) // max(settings.num_workers, 1) - taken, 0)
            budget = min(max(1 << 30, self.full * self.page_bytes), free // 8)
        if self.state_bytes:  # a quarter is for snapshots of states
            budget -= budget // 4
        most = settings.max_batch * self.full  # more could not be used
        pages = min(budget // max(self.page_bytes, 1), most)
        if pages >= self.fewest:
            return pages
        needed = self.fewest * self.page_bytes
        remedy = f"--kv-cache-memory {(needed >> 20) + 1}M"
        if settings.kv_cache_memory is None and self.device.type == "cuda":
            share = (total - free + taken + needed) / total
            remedy = f"--gpu-memory-utilization {math.ceil(share * 100) / 100:.2f}"
            remedy += " (more than there is)" if share > 1 else ""
        raise ConfigError(f"{max(budget, 0):,} bytes for the KV cache hold {max(pages, 0)} pages of "
                          f"{PAGE_SIZE} tokens; at least {self.fewest} ({needed:,} bytes) are needed: "
                          f"{remedy}")

    def states(self, num_pages: int) -> tuple[int, int]:
        """(sequences that may run at once, snapshots). With this many KV pages, the states of each of the two
        get a quarter of the cache; the first are at most --max-batch and at least 8. A stage without states,
        or with nothing else, leaves the choice to the others."""
        if not (self.state_bytes and self.page_bytes):
            return self.settings.max_batch, num_pages
        quarter = num_pages * self.page_bytes // 3 // self.state_bytes
        return min(self.settings.max_batch, max(FREE_ROWS, quarter)), min(quarter, num_pages)

    def cache_bytes(self, num_pages: int) -> int:
        """Bytes of this many KV pages and of the states that go with them."""
        return num_pages * self.page_bytes + self.state_bytes * (sum(self.states(num_pages)) + FREE_ROWS)

    def context(self, num_pages: int, groups: LayerGroups) -> int:
        """The longest text that fits in this many pages."""
        return self.longest if self.of_step else longest_context(
            PagePool(num_pages, groups.windows), self.longest, prefill_chunk(self.settings, self.device))

    def within(self, budget: int) -> MemoryPlan:
        """The plan with a KV cache size that leaves room for other models in `budget` bytes, unless the
        operator has set one. With a fixed size a worker takes that much, whatever is free by then."""
        if self.settings.kv_cache_memory is not None or self.of_step:
            return self
        rest = budget - self.taken
        cache = min(max(1 << 30, self.full * self.page_bytes), budget // 8, rest)
        least = self.fewest * self.page_bytes
        cache = max(cache, 2 * least if self.state_bytes else least)
        return self._replace(settings=replace(self.settings, kv_cache_memory=cache))

    def line(self, num_pages: int) -> str:
        """Whether the model fits, in words, with the flag that helps; ConfigError if the weights alone do not
        fit."""
        settings, (free, total), cache = self.settings, self.memory(), self.cache_bytes(num_pages)
        running, snapshots = self.states(num_pages)
        needed = self.taken + cache + self.prefixes
        kept = f" + prefixes {self.prefixes / 1e9:,.2f} GB" if self.prefixes else ""
        more = f" + adapters {self.adapters / 1e9:,.2f} GB" if self.adapters else ""
        more += f" + drafts {self.drafts / 1e9:,.2f} GB" if self.drafts else ""
        more += f" + draft model {self.draft_model / 1e9:,.2f} GB" if self.draft_model else ""
        more += f" + images {self.tower / 1e9:,.2f} GB" if self.tower else ""
        pages = "keys and values of a step" if self.of_step else "KV cache"
        each = f" ({self.token_bytes:,} bytes a token)" if not self.of_step else ""
        parts = f" with {running} states and {snapshots} snapshots" if self.state_bytes else ""
        line = (f"weights {self.weights / 1e9:,.2f} GB{more} + "
                f"activations {self.activations / 1e9:,.2f} GB + {pages} {cache / 1e9:,.2f} GB{parts}{each}"
                f"{kept} = {needed / 1e9:,.2f} GB, and "
                f"{free / 1e9:,.2f} GB are free on {self.device}")
        if self.mapped:
            line += (f"; the {self.mapped / 1e9:,.2f} GB of embeddings of each layer stay in the file, of "
                     "which a token reads one row")
        if self.device.type == "cuda":
            line += f", of {total / 1e9:,.2f} GB; other programs hold the rest"
        if needed <= free:
            return f"{FITS}: {line}{self.grows}"
        lighter = [flag for flag, helps in (
            ("--dtype bfloat16", settings.dtype == "float32"), ("--num-workers 1", settings.num_workers > 1),
            ("--quantize q4_0", self.quantizes)) if helps]
        line += self.grows
        if self.weights + self.activations > free:
            raise ConfigError(f"the model does not fit: {line}. "
                              f"Try {' or '.join([*lighter, 'a smaller model'])}")
        if needed - free <= self.prefixes:
            room = free - needed + self.prefixes
            return f"The model may not fit: {line}. --prefix-memory {room >> 20}M helps"
        return (f"The model may not fit: {line}. --kv-cache-memory {free - needed + cache >> 20}M or a "
                "shorter --context-length helps")
