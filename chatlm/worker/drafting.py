"""Opens what drafts for a model: that of --draft-model, if it fits, and the draft head in its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, error_text, shown
from chatlm.common.files import read_text_of
from chatlm.common.hub.find import of_draft_model, resolve_model
from chatlm.common.hub.local import no_progress
from chatlm.common.hub.stamps import refuse_changed
from chatlm.common.log import log
from chatlm.common.messages.protocol import DraftTerms
from chatlm.worker.arrays.kinds import item_bytes
from chatlm.worker.engine.draft_head import DraftHead
from chatlm.worker.engine.draft_model import DraftModel
from chatlm.worker.engine.limits import FREE_ROWS
from chatlm.worker.engine.pieces import PieceTokenizer, open_for_answers
from chatlm.worker.kernels.choosing import choose_backend, load_kernels
from chatlm.worker.kernels.kernels import Backend
from chatlm.worker.model.pages import group_layers
from chatlm.worker.model.transformer import Transformer, page_layout
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.loaded.sizes import weight_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq
    from chatlm.common.config import Settings
    from chatlm.common.hub.local import Progress
    from chatlm.common.hub.stamps import Stamp
    from chatlm.common.messages.requests import ModelSource
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.kernels.kernels import Kernels
    from chatlm.worker.model.pages import KvType, LayerGroups
    from chatlm.worker.weights.loaded.model import LoadedModel


class DraftHelp:
    """Drafts are a help: answers are the same without them. So only the first start of a server fails if a
    flag names what cannot be used, for the operator to correct. A later start, on which requests rely, goes
    without it and says why, whatever has happened to the files meanwhile."""

    def __init__(self, terms: DraftTerms = DraftTerms()):
        self.terms = terms
        self.without: list[str] = []  # what is left out: the flag and the reason

    @contextmanager
    def optional(self, flag: str) -> Iterator[None]:
        """Leave out what a flag names if this block fails."""
        try:
            yield
        except (EOFError, ConnectionError):  # the front has gone
            raise
        except Exception as error:  # also of a file that is broken in an unexpected way
            if self.terms.needed:
                raise
            reason = str(error) if isinstance(error, ConfigError) else error_text(error)
            self.leave_out(flag, reason)

    def leave_out(self, flag: str, reason: str):
        self.without.append(reason if reason.startswith(flag) else f"{flag}: {reason}")

    def texts(self, paths: Seq[str]) -> list[str]:
        """The texts of --draft-text."""
        if paths and self.terms.failed:
            self.leave_out("--draft-text", self.terms.failed)
            return []
        texts = []
        for path in paths:
            with self.optional("--draft-text"):
                texts.append(read_text_of(path, "--draft-text"))
        return texts


class DraftPlan(NamedTuple):
    """A draft model that has not been read yet, and the memory that it will take."""

    model: LoadedModel
    kernels: Kernels
    groups: LayerGroups
    kv: KvType
    max_tokens: int  # of a step
    max_rows: int    # of logits in a step
    prefill_chunk: int
    max_batch: int
    nbytes: int      # of its weights and buffers
    page_bytes: int  # of one page of its KV cache
    settings: Settings  # by which it is read
    source: ModelSource | None = None  # its files, if they are not the model's

    @property
    def flag(self) -> str:
        """The flag that asked for it."""
        return "--draft-model" if self.source else "--drafts mtp"

    def page_share(self, groups: LayerGroups) -> int:
        """Bytes of its KV cache for each page of a model with these groups."""
        return -(-self.page_bytes // len(groups.windows))

    def load(self, stop_tokens: frozenset[int], target: Transformer, num_pages: int,
             progress: Progress = no_progress) -> DraftModel | DraftHead:
        """Read its weights. stop_tokens, num_pages: of `target`, the model that it drafts for. A draft head
        uses the embedding and the output matrix of that model, unless ranks have parts of these."""
        model = self.model
        device = target.device
        num_pages = -(-num_pages // len(target.groups.windows))
        shared = shared_names(model, target.model.rows is not None)
        transformer = Transformer(
            model.architecture, model.tensors, self.kernels, num_pages=num_pages, device=device,
            dtype=model.dtype, groups=self.groups, kv=self.kv, progress=lambda activity, fraction: progress(
                "loading the draft model", fraction),
            max_tokens=self.max_tokens, max_rows=self.max_rows,
            shared={name: target.weights[name] for name in shared})
        if self.source:
            refuse_changed(self.source, self.settings)  # while they were read
        if model.architecture.joins:
            return DraftHead(transformer, num_pages=num_pages, max_batch=self.max_batch,
                             prefill_chunk=self.prefill_chunk, stop_tokens=stop_tokens)
        return DraftModel(transformer, num_pages=num_pages, max_batch=self.max_batch,
                          prefill_chunk=self.prefill_chunk, vocab_size=target.model.vocab_size,
                          stop_tokens=stop_tokens, called=model.name)


def plan_drafters(target: LoadedModel, settings: Settings, device: Device, prefill_chunk: int,
                  progress: Progress = no_progress, draft_help: DraftHelp | None = None) -> list[DraftPlan]:
    """The plans of what drafts for this model, besides texts. ConfigError if one that `draft_help` needs
    cannot be used."""
    draft_help = draft_help or DraftHelp()
    if target.architecture.of_texts or target.text.embedder or settings.command in ("score", "embed"):
        return []
    backend = choose_backend(device, target.architecture)
    if not (backend.row_invariant or backend.few_rows_invariant):
        if settings.draft_model or settings.drafts == "mtp":
            log.warning("nothing is drafted: %s computes this model, whose rows differ with their number",
                        backend.name)
        return []
    plans = [plan_draft_head(target, settings, device, prefill_chunk)]
    with draft_help.optional("--draft-model"):
        plans.append(plan_draft_model(target, settings, device, prefill_chunk, progress, draft_help))
    return [plan for plan in plans if plan]


def plan_draft_model(target: LoadedModel, settings: Settings, device: Device,
                     prefill_chunk: int, progress: Progress = no_progress,
                     draft_help: DraftHelp | None = None) -> DraftPlan | None:
    """The plan of --draft-model for this model, None if there is none to load; no weight is read. ConfigError
    if it cannot draft for this model."""
    terms = draft_help.terms if draft_help else DraftTerms()
    if settings.drafts not in ("model", "auto"):
        return None
    if settings.draft_model is None:
        if settings.drafts == "model":
            raise ConfigError("--drafts model needs --draft-model MODEL")
        return None
    if settings.pipeline_parallel_size > 1:
        raise ConfigError("--draft-model: a model in stages (--pp) cannot have one; --tp can")
    if terms.failed:
        raise ConfigError(terms.failed)
    path = Path(settings.draft_model)
    if not terms.needed and path.is_absolute() and not path.exists():
        raise ConfigError(f"--draft-model {path}: it is no longer there")
    own = of_draft_model(settings)
    source = resolve_model(own, progress)
    if terms.stamp is not None:
        refuse_other_revision(source, own, terms.stamp)
    model = open_model(source, own, device)
    longest = target.architecture.max_positions
    if model.architecture.max_positions > longest:  # it needs no longer context
        model = open_model(source, replace(own, context_length=longest), device)
    try:
        refuse_to_draft(model, target)
    except ConfigError as error:
        raise ConfigError(f"--draft-model {settings.draft_model}: {error}") from None
    if model.dtype is None and not choose_backend(device, model.architecture).as_stored:
        model = open_model(source, replace(own, dtype=Backend(device.type).dtype), device)
    return planned(model, settings, device, prefill_chunk)._replace(
        settings=own, source=source)


def refuse_other_revision(source: ModelSource, own: Settings, stamp: Stamp):
    """ConfigError unless the files of a draft model are those with which the memory was measured."""
    if not stamp:
        raise ConfigError(f"{source.path} has come since the memory was measured, without it")
    refuse_changed(replace(source, stamp=stamp), own)


def plan_draft_head(target: LoadedModel, settings: Settings, device: Device, prefill_chunk: int
                    ) -> DraftPlan | None:
    """The plan of the draft head in a model's files; None if there is none that can be used here."""
    if settings.drafts not in ("mtp", "auto"):
        return None
    reason = why_no_draft_head(target, settings, device)
    if reason and settings.drafts == "mtp":
        raise ConfigError(f"--drafts mtp needs the draft head of a model: {reason}")
    if reason or target.draft_head is None:
        return None
    shared = shared_names(target.draft_head, settings.tensor_parallel_size > 1)
    return planned(target.draft_head, settings, device, prefill_chunk, shared)


def why_no_draft_head(target: LoadedModel, settings: Settings, device: Device) -> str:
    """Why a model's draft head cannot be used here; "" if it can."""
    if target.draft_head is None:
        return "its files have none that this program knows"
    if settings.pipeline_parallel_size > 1:
        return "a model in stages (--pp) cannot use it"
    return "on a GPU it cannot be used" if device.type != "cpu" else ""


def shared_names(model: LoadedModel, divided: bool) -> tuple[str, ...]:
    """Which weights a draft head shares with its model: none if these are divided among ranks."""
    own = model.architecture
    if divided or not own.joins:
        return ()
    return ("embed",) if own.tied else ("embed", "head")


def planned(model: LoadedModel, settings: Settings, device: Device, prefill_chunk: int,
            shared: Seq[str] = ()) -> DraftPlan:
    """The plan of a model that drafts. The weights named `shared` take no memory."""
    rows = max(settings.max_batch, FREE_ROWS)
    tokens = prefill_chunk + rows
    kernels = load_kernels(device, model.architecture, max_tokens=tokens, max_rows=rows,
                           quantize=settings.quantize, fine=settings.arithmetic == "fine")
    computed = kernels.computed(model.architecture)
    kv = kernels.kv_type("auto", model.dtype)
    groups = group_layers(computed.by_layer, computed.max_positions, apart=False, kv=kv)
    buffers = computed.buffer_sizes(tokens, rows, "float32").values()
    activations = sum(rows * columns * item_bytes(kind) for rows, columns, kind in buffers)
    return DraftPlan(model, kernels, groups, kv, tokens, rows, prefill_chunk, settings.max_batch,
                     weight_bytes(model, settings.quantize, shared) + activations,
                     page_layout(computed, groups, kv).page_bytes, settings)


def refuse_to_draft(model: LoadedModel, target: LoadedModel):
    """ConfigError if a model cannot draft for another."""
    if model.text.embedder or model.architecture.of_texts:
        raise ConfigError("it makes vectors of texts and gives no answers")
    if model.architecture.keeps_states:
        raise ConfigError(f"{model.family} keeps states, which cannot go back to before a wrong draft; a "
                          "model whose layers are all attention can draft, also for one with states")
    difference = first_difference(*(open_for_answers(each.text, each.vocabulary) for each in (target, model)))
    if difference:
        raise ConfigError(f"its tokenizer is another: {difference}")


def first_difference(target: Tokenizer, draft: Tokenizer) -> str:
    """The first token id that two tokenizers read differently, in words; "" if there is none. A few ids at
    the end that only one of them has are padding."""
    names = target.special_names
    own_names = draft.special_names
    size = target.vocab_size
    own_size = draft.vocab_size
    if isinstance(target, PieceTokenizer) and isinstance(draft, PieceTokenizer) and (
            target.table == draft.table and names == own_names):
        return ""  # without reading each: 150,000 take a second
    if abs(size - own_size) > max(size, own_size) // 100:
        return f"it has {own_size:,} tokens, the model {size:,}"
    for token in range(min(size, own_size)):
        theirs = (names.get(token), target.piece(token))
        ours = (own_names.get(token), draft.piece(token))
        if theirs != ours:
            return f"token {token} is {reading(*ours)} to it, and {reading(*theirs)} to the model"
    return ""


def reading(name: str | None, piece: bytes) -> str:
    """What a tokenizer reads a token as: its name if it is special, else its bytes."""
    return shown(name or piece.decode(errors="replace"))
