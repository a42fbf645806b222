"""The parts of a worker's engine: what it has beside its core, for a flag, for the model or for requests.

A part is a row of `PARTS`. `make_parts` makes those that are wanted, and the engine gets them as
`EngineParts`. What takes long or much memory, a part makes for the first answer that needs it, in a thread of
its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, fields
from typing import Any, Generic, NamedTuple, TYPE_CHECKING, TypeVar

from chatlm.worker.engine.adapter_slots import AdapterSlots
from chatlm.worker.engine.calculator import calculator_of
from chatlm.worker.engine.embedding import Pooler
from chatlm.worker.engine.encoded_pictures import Pictures, make_tower
from chatlm.worker.engine.grammars import Grammars
from chatlm.worker.engine.lookup import TOKEN_BYTES, Lookup
from chatlm.worker.engine.model_drafts import ModelDrafts
from chatlm.worker.engine.part import EngineParts, MissingPart

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.engine.model_drafts import Drafter
    from chatlm.worker.engine.sequence import Assignment
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ranks.ranks import RankZero
    from chatlm.worker.weights.loaded.model import LoadedModel

T = TypeVar("T")


class Making(NamedTuple):
    """What a part may ask about, and be made of: an engine whose model is in memory. A part keeps nothing
    that holds tensors of files."""

    settings: Settings
    model: LoadedModel
    transformer: Transformer
    tokenizer: Tokenizer
    device: Device
    prefill_chunk: int
    ranks: RankZero | None = None
    drafters: Seq[Drafter] = ()
    draft_texts: Seq[str] = ()


def always(making: Making) -> bool:
    return True


def of_no_answer(work: Assignment) -> bool:
    return False


@dataclass(frozen=True)
class PartRow(Generic[T]):
    """What the engine can do without. T: the part."""

    name: str                               # a field of EngineParts; another one is among its `others`
    make: Callable[[Making], T]
    wanted: Callable[[Making], bool] = always
    # What an answer that asks for the part is told where it is not wanted; "": there is none
    refusal: str = ""
    asked: Callable[[Assignment], bool] = of_no_answer


def make_lookup(making: Making) -> Lookup:
    lookup = Lookup(making.settings.draft_memory // TOKEN_BYTES)
    lookup.read(making.draft_texts, making.tokenizer.encode)
    return lookup


def make_pictures(making: Making) -> Pictures:
    tower = make_tower(making.model, making.transformer, making.settings, making.device,
                       making.prefill_chunk)
    return Pictures(tower, making.transformer)


PARTS: tuple[PartRow[Any], ...] = (
    # drafts
    PartRow("lookup", make_lookup, lambda making: making.settings.drafts != "none"),
    PartRow("draft_models", lambda making: tuple(map(ModelDrafts, making.drafters))),
    # what requests may ask for
    PartRow("adapters", lambda making: AdapterSlots(making.transformer, making.ranks),
            lambda making: making.settings.takes_adapters,
            "this worker serves no adapters: start the server with --adapter NAME=FOLDER",
            lambda work: bool(work.params.adapter)),
    PartRow("pictures", make_pictures, lambda making: making.model.tower is not None,
            "this model cannot see images", lambda work: bool(work.pictures)),
    PartRow("texts", lambda making: Pooler(making.transformer, making.model.head, making.model.ranking)),
    PartRow("grammars", lambda making: Grammars(making.tokenizer)),
    PartRow("calculator", lambda making: calculator_of, lambda making: bool(making.tokenizer.tool_tokens)))
FIELDS = {field.name for field in fields(EngineParts)}


def make_parts(making: Making, rows: Seq[PartRow[Any]] | None = None) -> EngineParts:
    """The parts that an engine is made with. rows: PARTS, unless others are given."""
    rows = PARTS if rows is None else rows
    made = {row.name: row.make(making) for row in rows if row.wanted(making)}
    others = {name: part for name, part in made.items() if name not in FIELDS}
    refusals = [MissingPart(row.asked, row.refusal) for row in rows if row.refusal and row.name not in made]
    return EngineParts(**{name: part for name, part in made.items() if name in FIELDS},
                       others=others, refusals=refusals)
