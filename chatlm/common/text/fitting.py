"""Whether a JSON value fits a schema, as far as it can be told without running the schema's patterns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from chatlm.common.jsontext import JSON_TYPES
from chatlm.common.text.schemas import (
    Form, SchemaForms, between, fits_nothing, keys_among, schemas_of_declared, types_among, values_among)


class Fitting:
    """Compares values with one schema: types, enums, bounds, required and unknown keys, items.

    Patterns and formats of texts are not compared, since a pattern of a stranger may take for ever. Raises
    ValueError, LookupError or RecursionError for a schema that cannot be read."""

    def __init__(self, root: Mapping):
        self.root = root
        self.schemas = SchemaForms(root)

    def fits(self, value) -> bool:
        return self._fits(value, [self.root])

    def _fits(self, value, schemas: Iterable) -> bool:
        return any(self._fits_form(value, form) for form in self.schemas.forms(schemas))

    def _fits_form(self, value, form: Form) -> bool:
        if not any(JSON_TYPES[name](value) for name in types_among(form)):
            return False
        values = values_among(form)
        if values is not None and value not in values:
            return False
        if isinstance(value, dict):
            return self._object_fits(value, form)
        if isinstance(value, list):
            return self._array_fits(value, form)
        if isinstance(value, str):
            return is_between(len(value), form, "minLength", "maxLength")
        return isinstance(value, bool) or value is None or all(number_fits(value, schema) for schema in form)

    def _object_fits(self, value: dict, form: Form) -> bool:
        keys = keys_among(form)
        if not all(name in value for name, is_required in keys.items() if is_required):
            return False
        closed = any(fits_nothing(schema.get(word)) for schema in form
                     for word in ("additionalProperties", "unevaluatedProperties"))
        for name, member in value.items():
            schemas = schemas_of_declared(form, name)
            if not schemas and name not in keys and closed:
                return False
            if not self._fits(member, schemas):
                return False
        return is_between(len(value), form, "minProperties", "maxProperties")

    def _array_fits(self, value: list, form: Form) -> bool:
        if not is_between(len(value), form, "minItems", "maxItems"):
            return False
        for place, item in enumerate(value):
            schemas = []
            for schema in form:
                first = schema.get("prefixItems") or []
                own = first[place] if place < len(first) else schema.get("items")
                if own is not None:
                    schemas.append(own)
            if not self._fits(item, schemas):
                return False
        return True


def is_between(count: int, form: Form, low: str, high: str) -> bool:
    least, most = between(form, low, high)
    return count >= least and (most is None or count <= most)


def number_fits(value: float, schema: Mapping) -> bool:
    """Whether a number is within the bounds of a schema."""
    bounds = {name: schema[name] for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
              if JSON_TYPES["number"](schema.get(name))}
    return (value >= bounds.get("minimum", value) and value <= bounds.get("maximum", value)
            and not ("exclusiveMinimum" in bounds and value <= bounds["exclusiveMinimum"])
            and not ("exclusiveMaximum" in bounds and value >= bounds["exclusiveMaximum"]))


def arguments_fit(arguments, schema: str) -> bool:
    """Whether a call's arguments are an object that fits the function's parameters. schema: their JSON schema
    as text, "" if all objects fit. So they do if the schema cannot be read."""
    if not isinstance(arguments, dict):
        return False
    try:
        return not schema or Fitting(json.loads(schema)).fits(arguments)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return True
