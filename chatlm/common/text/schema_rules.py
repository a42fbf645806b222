"""JSON schemas as rules of a grammar in which every value comes to an end.

llguidance follows a JSON schema by itself, but a model in doubt may then write digits, items or keys of its
own until the length limit. Here the structure of a schema becomes rules with bounds, and only what it says of
a single string or number is left to llguidance's %json. Every value that the rules allow fits the schema,
unless it has a key twice; what the schema leaves open has bounds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from chatlm.common.config import LIMITS
from chatlm.common.errors import shown
from chatlm.common.jsontext import as_json, is_number, is_text
from chatlm.common.text.notations import BARE, JSON, Notation, bare
from chatlm.common.text.number_ranges import (
    bounds_of, decimal_places, is_multiple, multiples_of, number_pattern)
from chatlm.common.text.patterns import (
    in_slashes, is_found, matches_something, text_with)
from chatlm.common.text.schemas import (
    ALL_KEYWORDS, KEYWORDS, NUMBER_KEYWORDS, PART_KEYWORDS, TEXT_KEYWORDS, Form, SchemaForms, between,
    finite_json, fits_nothing, has_other_keys, key_patterns, keys_among, keyword, members_of, name_schemas,
    schema_object, schemas_of_declared, schemas_of_key, types_among, values_among)


def literal(text: str) -> str:
    """Text in a grammar; what with_markers would take for a marker is escaped."""
    return as_json(text).replace("<[", "\\u003c[")


MOST_ITEMS = 64     # of an array, and keys of an object that are not declared, where a schema has no limit
MOST_DEPTH = 16     # of arrays and objects of which the schema says nothing
FREE_COMMA = '"," JSON_SPACE'  # before what a schema leaves open
FORMAT_LENGTHS = {  # of the formats whose texts are not bounded by what they are
    "date-time": 43, "time": 32, "duration": 64, "hostname": 253, "email": 254}
FORMATS = (*FORMAT_LENGTHS, "date", "ipv4", "ipv6", "uuid", "uri")  # those that llguidance knows
ANY_KEY = ("JSON_KEY", "BARE_KEY")  # with quotes, without
JSON_TERMINALS = "\n".join((
    # as models like to write it: one that may not begin a line where it would invents odd keys instead
    r"JSON_SPACE: /( |\n{1,2}[ \t]{0,18})?/",
    r'JSON_STRING: /"([^"\\\x00-\x1f\x7f]|\\(["\\bfnrt]|u00([01][0-9a-f]|7f)))*"/',
    r'JSON_KEY: /"[^"\\\x00-\x1f\x7f]{0,64}"/',
    "JSON_INTEGER: /-?(0|[1-9][0-9]{0,15})/",
    # no exponent makes a number of 16 digits too large for IEEE's
    f"BARE_KEY: /{BARE}{{1,64}}/",
    r"JSON_NUMBER: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,16})?([eE][+-]?([0-9]{1,2}|1[0-9]{2}|2[0-8][0-9]))?/"))


A_DAY = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
A_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
A_LABEL = "[0-9A-Za-z]([0-9A-Za-z-]{0,61}[0-9A-Za-z])?"
A_HOST = rf"{A_LABEL}(\.{A_LABEL})*"
A_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
A_WORD = "[0-9A-Fa-f]{1,4}"
STRING_FORMATS = {  # those that JSON grammars know
    "date": A_DAY, "time": A_TIME, "date-time": f"{A_DAY}[Tt]{A_TIME}", "hostname": A_HOST,
    "duration": "P([0-9]+[YMWD])+(T([0-9]+[HMS])+)?|PT([0-9]+[HMS])+",
    "email": rf"[0-9A-Za-z!#$%&'*+/=?^_`{{|}}~.-]+@{A_HOST}",
    "ipv4": rf"({A_BYTE}\.){{3}}{A_BYTE}",
    "ipv6": "|".join((f"({A_WORD}:){{7}}({A_WORD}|:)", f":(:{A_WORD}){{7}}", *(
        f"({A_WORD}(:{A_WORD}){{0,{n}}})?::({A_WORD}(:{A_WORD}){{0,{5 - n}}})?" for n in range(6)))),
    "uuid": "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": r"[A-Za-z][0-9A-Za-z+.-]*:[0-9A-Za-z:/?#\[\]@!$&'()*+,;=%._~-]*"}


ANY_TEXT = "/(?s:.*)/"


def is_text_of(form: Form, text: str) -> bool:
    """Is this text a string of the form?"""
    values, (shortest, longest) = values_among(form), between(form, "minLength", "maxLength")
    if ("string" not in types_among(form) or values is not None and text not in values
            or len(text) < shortest or longest is not None and len(text) > longest):
        return False
    patterns = [f"^(?:{STRING_FORMATS[name]})$" for members in members_of(form, ["format"])
                if (name := keyword(members, "format")) in STRING_FORMATS]
    patterns += [keyword(members, "pattern") for members in members_of(form, ["pattern"])]
    return all(is_found(pattern, text) for pattern in filter(None, patterns))


def text_rule(rule: str, text: str, sign: str, ends: Iterable[str]) -> tuple[str, str]:
    """The lines of a rule for texts of a terminal, up to a sign that ends them; they have none of `ends`."""
    refused = "|".join(in_slashes(re.escape(end)) for end in ends)
    terminal = rule.upper()
    return f"{rule}[suffix={sign}]: {terminal}", f"{terminal}: ({text}) & ~/(?s:.*)({refused})(?s:.*)/"


def written(value, notation: Notation) -> str:
    """Exactly this value. ValueError if JSON does not have it."""
    finite_json(value)
    text = notation.text(value)
    quote = notation.quote
    return f" <[{quote}]> ".join(map(literal, [text] if quote == JSON.quote else text.split(quote)))


def more(item: str, low: int, high: int, comma: str) -> str:
    """So many more items after another."""
    return f"({comma} {item}){{{low},{high}}}" if high else ""


def known_format(members: Mapping) -> dict:
    """What a schema says of a string, without a format that nothing here knows."""
    said = {name: keyword(members, name) if name in KEYWORDS else members[name] for name in members
            if name != "format" or keyword(members, name) in FORMATS}
    return {name: int(value) if value is not None and name in ("minLength", "maxLength") else value
            for name, value in said.items()}


class SchemaRules:
    """Rules of a grammar for the values of schemas. Values that must fit the same schemas share a rule.

    Rules are called `name` and a number. Schemas are references into `root`. A value of which nothing is left
    (no value can fit) has None for a rule."""

    def __init__(self, name: str, root: Mapping, notation: Notation = JSON):
        self.name = name
        self.schemas = SchemaForms(root)
        self.notation = notation
        self.raw = notation.quote != JSON.quote  # are strings written without escapes?
        self.comma, self.colon = (" ".join(map(as_json, text)) for text in (notation.comma, notation.colon))
        self.lines: list[str] = []
        self.patterns: dict[str, None] = {}  # of strings and keys, for check_patterns
        self.terminals: dict[str, str] = {}  # the names of terminals, and their text
        self.known: dict = {}  # the names of rules, by the ids of their schemas or by their text
        self.made: list[tuple] = []
        self.characters = 0

    def rule(self, *schemas) -> str | None:
        """The rule for values that fit all of these schemas."""
        members = {id(schema): schema for schema in map(self.schemas.target, schemas)
                   if schema is False or ALL_KEYWORDS & schema_object(schema).keys()}
        if not members:
            return self.anything(MOST_DEPTH)
        return self.ruled(tuple(members), tuple(members.values()), lambda: (
            choice for form in self.schemas.forms(members.values()) for choice in self.choices(form)))

    def ruled(self, key: tuple, schemas: tuple, make: Callable[[], Iterable[str]]) -> str | None:
        """The rule that `key`, made of the ids of `schemas`, has; or with the choices that `make` makes."""
        if key not in self.known:
            self.made.append(schemas)                 # so that no other schema gets one of these ids
            self.known[key] = name = self.new_name()  # before its parts, in which it may be needed
            choices = [*dict.fromkeys(make())]
            if not choices:
                self.known[key] = None
            elif len(choices) == 1 and re.fullmatch(r'JSON_\w+|"\w+"', choices[0]):
                self.known[key] = choices[0]
            else:
                self.define(name, " | ".join(choices))
        return self.known[key]

    def arguments(self, schema: Mapping) -> str:
        """The choices of a function's arguments without what encloses them; ValueError if there are none."""
        forms = [form for form in self.schemas.forms_of(schema) if "object" in types_among(form)]
        choices = [self.members(form, True, as_json(self.notation.equals)) for form in forms]
        if not (choices := [choice or '""' for choice in choices if choice is not None]):
            raise ValueError("no object fits them")
        return " | ".join(choices)

    def new_name(self) -> str:
        return f"{self.name}_{len(self.known)}"

    def define(self, name: str, text: str) -> str:
        self.lines.append(f"{name}: {text}")
        self.characters += len(self.lines[-1])
        if self.characters > LIMITS.grammar_characters:  # before much more is made of it
            raise ValueError(f"as a grammar it must have at most {LIMITS.grammar_characters} characters")
        return name

    def shared(self, text: str, terminal: bool = False) -> str:
        """The rule or terminal with this text."""
        if text not in self.known:
            name = self.new_name()
            self.known[text] = self.define(name.upper() if terminal else name, text)
            if terminal:
                self.terminals[name.upper()] = text
        return self.known[text]

    def choices(self, form: Form) -> Iterator[str]:
        """The values of a form, of each type that they may have."""
        self.schemas.spend()
        types = types_among(form)
        values = values_among(form)
        if values is not None:
            if text := self.listed(values, form):
                yield text
            return
        null, *booleans = map(as_json, self.notation.words)
        makers = {"null": lambda form: null, "boolean": lambda form: " | ".join(booleans),
                  "string": self.string, "number": partial(self.number, "number"),
                  "integer": partial(self.number, "integer"), "array": self.array, "object": self.object}
        for name, maker in makers.items():
            if name not in types or name == "integer" and "number" in types:
                continue
            text = maker(form) if name not in ("array", "object") else self.ruled(
                (name, *map(id, form)), form, lambda: filter(None, [maker(form)]))
            if text:
                yield text

    def anything(self, depth: int) -> str:
        """The rule for any value, with arrays and objects inside each other up to a depth."""
        text = self.raw_text(ANY_TEXT) if self.raw else "JSON_STRING"
        choices = [" | ".join((*map(as_json, self.notation.words), "JSON_NUMBER", text))]
        if depth:
            value = self.anything(depth - 1)
            pair = f"{ANY_KEY[self.notation.bare_keys]} {self.colon} {value}"
            for opening, item, closing in ("[", value, "]"), ("{", pair, "}"):
                items = f"{item} {more(item, 0, MOST_ITEMS - 1, FREE_COMMA)}"
                choices.append(f'"{opening}" (JSON_SPACE {items} JSON_SPACE)? "{closing}"')
        return self.shared(" | ".join(choices))

    def leaf(self, schema: Mapping) -> str:
        """The rule for a string or number, which llguidance makes."""
        said = finite_json({**schema, "x-guidance": {"whitespace_flexible": False}})
        return self.shared(f"%json {said}".replace("<[", "\\u003c["))

    def listed(self, values: list, form: Form) -> str:
        """Those of the values that fit the form; "" if there are none."""
        self.schemas.spend(1 + len(values) // 100)
        if members_of(form, PART_KEYWORDS):
            values = [value for value in values if not isinstance(value, (dict, list))]
        if said := members_of(form, NUMBER_KEYWORDS):
            bounds = bounds_of(said, False)
            multiples = multiples_of(said)
            values = [value for value in values if not is_number(value) or bounds.allow(value) and all(
                is_multiple(value, multiple) for multiple in multiples)]
        texts = [self.string(form)] if self.raw and any(map(is_text, values)) else []
        values = [value for value in values if not (self.raw and is_text(value))]
        if values and (said := members_of(form, TEXT_KEYWORDS)):
            texts.append(self.leaf({"enum": values, "allOf": [known_format(members) for members in said]}))
        elif values:
            exactly = [written(value, self.notation) for value in values]
            texts.append(self.shared(" | ".join(exactly), not self.raw))
        return " | ".join(filter(None, texts))

    def raw_text(self, text: str) -> str:
        """The rule for a string without escapes, which is what this terminal is."""
        if (key := f"raw {text}") not in self.known:
            quote = self.notation.quote
            lines = text_rule(self.new_name(), text, f"<[{quote}]>", [quote])
            self.known[key] = f"<[{quote}]> {lines[0].partition('[')[0]}"
            self.lines += lines
            self.characters += sum(map(len, lines))
        return self.known[key]

    def text_terminal(self, form: Form) -> str:
        """What a string of this form may be where no quotes enclose it; "" if it can be no string."""
        if "string" not in types_among(form):
            return ""
        allowed = []
        if (values := values_among(form)) is not None:
            allowed.append(" | ".join(literal(value) for value in values if is_text(value)))
        shortest, most = between(form, "minLength", "maxLength")
        for members in members_of(form, ("format", "pattern")):
            if (name := keyword(members, "format")) in STRING_FORMATS:
                allowed.append(f"/{in_slashes(STRING_FORMATS[name])}/")
                if most is None and name in FORMAT_LENGTHS:
                    most = max(shortest, FORMAT_LENGTHS[name])
            if pattern := keyword(members, "pattern"):
                self.patterns[pattern] = None
                allowed.append(f"/{in_slashes(text_with(pattern))}/")
        if shortest or most is not None:
            allowed.append("/(?s:.{%d,%s})/" % (shortest, "" if most is None else most))
        return " & ".join(f"({choice})" for choice in allowed) or ANY_TEXT if all(allowed) else ""

    def string(self, form: Form) -> str:
        if self.raw:
            return self.raw_text(text) if (text := self.text_terminal(form)) else ""
        shortest, longest = between(form, "minLength", "maxLength")
        said = [members for members in map(known_format, members_of(form, TEXT_KEYWORDS)) if members]
        for members in said:
            if pattern := members.get("pattern"):
                self.patterns[pattern] = None
        if longest is not None and shortest > longest or not said:
            return "" if said else "JSON_STRING"
        lengths = [FORMAT_LENGTHS[members["format"]] for members in said
                   if members.get("format") in FORMAT_LENGTHS]
        if longest is None and lengths:
            said.append({"maxLength": max(shortest, *lengths)})
        return self.leaf({"type": "string", "allOf": said})

    def number(self, name: str, form: Form) -> str:
        """Numbers or integers; between bounds they have no exponents, and fractions of 8 digits or more."""
        said = members_of(form, NUMBER_KEYWORDS)
        bounds = bounds_of(said, name == "integer")
        multiples = multiples_of(said)
        if bounds.allow_all() and not multiples:
            return f"JSON_{name.upper()}"
        places = [count for multiple in multiples if (count := decimal_places(multiple)) is not None]
        if len(places) == len(multiples):
            pattern = number_pattern(bounds, 0 if name == "integer" else min(places, default=None))
            return self.shared(f"/{pattern}/", True) if pattern else ""
        low, high = bounds.nearer()
        return self.leaf({"type": name, "minimum": low, "maximum": high, "allOf": [
            {"multipleOf": multiple} for multiple in multiples]}) if low <= high else ""

    def array(self, form: Form) -> str:
        heads = []
        tails = []
        for schema in form:
            items = schema.get("items")
            heads.append(items if isinstance(items, list) else keyword(schema, "prefixItems") or [])
            tails.append(schema.get("additionalItems") if isinstance(items, list) else items)
        low, most = between(form, "minItems", "maxItems")
        length = max(map(len, heads), default=0)
        most = max(MOST_ITEMS, low, length) if most is None else most
        if all(tail is None for tail in tails) and any(
                fits_nothing(schema.get("unevaluatedItems")) for schema in form):
            most = min(most, length)
        places = []
        for index in range(min(length, most)):
            item = self.rule(*(schema for head, tail in zip(heads, tails) if (
                schema := head[index] if index < len(head) else tail) is not None))
            if not item:
                most = index
                break
            places.append(item)
        text = ""
        item = None
        if most > len(places):
            item = self.rule(*(tail for tail in tails if tail is not None))
        if item:
            places = places or [item]
            text = more(item, max(0, low - len(places)), most - len(places), self.comma)
        if low > (most if item else len(places)):
            return ""
        for index, item in reversed([*enumerate(places)]):
            text = f"{self.comma if index else ''} {item} {text}"
            text = text if index < low else f"({text})?"
        return f'"[" {text} "]"'

    def object(self, form: Form) -> str:
        text = self.members(form, self.notation.bare_keys, self.colon)
        return f'"{{" {text} "}}"' if text is not None else ""

    def members(self, form: Form, is_bare: bool, colon: str) -> str | None:
        """What is in objects of the declared keys, and of others only if a schema says so or none declares
        any; None if nothing fits. Have the keys no quotes?"""
        names = self.possible_keys(form)
        patterns = key_patterns(form)
        if names is None:
            return None
        self.schemas.spend(1 + len(names) // 8 + sum(map(len, patterns)) // 1000)
        self.schemas.spend(1 + len(patterns) * (50 * bool(names) + len(names) // 2))
        quote = "" if is_bare else '"'
        any_key = self.any_key(form, is_bare)
        keys = {}
        for pattern in patterns if any_key else ():
            self.patterns[pattern] = None
            keys[pattern] = self.shared(f"/{quote}{in_slashes(text_with(pattern))}{quote}/", True)
        texts = {name: literal(bare(name) if is_bare else finite_json(name)) for name in names}
        members = []
        for name, required in names.items():
            if value := self.rule(*schemas_of_declared(form, name)):
                member = f"{texts[name]} {colon} {value}"
                members.append((member if required else self.shared(member), required))
            elif required:
                return None
        extra = []
        for pattern in (None, *keys) if any_key and has_other_keys(form) else keys:
            value = self.rule(*schemas_of_key(form, None, [] if pattern is None else [pattern]))
            if value and (key := self.other_key(any_key, pattern, texts.values(), keys)):
                extra.append(f"{key} {colon} {value}")
        return self.pairs(members, " | ".join(extra), *between(form, "minProperties", "maxProperties"))

    def possible_keys(self, form: Form) -> dict[str, bool] | None:
        """The keys that the schemas declare, or list as the only ones, and whether they are required. Those
        that no object may have are left out; None if one of them is required."""
        names = keys_among(form)
        if not (about_names := name_schemas(form)):
            return names
        forms = self.schemas.forms(about_names)
        if all(values_among(choice) is not None for choice in forms):
            listed = [name for choice in forms for name in values_among(choice) or () if is_text(name)]
            names = {name: False for name in listed} | names
        self.schemas.spend(1 + (50 + len(names)) * len(forms))
        possible = {name: required for name, required in names.items()
                    if any(is_text_of(choice, name) for choice in forms)}
        return possible if all(name in possible for name, required in names.items() if required) else None

    def any_key(self, form: Form, is_bare: bool) -> str:
        """The terminal of a key that no schema declares; "" if there can be none."""
        terminal = ANY_KEY[is_bare]
        quote = "" if is_bare else as_json('"')
        text = self.other_names(form)
        return text and (terminal if text == ANY_TEXT else self.shared(
            f"{terminal} & ({quote} ({text}) {quote})", True))

    def other_names(self, form: Form) -> str:
        """What a key may be that no schema declares, without quotes; "" if there can be none."""
        if not (about_names := name_schemas(form)):
            return ANY_TEXT
        forms = self.schemas.forms(about_names)
        if all(values_among(choice) is not None for choice in forms):
            return ""
        texts = [text for choice in forms if (text := self.text_terminal(choice))]
        return ANY_TEXT if ANY_TEXT in texts else " | ".join(f"({text})" for text in texts)

    def other_key(self, any_key: str, pattern: str | None, texts: Iterable[str],
                  keys: Mapping[str, str]) -> str:
        """A key that is not declared, and of which this pattern alone is true; "" if there is none."""
        taken = [f"~({' | '.join(texts)})"] if texts else []
        own = [] if pattern is None else [keys[pattern]]
        key = self.shared(" & ".join([any_key, *own, *taken, *(
            f"~{terminal}" for other, terminal in keys.items() if other != pattern)]), True)
        if any_key in ANY_KEY and len(keys) < 2 and not (keys and taken):
            return key  # a pattern by itself may be true of something
        self.schemas.spend(40)
        names = [name for name in dict.fromkeys((key, any_key, *keys.values())) if name not in ANY_KEY]
        is_possible = matches_something(key, [JSON_TERMINALS, *(
            f"{name}: {self.terminals[name]}" for name in names)])
        return key if is_possible else ""

    def pairs(self, members: list[tuple[str, bool]], extra: str, low: int, most: int | None) -> str | None:
        """What is in an object of these members in this order, some required, and then of `extra` ones."""
        extra = self.shared(extra) if extra else ""
        cap = max(1, low, 0 if most is None else most + 1)  # it is enough to count so far
        reached = [{0}]
        for _, required in members:
            longer = {min(count + 1, cap) for count in reached[-1]}
            reached.append(longer if required else longer | reached[-1])
            self.schemas.spend(1 + len(reached[-1]) // 8)
        after = {}
        for count in reached[-1]:
            least = max(0, low - count)
            room = max(MOST_ITEMS, least) if most is None else most - count
            if room < least or least > 0 and not extra:
                after[count] = None
            elif not extra or room == 0:
                after[count] = ""
            elif count:
                after[count] = more(extra, least, room, FREE_COMMA) + " JSON_SPACE"
            else:
                others = more(extra, max(0, least - 1), room - 1, FREE_COMMA)
                text = f"JSON_SPACE {extra} {others} JSON_SPACE"
                after[count] = text if least else f"({text})?"
        for (member, required), counts in reversed([*zip(members, reached)]):
            ends = after
            after = {}
            for count in counts:
                choices = [] if (end := ends[min(count + 1, cap)]) is None else [
                    f"{self.comma} {member} {end}" if count else f"{member} {end}"]
                if not required and (end := ends[count]) is not None:
                    choices.append(end or '""')
                after[count] = None if not choices else choices[0] if len(choices) == 1 else self.shared(
                    " | ".join(choices))
        return after[0]
