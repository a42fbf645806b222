"""The parts of a worker's engine: what it has beside its core, made when a flag, the model or a request asks.

A part is a row of `PARTS`: data, and functions that import its modules when they are called. Nothing of it is
imported before. `make_parts` makes those that are wanted, and the engine gets them as `EngineParts`. What
only a request asks for is imported when the first one does, in a thread, while others are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, NamedTuple, TYPE_CHECKING, TypeVar

from chatlm.worker.engine.part import EngineParts, LatePart, MissingPart

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.engine.adapter_slots import AdapterSlots
    from chatlm.worker.engine.calculator import CalculatorTool
    from chatlm.worker.engine.embedding import Pooler
    from chatlm.worker.engine.grammars import Grammars
    from chatlm.worker.engine.lookup import Lookup
    from chatlm.worker.engine.model_drafts import Drafter, ModelDrafts
    from chatlm.worker.engine.sequence import Assignment
    from chatlm.worker.engine.encoded_pictures import Pictures
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ranks.ranks import RankZero
    from chatlm.worker.weights.loaded.model import LoadedModel

T = TypeVar("T")


class Making(NamedTuple):
    """What a part may ask about, and be made of: an engine whose model is in memory."""

    settings: Settings
    model: LoadedModel
    transformer: Transformer
    tokenizer: Tokenizer
    device: Device
    prefill_chunk: int
    ranks: RankZero | None = None
    drafters: Seq[Drafter] = ()
    draft_texts: Seq[str] = ()

    def lasting(self) -> Making:
        """The same for parts that are made later: nothing of it holds tensors of files."""
        model = replace(self.model, tensors={}, adaptable=None, vocabulary=None, draft_head=None, tower=None)
        return self._replace(model=model, drafters=(), draft_texts=())


def never(making: Making) -> bool:
    return False


def of_no_answer(work: Assignment) -> bool:
    return False


@dataclass(frozen=True)
class PartRow(Generic[T]):
    """What the engine can do without. T: the part."""

    name: str                               # a field of EngineParts; another one is among its `others`
    load: Callable[[], Callable[[Making], T]]  # imports its modules; makes it
    wanted: Callable[[Making], bool] = never   # made with the engine, because of a flag or of the model
    asked: Callable[[Assignment], bool] = of_no_answer  # does an answer need it, which does not name it?
    refusal: str = ""  # what such an answer is told where the part is not wanted; "": it is made then


# Drafts

def load_lookup() -> Callable[[Making], Lookup]:
    from chatlm.worker.engine.lookup import TOKEN_BYTES, Lookup

    def make(making: Making) -> Lookup:
        lookup = Lookup(making.settings.draft_memory // TOKEN_BYTES)
        lookup.read(making.draft_texts, making.tokenizer.encode)
        return lookup
    return make


def load_draft_models() -> Callable[[Making], Seq[ModelDrafts]]:
    from chatlm.worker.engine.model_drafts import ModelDrafts
    return lambda making: tuple(map(ModelDrafts, making.drafters))


LOOKUP = PartRow("lookup", load_lookup, lambda making: making.settings.drafts != "none")
DRAFT_MODELS = PartRow("draft_models", load_draft_models, lambda making: bool(making.drafters))


# What requests may ask for

def load_adapters() -> Callable[[Making], AdapterSlots]:
    from chatlm.worker.engine.adapter_slots import AdapterSlots
    return lambda making: AdapterSlots(making.transformer, making.ranks)


def load_pictures() -> Callable[[Making], Pictures]:
    from chatlm.worker.engine.encoded_pictures import Pictures, make_tower
    return lambda making: Pictures(
        make_tower(making.model, making.transformer, making.settings, making.device, making.prefill_chunk),
        making.transformer)


def load_texts() -> Callable[[Making], Pooler]:
    from chatlm.worker.engine.embedding import Pooler
    return lambda making: Pooler(making.transformer, making.model.head, making.model.ranking)


def load_grammars() -> Callable[[Making], Grammars]:
    from chatlm.worker.engine.grammars import Grammars
    return lambda making: Grammars(making.tokenizer)


def load_calculator() -> Callable[[Making], Callable[[Tokenizer], CalculatorTool]]:
    from chatlm.worker.engine.calculator import calculator_of
    return lambda making: calculator_of


def is_text(work: Assignment) -> bool:
    return bool(work.params.pooling)


def has_grammar(work: Assignment) -> bool:
    return bool(work.params.grammar) or any(work.params.call_grammars)


ADAPTERS = PartRow(
    "adapters", load_adapters, lambda making: making.settings.takes_adapters,
    lambda work: bool(work.params.adapter),
    "this worker serves no adapters: start the server with --adapter NAME=FOLDER")
PICTURES = PartRow("pictures", load_pictures, lambda making: making.model.tower is not None,
                   lambda work: bool(work.pictures), "this model cannot see images")
TEXTS = PartRow("texts", load_texts, lambda making: making.model.text.embedder is not None, is_text)
GRAMMARS = PartRow("grammars", load_grammars, asked=has_grammar)
CALCULATOR = PartRow("calculator", load_calculator, lambda making: bool(making.tokenizer.tool_tokens))

PARTS: tuple[PartRow[Any], ...] = (
    LOOKUP, DRAFT_MODELS, ADAPTERS, PICTURES, TEXTS, GRAMMARS, CALCULATOR)
FIELDS = {field.name for field in fields(EngineParts)}
LATE = {TEXTS.name, GRAMMARS.name}  # which may be made only when an answer asks


def make_parts(making: Making, rows: Seq[PartRow[Any]] | None = None) -> EngineParts:
    """The parts that an engine is made with. rows: PARTS, unless others are given."""
    lasting = making.lasting()
    given: dict[str, Any] = {}
    others: list[LatePart[Any]] = []
    refusals: list[MissingPart] = []
    for row in PARTS if rows is None else rows:
        made = row.load()(making) if row.wanted(making) else None
        if row.refusal and made is None:
            refusals.append(MissingPart(row.asked, row.refusal))
        elif row.name in LATE:
            given[row.name] = late_part(row, lasting, made)
        elif row.name not in FIELDS:
            others.append(late_part(row, lasting, made, row.name))
        elif made is not None:
            given[row.name] = made
    return EngineParts(**given, others=others, refusals=refusals)


def late_part(row: PartRow[T], making: Making, made: T | None, name: str = "") -> LatePart[T]:
    """name: under which AnswerParams.parts may ask for it; "": it is asked for otherwise."""
    def asked(work: Assignment) -> bool:
        return name in work.params.parts or row.asked(work)

    return LatePart(row.name, lambda: row.load()(making), asked, made)
