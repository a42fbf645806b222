"""Reads JSON schemas: checks their keywords, and resolves $ref, allOf, anyOf and oneOf into forms.

A form is a set of plain schemas that a value must fit at the same time. A value fits a schema if it fits one
of the schema's forms."""

from __future__ import annotations

import functools
import itertools
import json
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping

from chatlm.common.errors import shown
from chatlm.common.jsontext import JSON_TYPES, is_text
from chatlm.common.text.patterns import is_found


def is_count(value) -> bool:
    return JSON_TYPES["integer"](value) and value >= 0


def is_type_name(value) -> bool:
    return is_text(value) and value in JSON_TYPES


def are_types(value) -> bool:
    """Whether it is what the keyword `type` may be."""
    if isinstance(value, list):
        return len(value) <= 9 and all(map(is_type_name, value))
    return is_type_name(value)


def are_texts(value) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


A_LIST = JSON_TYPES["array"]
AN_OBJECT = JSON_TYPES["object"]
KEYWORDS = {  # the keywords of JSON Schema that are read here: what each must be, and the check of that
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), ("a list of schemas", A_LIST)),
    "enum": ("a list", A_LIST),
    "type": (f"one of {', '.join(JSON_TYPES)}, or a list of these", are_types),
    **dict.fromkeys(("properties", "patternProperties"), ("an object of schemas", AN_OBJECT)),
    "required": ("a list of strings", are_texts),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
                    ("an integer of at least 0", is_count)),
    **dict.fromkeys(("$ref", "pattern", "format"), ("a string", is_text)),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), ("an object", AN_OBJECT))}


def keyword(schema: Mapping, name: str):
    """The value of a schema's keyword; None if it is absent or null. Raises ValueError if it is not what the
    keyword allows."""
    allowed, is_right = KEYWORDS[name]
    value = schema.get(name)
    if value is not None and not is_right(value):
        raise ValueError(f"{name} must be {allowed}, not {shown(value)}")
    return value


def named_types(schema: Mapping) -> Iterable[str]:
    """The JSON types that the schema itself names; all types if it names none."""
    types = keyword(schema, "type")
    if types is None:
        return JSON_TYPES
    return [types] if is_text(types) else types


def schema_object(schema) -> Mapping:
    """A schema as an object. For true (anything fits) and false (nothing fits) an object that says the
    same."""
    if isinstance(schema, dict):
        return schema
    if not isinstance(schema, bool):
        raise ValueError(f"a schema must be an object, true or false, not {shown(schema)}")
    return {} if schema else {"type": []}


def parts_of(schema) -> Iterator[Mapping]:
    """The schema and all objects inside it."""
    if isinstance(schema, dict):
        yield schema
        schema = list(schema.values())
    for member in schema if isinstance(schema, list) else ():
        yield from parts_of(member)


def follow_path(reference: str, root: Mapping):
    """The schema that a $ref with a path in `root` leads to."""
    base, _, path = reference.partition("#")
    first, *steps = urllib.parse.unquote(path).split("/", 64)
    try:
        if base not in ("", root.get("$id")) or first:
            raise LookupError
        place = root
        for step in steps:
            name = step.replace("~1", "/").replace("~0", "~")
            place = place[int(name)] if isinstance(place, list) else place[name]
        return place
    except (LookupError, TypeError, ValueError):
        raise LookupError(f"$ref {shown(reference)} leads nowhere") from None


STEPS = 8192  # of about 11 us each; bounds the time of small schemas that refer to many others
TEXT_KEYWORDS = ("minLength", "maxLength", "pattern", "format")
NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
PART_KEYWORDS = (  # about the parts of arrays and objects
    "items", "prefixItems", "additionalItems", "minItems", "maxItems", "properties", "patternProperties",
    "additionalProperties", "required", "minProperties", "maxProperties", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties")
CHOICES = ("allOf", "anyOf", "oneOf")
OTHER_KEYWORDS = (  # no grammar here can enforce them; they are accepted where they say nothing
    "not", "if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas", "contains",
    "minContains", "maxContains", "uniqueItems", "$dynamicRef", "$recursiveRef")
ALL_KEYWORDS = {"type", "enum", "const", "$ref", *CHOICES, *TEXT_KEYWORDS, *NUMBER_KEYWORDS, *PART_KEYWORDS,
                *OTHER_KEYWORDS}
KEYWORD_TYPES = {  # the type that a keyword is about; it says nothing about values of others
    **dict.fromkeys(("contains", "minContains", "maxContains", "uniqueItems"), "array"),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), "object")}


def fits_anything(schema) -> bool:
    """Whether every value surely fits: the schema is true, or has no keyword that says anything."""
    return schema is True or isinstance(schema, dict) and not ALL_KEYWORDS & schema.keys()


def fits_nothing(schema) -> bool:
    """Whether surely no value fits."""
    return schema is False or isinstance(schema, dict) and fits_anything(schema.get("not"))


def says_nothing(name: str, schema: Mapping) -> bool:
    """Whether this one of OTHER_KEYWORDS excludes no value that fits the rest of the schema."""
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
        for needed in (keyword(schema, name) or {}).values():
            if not (required.issuperset(needed) if are_texts(needed) else fits_anything(needed)):
                return False
        return True
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


Form = tuple[Mapping, ...]  # a value must fit all of these; their $ref, allOf, anyOf and oneOf do not count


def finite_json(value) -> str:
    """A value as JSON. Raises ValueError for numbers that JSON does not have. Keeps lone surrogates, which
    lark_grammar refuses."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ValueError("it has a number that is not finite, such as NaN or 1e999") from None


def members_of(form: Form, names: Iterable[str]) -> list[dict]:
    """The members of each schema that have these names, for the schemas that have any."""
    found = []
    for schema in form:
        members = {name: schema[name] for name in names if schema.get(name) is not None}
        if members:
            found.append(members)
    return found


def keys_among(form: Form) -> dict[str, bool]:
    """The keys that the schemas declare, and whether they are required."""
    keys = {}
    for schema in form:
        for name in keyword(schema, "properties") or {}:
            keys[name] = False
    for schema in form:
        for name in keyword(schema, "required") or ():
            keys[name] = True
    return keys


def has_other_keys(form: Form) -> bool:
    """Whether an object may have keys that no schema declares. If no schema declares any key, it may."""
    others = [schema.get("additionalProperties") for schema in form]
    if False in others:
        return False
    if any(other is not None for other in others):
        return True
    if any(fits_nothing(schema.get("unevaluatedProperties")) for schema in form):
        return False
    return not members_of(form, ("properties", "patternProperties", "required"))


def schemas_of_key(form: Form, name: str | None, patterns: Collection[str] = ()) -> list:
    """The schemas that the value of a key must fit. name: a declared key, or None for another one. patterns:
    the patterns of keys that the key matches."""
    schemas = []
    for schema in form:
        declared = keyword(schema, "properties") or {}
        by_pattern = keyword(schema, "patternProperties") or {}
        own = [declared[name]] if name in declared else []
        own += [by_pattern[pattern] for pattern in patterns if pattern in by_pattern]
        other = schema.get("additionalProperties")
        if not own and other is not None:
            own = [other]
        schemas += own
    return schemas


def schemas_of_declared(form: Form, name: str) -> list:
    """The schemas that the value of a declared key must fit, those of matching patterns included."""
    return schemas_of_key(form, name, {pattern for pattern in key_patterns(form) if is_found(pattern, name)})


def key_patterns(form: Form) -> list[str]:
    patterns = []
    for schema in form:
        patterns += keyword(schema, "patternProperties") or {}
    return patterns


def name_schemas(form: Form) -> list:
    """The schemas that the keys themselves must fit."""
    return [schema["propertyNames"] for schema in form if schema.get("propertyNames") is not None]


def types_among(form: Form) -> set[str]:
    """The JSON types of values that fit. Where number fits, integer does too."""
    types = set(JSON_TYPES)
    for schema in form:
        own_types = set(named_types(schema))
        if "number" in own_types:
            own_types.add("integer")
        types &= own_types
    return types


def values_among(form: Form) -> list | None:
    """The values that may fit, if an enum or const lists them; else None."""
    lists = []
    for schema in form:
        values = keyword(schema, "enum")
        if values is not None:
            lists.append(values)
        if "const" in schema:
            lists.append([schema["const"]])
    if not lists:
        return None
    others = [{finite_json(value) for value in values} for values in lists[1:]]
    types = types_among(form)
    allowed = []
    for value in lists[0]:
        in_all = all(finite_json(value) in other for other in others)
        if in_all and any(JSON_TYPES[name](value) for name in types):
            allowed.append(value)
    return allowed


def types_of(forms: Iterable[Form]) -> set[str]:
    """The JSON types of values that fit one of these forms."""
    types = set()
    for form in forms:
        values = values_among(form)
        for name in types_among(form):
            if values is None or any(map(JSON_TYPES[name], values)):
                types.add(name)
    return types


def between(form: Form, low: str, high: str) -> tuple[int, int | None]:
    """The bounds that the schemas set together with a keyword for the least count and one for the most."""
    lows = [keyword(schema, low) for schema in form]
    highs = [keyword(schema, high) for schema in form]
    return (max((int(value) for value in lows if value is not None), default=0),
            min((int(value) for value in highs if value is not None), default=None))


class SchemaForms:
    """Resolves the $ref, allOf, anyOf and oneOf of schemas into forms."""

    def __init__(self, root: Mapping, steps: Iterator | None = None):
        self.root = root  # the schema in which $refs lead to others
        self.steps = steps or iter(range(STEPS))

    def spend(self, count: int = 1):
        """Use up steps. Raises ValueError when none are left."""
        if next(itertools.islice(self.steps, count - 1, count), None) is None:
            raise ValueError("its parts refer to too many schemas")

    @functools.cached_property
    def named(self) -> dict[str, Mapping]:
        """The schemas inside the root by their names: an $id, or # and an $anchor."""
        ids = {}
        anchors = {}
        for part in parts_of(self.root):
            if is_text(part.get("$id")):
                ids[part["$id"]] = part
            if is_text(part.get("$anchor")):
                anchors[f"#{part['$anchor']}"] = part
        return ids | anchors

    def resolve(self, reference: str):
        """The schema that a $ref leads to."""
        self.spend()
        base, _, path = reference.partition("#")
        if path and not path.startswith("/"):
            base = f"#{path}"
            path = ""
        if base in ("", self.root.get("$id")) or base not in self.named:
            return follow_path(reference, self.root)
        return follow_path(f"#{path}", self.named[base])

    def target(self, schema):
        """The schema itself. If it does nothing but refer to another one: that one."""
        while isinstance(schema, dict) and ALL_KEYWORDS & schema.keys() == {"$ref"}:
            reference = keyword(schema, "$ref")
            if reference is None:
                break
            schema = self.resolve(reference)
        return schema

    def forms(self, schemas: Iterable) -> list[Form]:
        """The forms of all these schemas together: a value that fits all schemas fits one of the forms."""
        forms: list[Form] = [()]
        for schema in schemas:
            forms = self.both(forms, self.forms_of(schema))
        return forms

    def both(self, first: list[Form], second: list[Form]) -> list[Form]:
        """The forms of values that fit one of the first forms and one of the second."""
        self.spend(1 + len(first) * len(second) // 8)
        joined = []
        for one, other in itertools.product(first, second):
            distinct = {id(schema): schema for schema in one + other}
            joined.append(tuple(distinct.values()))
        return joined

    def forms_of(self, schema) -> list[Form]:
        """The forms of one schema. Keys keep the order in which the schema mentions them."""
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
                forms = self.both(forms, self.forms_of(self.resolve(schema[name])))
            elif name == "allOf":
                forms = self.both(forms, self.forms(keyword(schema, name) or ()))
            elif name in CHOICES and keyword(schema, name):
                choices = [self.forms_of(choice) for choice in schema[name]]
                if name == "oneOf":
                    for one, other in itertools.combinations(choices, 2):
                        if not self.all_apart(one, other):
                            raise ValueError(
                                "the choices of oneOf must exclude each other by their types, or by a "
                                "required property with other values in each; anyOf needs no such thing")
                forms = self.both(forms, [*itertools.chain(*choices)])
        return forms

    def all_apart(self, first: list[Form], second: list[Form]) -> bool:
        """Whether surely no value fits a form of the first list and one of the second."""
        return all(self.apart(one, other) for one, other in itertools.product(first, second))

    def apart(self, first: Form, second: Form) -> bool:
        """Whether surely no value fits both forms."""
        self.spend()
        values = values_among(first + second)
        if values is not None:
            return not values
        types = types_among(first + second)
        if not types:
            return True
        if types != {"object"}:
            return False
        for name, required in keys_among(first + second).items():
            if required and self.all_apart(self.forms(schemas_of_key(first, name)),
                                           self.forms(schemas_of_key(second, name))):
                return True
        return False


TYPE_KEYWORDS = {  # a schema that has one of these keywords but no type most likely means this type
    "object": ("properties", "required", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"), "string": TEXT_KEYWORDS,
    "number": NUMBER_KEYWORDS}


def plain_schema(schema, schemas: SchemaForms, above: frozenset[int] = frozenset()) -> dict:
    """A schema for chat templates, which read `type` and do not follow references.

    It names the types that the schema allows in any words, and has what a $ref leads to. Of several choices
    it has the first that is not null, and `nullable` if null is one. A schema that cannot be read stays as it
    is. above: the ids of the schemas around this one, so that it does not repeat them."""
    outside = schema if isinstance(schema, dict) else {}
    try:
        forms = schemas.forms_of(schema)
        form = next((form for form in forms if types_of([form]) - {"null"}), ())
        types = types_of(forms)
        values = values_among(form)
    except (ValueError, LookupError, RecursionError):
        return outside
    said = {}
    for part in (*reversed(form), outside):
        said |= {name: value for name, value in part.items() if name not in ("$ref", "const", *CHOICES)}
    if types == JSON_TYPES.keys():
        types = {name for name, words in TYPE_KEYWORDS.items() if not said.keys().isdisjoint(words)}
    elif "null" in types and len(types) > 1:
        types = types - {"null"}
        said["nullable"] = True
    if values is not None:
        said["enum"] = [value for value in values if value is not None]
    if "number" in types:
        types = types - {"integer"}
    names = [name for name in JSON_TYPES if name in types]
    if names:
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
