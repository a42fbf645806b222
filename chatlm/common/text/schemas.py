"""What JSON schemas say: their keywords, checked, and their forms without $ref, allOf, anyOf and oneOf."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping

from chatlm.common.errors import shown
from chatlm.common.jsontext import JSON_TYPES, is_text
from chatlm.common.text.patterns import is_found


def is_count(value) -> bool:
    return JSON_TYPES["integer"](value) and value >= 0


KEYWORDS = {  # of JSON Schema, those that are read here: what each must be, and the check of that
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), ("a list of schemas", JSON_TYPES["array"])),
    "enum": ("a list", JSON_TYPES["array"]),
    "type": (f"one of {', '.join(JSON_TYPES)}, or a list of these", lambda value: (
        is_text(value) and value in JSON_TYPES
        or isinstance(value, list) and len(value) <= 9
        and all(is_text(name) and name in JSON_TYPES for name in value))),
    **dict.fromkeys(("properties", "patternProperties"), ("an object of schemas", JSON_TYPES["object"])),
    "required": ("a list of strings", lambda value: isinstance(value, list) and all(map(is_text, value))),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), (
        "an integer of at least 0", is_count)),
    **dict.fromkeys(("$ref", "pattern", "format"), ("a string", is_text)),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), (
        "an object", JSON_TYPES["object"]))}


def keyword(schema: Mapping, name: str):
    """A schema's member; None if it is absent or null. ValueError if it is not what it must be."""
    allowed, is_right = KEYWORDS[name]
    if (value := schema.get(name)) is not None and not is_right(value):
        raise ValueError(f"{name} must be {allowed}, not {shown(value)}")
    return value


def named_types(schema: Mapping) -> Iterable[str]:
    """The JSON types that the schema itself names: all where it names none."""
    types = keyword(schema, "type")
    return JSON_TYPES if types is None else [types] if is_text(types) else types


def schema_object(schema) -> Mapping:
    """A schema that may be true (anything fits) or false as the object that says the same."""
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"a schema must be an object, true or false, not {shown(schema)}")
    return schema if isinstance(schema, dict) else {} if schema else {"type": []}


def parts_of(schema) -> Iterator[Mapping]:
    """The objects inside a schema, and itself."""
    if isinstance(schema, dict):
        yield schema
        schema = list(schema.values())
    for member in schema if isinstance(schema, list) else ():
        yield from parts_of(member)


def referred(reference: str, root: Mapping):
    """The schema that a $ref with a path in `root` leads to."""
    base, _, path = reference.partition("#")
    steps = (step.replace("~1", "/").replace("~0", "~") for step in urllib.parse.unquote(path).split("/", 64))
    try:
        if base not in ("", root.get("$id")) or next(steps):
            raise LookupError
        return functools.reduce(lambda place, step: operator.getitem(
            place, int(step) if isinstance(place, list) else step), steps, root)
    except (LookupError, TypeError, ValueError):
        raise LookupError(f"$ref {shown(reference)} leads nowhere") from None


STEPS = 8192         # of about 11 us: a small schema can say much
TEXT_KEYWORDS = ("minLength", "maxLength", "pattern", "format")
NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
PART_KEYWORDS = (    # of arrays and objects
    "items", "prefixItems", "additionalItems", "minItems", "maxItems", "properties", "patternProperties",
    "additionalProperties", "required", "minProperties", "maxProperties", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties")
CHOICES = ("allOf", "anyOf", "oneOf")
OTHER_KEYWORDS = (   # those that no grammar here can enforce, unless they say nothing
    "not", "if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas", "contains",
    "minContains", "maxContains", "uniqueItems", "$dynamicRef", "$recursiveRef")
ALL_KEYWORDS = {"type", "enum", "const", "$ref", *CHOICES, *TEXT_KEYWORDS, *NUMBER_KEYWORDS, *PART_KEYWORDS,
                *OTHER_KEYWORDS}
KEYWORD_TYPES = {  # the JSON types of which these say anything
    **dict.fromkeys(("contains", "minContains", "maxContains", "uniqueItems"), "array"),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), "object")}

def fits_anything(schema) -> bool:
    """Is it certain that every value fits? Schemas may be true, or have no keyword that says anything."""
    return schema is True or isinstance(schema, dict) and not ALL_KEYWORDS & schema.keys()


def fits_nothing(schema) -> bool:
    """Is it certain that no value fits?"""
    return schema is False or isinstance(schema, dict) and fits_anything(schema.get("not"))


def says_nothing(name: str, schema: Mapping) -> bool:
    """Does this one of OTHER_KEYWORDS leave the values as they are that fit the rest of the schema?"""
    value = schema[name]
    if value is None or name in KEYWORD_TYPES and KEYWORD_TYPES[name] not in named_types(schema):
        return True
    if name == "not":
        return fits_nothing(value)
    if name == "if":
        return all(fits_anything(schema.get(branch, True)) for branch in ("then", "else"))
    if name in ("then", "else"):
        return schema.get("if") is None or fits_anything(value)
    if name in ("dependencies", "dependentRequired", "dependentSchemas"):
        required = {*(keyword(schema, "required") or ())}
        return all(required.issuperset(needed) if isinstance(needed, list) and all(map(is_text, needed))
                   else fits_anything(needed) for needed in (keyword(schema, name) or {}).values())
    if name == "contains":
        return schema.get("minContains") == 0 and schema.get("maxContains") is None
    if name in ("minContains", "maxContains"):
        return schema.get("contains") is None or says_nothing("contains", schema)
    if name == "uniqueItems":
        return value is False or has_one_item_at_most(schema)
    return False


def has_one_item_at_most(schema: Mapping) -> bool:
    most = keyword(schema, "maxItems")
    first = schema.get("prefixItems")
    items = schema.get("items")
    if isinstance(items, list):
        first = items
        items = schema.get("additionalItems")
    return most is not None and most <= 1 or fits_nothing(items) and len(first or ()) <= 1


Form = tuple[Mapping, ...]  # schemas that a value must fit all, but for their $ref, allOf, anyOf and oneOf


def finite_json(value) -> str:
    """A value as JSON in which lone surrogates stay, for lark_grammar to see. ValueError for numbers that
    JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ValueError("it has a number that is not finite, such as NaN or 1e999") from None


def members_of(form: Form, names: Iterable[str]) -> list[dict]:
    """What the schemas say with these keywords."""
    said = ({name: schema[name] for name in names if schema.get(name) is not None} for schema in form)
    return [members for members in said if members]


def keys_among(form: Form) -> dict[str, bool]:
    """The keys of an object that the schemas declare, and whether they are required."""
    required = {name: True for schema in form for name in keyword(schema, "required") or ()}
    return {name: False for schema in form for name in keyword(schema, "properties") or {}} | required


def has_other_keys(form: Form) -> bool:
    """May an object have keys that no schema declares? Where none declares any, it may."""
    others = [schema.get("additionalProperties") for schema in form]
    if all(other is None for other in others) and any(
            fits_nothing(schema.get("unevaluatedProperties")) for schema in form):
        return False
    return False not in others and (any(other is not None for other in others) or not members_of(
        form, ("properties", "patternProperties", "required")))


def schemas_of_key(form: Form, name: str | None, patterns: Collection[str] = ()) -> list:
    """The schemas of the value of a declared key, or with None of another one, of which these patterns of
    keys are true."""
    schemas = []
    for schema in form:
        declared = keyword(schema, "properties") or {}
        by_pattern = keyword(schema, "patternProperties") or {}
        said = [declared[name]] if name in declared else []
        said += [by_pattern[pattern] for pattern in patterns if pattern in by_pattern]
        other = schema.get("additionalProperties")
        schemas += said or ([] if other is None else [other])
    return schemas


def schemas_of_declared(form: Form, name: str) -> list:
    """The schemas of the value of a declared key, also of the patterns of keys that are found in it."""
    return schemas_of_key(form, name, {pattern for pattern in key_patterns(form) if is_found(pattern, name)})


def key_patterns(form: Form) -> list[str]:
    return [pattern for schema in form for pattern in keyword(schema, "patternProperties") or {}]


def name_schemas(form: Form) -> list:
    """The schemas of the keys themselves."""
    return [schema["propertyNames"] for schema in form if schema.get("propertyNames") is not None]


def types_among(form: Form) -> set[str]:
    """The JSON types of values that fit; integers are numbers too."""
    types = set(JSON_TYPES)
    for schema in form:
        own_types = set(named_types(schema))
        types &= own_types | ({"integer"} if "number" in own_types else set())
    return types


def values_among(form: Form) -> list | None:
    """The values that may fit, where an enum or const lists them."""
    lists = [values for schema in form for values in (
        keyword(schema, "enum"), [schema["const"]] if "const" in schema else None) if values is not None]
    if not lists:
        return None
    others = [{finite_json(value) for value in values} for values in lists[1:]]
    types = types_among(form)
    return [value for value in lists[0] if all(finite_json(value) in other for other in others)
            and any(JSON_TYPES[name](value) for name in types)]


def types_of(forms: Iterable[Form]) -> set[str]:
    """The JSON types of values that fit one of these forms: all where they do not say."""
    types = set()
    for form in forms:
        values = values_among(form)
        types |= {name for name in types_among(form) if values is None or any(map(JSON_TYPES[name], values))}
    return types


def between(form: Form, low: str, high: str) -> tuple[int, int | None]:
    """The bounds that the schemas set with two of their keywords."""
    lows, highs = ([int(value) for schema in form if (value := keyword(schema, name)) is not None]
                   for name in (low, high))
    return max(lows, default=0), min(highs, default=None)


class SchemaForms:
    """What a value must be that fits a schema, without $ref, allOf, anyOf and oneOf."""

    def __init__(self, root: Mapping, steps: Iterator | None = None):
        self.root = root  # in which $refs lead to other schemas
        self.steps = steps or iter(range(STEPS))

    def spend(self, count: int = 1):
        """Use up steps: a large member of a schema costs as much as several schemas."""
        if next(itertools.islice(self.steps, count - 1, count), None) is None:
            raise ValueError("its parts refer to too many schemas")

    @functools.cached_property
    def named(self) -> dict[str, Mapping]:
        """The schemas in the root by their $id, and by their $anchor after a #."""
        parts = [*parts_of(self.root)]
        return {part["$id"]: part for part in parts if is_text(part.get("$id"))} | {
            f"#{part['$anchor']}": part for part in parts if is_text(part.get("$anchor"))}

    def referred(self, reference: str):
        """The schema that a $ref leads to."""
        self.spend()
        base, _, path = reference.partition("#")
        if path and not path.startswith("/"):
            base = f"#{path}"
            path = ""
        if base in ("", self.root.get("$id")) or base not in self.named:
            return referred(reference, self.root)
        return referred(f"#{path}", self.named[base])

    def target(self, schema):
        """The schema itself, or the one that it does nothing but refer to."""
        while (isinstance(schema, dict) and ALL_KEYWORDS & schema.keys() == {"$ref"}
               and (reference := keyword(schema, "$ref")) is not None):
            schema = self.referred(reference)
        return schema

    def forms(self, schemas: Iterable) -> list[Form]:
        """A value that fits all of these schemas fits one of these forms."""
        forms: list[Form] = [()]
        for schema in schemas:
            forms = self.both(forms, self.forms_of(schema))
        return forms

    def both(self, first: list[Form], second: list[Form]) -> list[Form]:
        self.spend(1 + len(first) * len(second) // 8)
        return [tuple({id(schema): schema for schema in one + other}.values())
                for one, other in itertools.product(first, second)]

    def forms_of(self, schema) -> list[Form]:
        """The forms of one schema, in which its keys have the order in which it speaks of them."""
        schema = schema_object(self.target(schema))
        self.spend(1 + len(schema) // 8)
        if "not" in schema and fits_nothing(schema):
            return []
        for name in OTHER_KEYWORDS:
            if name in schema and not says_nothing(name, schema):
                raise ValueError(f"{name} is not supported")
        forms: list[Form] = [()]
        own = bool(ALL_KEYWORDS.difference(CHOICES, ["$ref"]) & schema.keys())
        for name in (*schema, None):
            if own and name == ("properties" if "properties" in schema else None):
                forms = self.both(forms, [(schema,)])
            elif name == "$ref" and keyword(schema, name) is not None:
                forms = self.both(forms, self.forms_of(self.referred(schema[name])))
            elif name == "allOf":
                forms = self.both(forms, self.forms(keyword(schema, name) or ()))
            elif name in CHOICES and keyword(schema, name):
                choices = [self.forms_of(choice) for choice in schema[name]]
                if name == "oneOf" and not all(
                        self.apart(one, other) for pair in itertools.combinations(choices, 2)
                        for one, other in itertools.product(*pair)):
                    raise ValueError("the choices of oneOf must exclude each other by their types, or by a "
                                     "required property with other values in each; anyOf needs no such thing")
                forms = self.both(forms, [*itertools.chain(*choices)])
        return forms

    def apart(self, first: Form, second: Form) -> bool:
        """Is it certain that no value fits both?"""
        self.spend()
        values = values_among(first + second)
        if values is not None or not (types := types_among(first + second)):
            return not values
        return types == {"object"} and any(
            all(self.apart(one, other) for one, other in itertools.product(
                self.forms(schemas_of_key(first, name)), self.forms(schemas_of_key(second, name))))
            for name, required in keys_among(first + second).items() if required)


TYPE_KEYWORDS = {  # what a schema without types most likely means
    "object": ("properties", "required", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"), "string": TEXT_KEYWORDS,
    "number": NUMBER_KEYWORDS}


def plain_schema(schema, schemas: SchemaForms, above: frozenset[int] = frozenset()) -> dict:
    """A schema for templates that look at `type` alone: with the type, or the types, that it says in other
    words, and what a $ref leads to. Of choices it has the first besides null, which is `nullable`; what
    cannot be read stays as it is. `above` has the ids of the schemas around it, which it does not repeat."""
    outside = schema if isinstance(schema, dict) else {}
    try:
        forms = schemas.forms_of(schema)
        form = next((form for form in forms if types_of([form]) - {"null"}), ())
        types = types_of(forms)
        values = values_among(form)
    except (ValueError, LookupError, RecursionError):
        return outside
    said = {name: value for part in (*reversed(form), outside) for name, value in part.items()
            if name not in ("$ref", "const", *CHOICES)}
    if types == JSON_TYPES.keys():
        types = {name for name, words in TYPE_KEYWORDS.items() if not said.keys().isdisjoint(words)}
    elif "null" in types and len(types) > 1:
        types = types - {"null"}
        said["nullable"] = True
    if values is not None:
        said["enum"] = [value for value in values if value is not None]
    wider = {"integer"} if "number" in types else set()
    if names := [name for name in JSON_TYPES if name in types - wider]:
        said["type"] = names[0] if len(names) == 1 else names
    members = said.pop("properties", None)
    items = said.pop("items", None)
    ids = frozenset(map(id, form))
    if isinstance(members, dict) and not ids & above:
        said["properties"] = {name: plain_schema(part, schemas, above | ids)
                              for name, part in members.items()}
    if isinstance(items, dict) and not ids & above:
        said["items"] = plain_schema(items, schemas, above | ids)
    return said
