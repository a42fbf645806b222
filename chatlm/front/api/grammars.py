"""What makes grammars, 1,200 lines: imported for the first body that constrains an answer or offers tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.api.field_types import (
    nested_grammar, ollama_grammar, other_grammar, response_grammar, structured_outputs)
from chatlm.front.late import Late

if TYPE_CHECKING:
    from chatlm.front.api.fields import Field

MAKE_GRAMMARS = response_grammar, nested_grammar, other_grammar, structured_outputs, ollama_grammar


GRAMMARS = Late(importer("chatlm.front.api.call_grammars:call_grammar"))  # readers then find it imported


def makes_grammar(field: Field) -> bool:
    convert = field.type.convert
    return getattr(convert, "func", convert) in MAKE_GRAMMARS


def may_need_grammars(body: Mapping, fields: Iterable[Field]) -> bool:
    """Has a body fields for which grammars are made? Readers import what makes them themselves, but in the
    event loop it would hold up others."""
    return any(field.name in body and ("tools" in (field.name, field.means) or makes_grammar(field))
               for field in fields)
