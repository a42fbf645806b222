"""What makes grammars, 1,200 lines: imported for the first body that constrains an answer or offers tools."""

from __future__ import annotations

from collections.abc import Mapping

from chatlm.front.api.tables import CONSTRAINING
from chatlm.front.late import Late


def load_grammars() -> bool:
    """Import it. Readers then find it imported."""
    from chatlm.front.api import call_grammars
    return bool(call_grammars.call_grammar)


GRAMMARS = Late(load_grammars)


def may_need_grammars(body: Mapping) -> bool:
    """Has a body fields for which grammars are made? Readers import what makes them themselves, but in the
    event loop it would hold up others."""
    return not CONSTRAINING.isdisjoint(body)
