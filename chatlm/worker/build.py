"""Builds the transformer of a worker or a rank, and the engine of a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import replace
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.hub.local import no_progress
from chatlm.common.log import log
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.drafting import DraftHelp, plan_drafters
from chatlm.worker.engine.engine import Engine
from chatlm.worker.engine.limits import FREE_ROWS
from chatlm.worker.engine.pieces import open_for_answers
from chatlm.worker.kernels.choosing import choose_backend
from chatlm.worker.kernels.kernels import Backend
from chatlm.worker.memory_plan import FITS, layers_of_floats, plan_model, prefill_chunk
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.parts import Making, make_parts
from chatlm.worker.ranks.alone import PlannedRank, RankAlone
from chatlm.worker.weights.adapters.serving import adapter_reader
from chatlm.worker.weights.load import open_model

if TYPE_CHECKING:
    from pathlib import Path
    from chatlm.common.config import Settings
    from chatlm.common.hub.local import Progress
    from chatlm.common.messages.requests import ModelSource
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.arrays.kinds import AdapterMatrix
    from chatlm.worker.drafting import DraftPlan
    from chatlm.worker.engine.draft_head import DraftHead
    from chatlm.worker.engine.draft_model import DraftModel
    from chatlm.worker.ranks.ranks import RankZero
    from chatlm.worker.weights.loaded.model import LoadedModel


CANNOT_CHAT = ("It has no chat template, so it cannot chat: it continues texts, for /v1/completions, "
               "/api/generate, and the commands generate and chat")
IS_BASE = ("It is a base checkpoint, which was not taught to chat: it continues texts. Those who ask for a "
           "chat get one: /v1/chat/completions, a button of the page, --conversation")
EMBEDS = ("It makes vectors of texts, for /v1/embeddings, /api/embed, /v1/score and the command embed; it "
          "cannot chat")
RANKS = "It ranks documents for a query, for /v1/rerank and /v1/score; it cannot chat"


class BuiltModel(NamedTuple):
    """A model, or a rank's share of one, whose weights have been read."""

    model: LoadedModel
    transformer: Transformer
    num_pages: int
    context_length: int  # tokens of the longest text that the pages hold
    max_batch: int       # sequences that may run at once


def build_engine(source: ModelSource, settings: Settings, device: Device,
                 progress: Progress = no_progress, ranks: RankZero | None = None,
                 opened: Callable[[LoadedModel], None] = lambda model: None,
                 draft_help: DraftHelp | None = None) -> tuple[LoadedModel, Engine]:
    """opened: called before any weight is read. draft_help: which drafts the start may go without."""
    model = open_model(source, settings, device)
    vision = model.text.vision
    if vision and vision.two_sided:  # a step must hold all rows of a picture
        settings = replace(settings, prefill_chunk=max(prefill_chunk(settings, device), vision.tokens))
    opened(model)
    try:
        tokenizer = open_for_answers(model.text, model.vocabulary)  # the front also reads its chat template
    except ConfigError as error:
        raise ConfigError(f"{source.path}: {error}") from None
    note_purpose(model, tokenizer)
    state_bytes = model.architecture.state_bytes  # of all ranks
    chunk = prefill_chunk(settings, device)

    draft_help = draft_help or DraftHelp()
    texts = draft_help.texts(settings.draft_text)
    drafts = plan_drafters(model, settings, device, chunk, progress, draft_help)
    drafts = those_that_fit(drafts, model, settings, device, draft_help)
    built = build_transformer(model, source, settings, device, progress, ranks, drafts)
    model = built.model
    drafters = load_drafters(drafts, tokenizer, built, progress, draft_help)
    model.notes += tuple(drafter.line() for drafter in drafters)
    making = Making(settings, model, built.transformer, tokenizer, device, chunk, ranks, drafters, texts)
    engine = Engine(built.transformer, tokenizer, built.transformer.kernels, num_pages=built.num_pages,
                    max_batch=built.max_batch, context_length=built.context_length, prefill_chunk=chunk,
                    drafts=settings.drafts, ranks=ranks, state_bytes=state_bytes, parts=make_parts(making))
    return model, engine


def note_purpose(model: LoadedModel, tokenizer: Tokenizer):
    """Note what the model is for, unless it is for chats."""
    embedder = model.text.embedder
    if embedder:
        model.notes += (RANKS if embedder.pooling == "rank" else EMBEDS,)
    elif not tokenizer.has_chat_template:
        model.notes += (CANNOT_CHAT,)
    elif tokenizer.continues_texts:
        model.notes += (IS_BASE,)


def load_drafters(drafts: Seq[DraftPlan], tokenizer: Tokenizer, built: BuiltModel, progress: Progress,
                  draft_help: DraftHelp) -> list[DraftModel | DraftHead]:
    """Read the weights of what drafts, but for those that the start may go without and that fail."""
    drafters = []
    for draft in drafts:
        with draft_help.optional(draft.flag):
            drafters.append(draft.load(tokenizer.stop_tokens, built.transformer, built.num_pages, progress))
    return drafters


def those_that_fit(drafts: Seq[DraftPlan], model: LoadedModel, settings: Settings, device: Device,
                   draft_help: DraftHelp) -> Seq[DraftPlan]:
    """The drafts without a draft model for which there is no memory. One that the start needs stays: the plan
    of the model will say that it does not fit. Of several ranks the first drafts, and asks no other here."""
    if draft_help.terms.needed or not any(draft.source for draft in drafts):
        return drafts
    with draft_help.optional("--draft-model"):
        rank = PlannedRank(settings, 0)
        share = rank.share_of(model, settings.quantize)
        memory = plan_model(share, model.architecture, settings, device, rank, drafts).memory
        memory.line(memory.pages())
        return drafts
    return [draft for draft in drafts if not draft.source]


def build_transformer(
        model: LoadedModel, source: ModelSource, settings: Settings, device: Device, progress: Progress,
        ranks: RankAlone | None, drafts: Seq[DraftPlan] = ()) -> BuiltModel:
    """Load the weights, or a rank's share of them, and allocate the KV pages. drafts: what must fit beside
    them."""
    ranks = ranks or RankAlone()
    whole = model.architecture
    model = ranks.share_of(model, settings.quantize)
    if model.dtype is None and not choose_backend(device, model.architecture).as_stored:
        # torch computes this share of a model that decode_core would compute, and reads no packed matrices
        settings = replace(settings, dtype=Backend(device.type).dtype)
        model = ranks.share_of(open_model(source, settings, device), settings.quantize)
    plan = plan_model(model, whole, settings, device, ranks, drafts)
    num_pages = ranks.min_over_ranks(plan.memory.pages())
    context_length = plan.memory.context(num_pages, plan.groups)
    if context_length < model.context_length and model.architecture.has_rope_factors:  # longrope's
        model = open_model(source, replace(settings, context_length=context_length), device)
        model = ranks.share_of(model, settings.quantize)

    line = plan.memory.line(num_pages)
    if settings.verbose or not line.startswith(FITS):
        log.info("%s", line)
    warnings = layers_of_floats(plan.kernels.computed(whole), plan.memory.kv), loss_of(settings.quantize)
    for warning in warnings:
        if warning:
            log.warning("%s", warning)
    running, snapshots = (ranks.min_over_ranks(count) for count in plan.memory.states(num_pages))
    transformer = Transformer(
        model.architecture, model.tensors, plan.kernels, num_pages=num_pages, device=device,
        dtype=model.dtype, num_slots=running + FREE_ROWS + snapshots, groups=plan.groups,
        kv=plan.memory.kv, read_adapter=reader_of_adapters(model, settings), progress=progress,
        max_tokens=plan.max_tokens, max_rows=plan.max_rows)
    return BuiltModel(model, transformer, num_pages, context_length, running)


def reader_of_adapters(model: LoadedModel, settings: Settings
                       ) -> Callable[[Path], dict[str, AdapterMatrix]] | None:
    """What reads adapters; None if the model will be given none, or accepts none."""
    if not settings.takes_adapters:
        return None
    return adapter_reader(model)


# The mean KL from the next tokens of float weights to those of a type: of the default model, whose rows are
# filled up to whole blocks, over 3 to 6 chunks of 512 tokens.
LOSSES = {"q3_k": 1.05, "q2_k": 6.2}


def loss_of(quantize: str | None) -> str:
    """A warning of what --quantize costs, where that is much; "" elsewhere."""
    if quantize not in LOSSES:
        return ""
    return (f"--quantize {quantize}: on the default model, of 135 million parameters, the mean KL from its "
            f"float weights is {LOSSES[quantize]} (q4_k: 0.08). Larger models lose less; compare before use")
