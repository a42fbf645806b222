"""The filters of a search: which attributes a file must have."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from chatlm.common.errors import bad_value, invalid

Attributes = Mapping[str, str | float | bool]
Filter = Callable[[Attributes], bool]
MOST_COMPARISONS = 256  # comparisons of a filter
DEEPEST_FILTER = 16
ORDERS = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
KINDS = "eq, ne, gt, gte, lt, lte, in, nin, and, or"


def read_filter(value: Any, name: str = "filters") -> Filter:
    """What a filter says of a file's attributes. A file without the attribute fits `ne` and `nin` alone.
    Raises RequestError for what is no filter.

    name: of the field, for errors."""
    return Reading().filter_of(value, name, 1)


class Reading:
    """Reads one filter, which is not larger than MOST_COMPARISONS and DEEPEST_FILTER allow."""

    def __init__(self):
        self.comparisons = 0

    def filter_of(self, value: Any, name: str, depth: int) -> Filter:
        if not isinstance(value, dict):
            raise bad_value(name, value, "an object with a type: " + KINDS)
        kind = value.get("type")
        if kind in ("and", "or"):
            return self.compound(value, name, depth)
        if kind not in KINDS.split(", "):
            raise bad_value(f"{name}.type", kind, "one of " + KINDS)
        refuse_others(value, ("type", "key", "value"), name)
        self.comparisons += 1
        if self.comparisons > MOST_COMPARISONS:
            raise invalid(name, f"a filter may have at most {MOST_COMPARISONS} comparisons")
        key = value.get("key")
        if not isinstance(key, str) or not key:
            raise bad_value(f"{name}.key", key, "the name of an attribute")
        return comparison(kind, key, value.get("value"), f"{name}.value")

    def compound(self, value: dict, name: str, depth: int) -> Filter:
        refuse_others(value, ("type", "filters"), name)
        if depth == DEEPEST_FILTER:
            raise invalid(name, f"filters may be at most {DEEPEST_FILTER} deep")
        parts = value.get("filters")
        if not isinstance(parts, list) or not parts:
            raise bad_value(f"{name}.filters", parts, "a list of filters, at least one")
        filters = [self.filter_of(part, f"{name}.filters[{index}]", depth + 1)
                   for index, part in enumerate(parts)]
        meet = all if value["type"] == "and" else any
        return lambda attributes: meet(fits(attributes) for fits in filters)


def refuse_others(value: dict, known: tuple[str, ...], name: str):
    for key in value:
        if key not in known:
            raise invalid(f"{name}.{key}", f"{name} has a field that is not known there; allowed are "
                                           + ", ".join(known))


def comparison(kind: str, key: str, value: Any, name: str) -> Filter:
    if kind in ("in", "nin"):
        if not isinstance(value, list) or not value or not all(map(is_plain, value)):
            raise bad_value(name, value, "a list of texts, numbers or booleans, at least one")
        wanted = {typed(each) for each in value}
        is_in = kind == "in"
        return lambda attributes: (key in attributes and typed(attributes[key]) in wanted) == is_in
    if not is_plain(value):
        raise bad_value(name, value, "a text, a number or a boolean")
    own = typed(value)
    if kind in ("eq", "ne"):
        is_eq = kind == "eq"
        return lambda attributes: (key in attributes and typed(attributes[key]) == own) == is_eq
    if own[0] is bool:
        raise bad_value(name, value, f"a text or a number: {kind} has no order of booleans")
    order = ORDERS[kind]

    def is_beyond(attributes: Attributes) -> bool:
        if key not in attributes:
            return False
        found, other = typed(attributes[key])
        return found is own[0] and bool(order(other, own[1]))

    return is_beyond


def is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def typed(value: Any) -> tuple[type, Any]:
    """A value with its kind: for Python, True is 1."""
    if isinstance(value, bool):
        return bool, value
    return (str if isinstance(value, str) else float), value
