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
from chatlm.common.text.schemas import (
    ALL_KEYWORDS, KEYWORDS, NUMBER_KEYWORDS, PART_KEYWORDS, TEXT_KEYWORDS, Form, SchemaForms, between,
    finite_json, has_other_keys, keys_among, keyword, members_of, schema_object, schemas_of_key, types_among,
    values_among)


def in_slashes(pattern: str) -> str:
    """A regular expression as it is written between slashes, on one line."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", pattern).replace("\n", "\\n")


def literal(text: str) -> str:
    """Text in a grammar; what with_markers would take for a marker is escaped."""
    return as_json(text).replace("<[", "\\u003c[")


def text_with(pattern: str) -> str:
    """A regular expression for a whole text in which this one is found anywhere."""
    if not (end := re.search(r"(?<!\\)(?:\\\\)*(\$?)\Z", pattern)):
        raise ValueError(f"the pattern {shown(pattern)} ends within an escape")
    first, last = "^" if pattern.startswith("^") else "", end[1]
    inside = pattern.removeprefix(first).removesuffix(last) if "|" not in pattern else pattern
    return f"{'' if first else '(?s:.*)'}(?:{inside}){'' if last else '(?s:.*)'}"


LARGEST = 9_999_999_999_999_998  # of 16 digits; one more is no number of IEEE's
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
A_BYTE, A_WORD = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])", "[0-9A-Fa-f]{1,4}"
STRING_FORMATS = {  # those that JSON grammars know
    "date": A_DAY, "time": A_TIME, "date-time": f"{A_DAY}[Tt]{A_TIME}", "hostname": A_HOST,
    "duration": "P([0-9]+[YMWD])+(T([0-9]+[HMS])+)?|PT([0-9]+[HMS])+",
    "email": rf"[0-9A-Za-z!#$%&'*+/=?^_`{{|}}~.-]+@{A_HOST}",
    "ipv4": rf"({A_BYTE}\.){{3}}{A_BYTE}",
    "ipv6": "|".join((f"({A_WORD}:){{7}}({A_WORD}|:)", f":(:{A_WORD}){{7}}", *(
        f"({A_WORD}(:{A_WORD}){{0,{n}}})?::({A_WORD}(:{A_WORD}){{0,{5 - n}}})?" for n in range(6)))),
    "uuid": "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": r"[A-Za-z][0-9A-Za-z+.-]*:[0-9A-Za-z:/?#\[\]@!$&'()*+,;=%._~-]*"}


def text_terminal(form: Form) -> str:
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
            most = max(shortest, FORMAT_LENGTHS[name]) if most is None and name in FORMAT_LENGTHS else most
        if pattern := in_slashes(keyword(members, "pattern") or ""):
            allowed.append(f"/{text_with(pattern)}/")
    if shortest or most is not None:
        allowed.append("/(?s:.{%d,%s})/" % (shortest, "" if most is None else most))
    return " & ".join(f"({choice})" for choice in allowed) or "/(?s:.*)/" if all(allowed) else ""


def text_rule(rule: str, text: str, sign: str, ends: Iterable[str]) -> tuple[str, str]:
    """The lines of a rule for texts of a terminal, up to a sign that ends them; they have none of `ends`."""
    refused = "|".join(in_slashes(re.escape(end)) for end in ends)
    terminal = rule.upper()
    return f"{rule}[suffix={sign}]: {terminal}", f"{terminal}: ({text}) & ~/(?s:.*)({refused})(?s:.*)/"


def written(value, notation: Notation) -> str:
    """Exactly this value. ValueError if JSON does not have it."""
    finite_json(value)
    text, quote = notation.text(value), notation.quote
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
        self.name, self.schemas, self.notation = name, SchemaForms(root), notation
        self.raw = notation.quote != JSON.quote  # are strings written without escapes?
        self.comma, self.colon = (" ".join(map(as_json, text)) for text in (notation.comma, notation.colon))
        self.lines: list[str] = []
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
        return self.known[text]

    def choices(self, form: Form) -> Iterator[str]:
        """The values of a form, of each type that they may have."""
        self.schemas.spend()
        types, values = types_among(form), values_among(form)
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
        text = self.raw_text("/(?s:.*)/") if self.raw else "JSON_STRING"
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
        texts = [self.string(form)] if self.raw and any(map(is_text, values)) else []
        values = [value for value in values if not (self.raw and is_text(value))]
        if values and (said := members_of(form, (*TEXT_KEYWORDS, *NUMBER_KEYWORDS))):
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

    def string(self, form: Form) -> str:
        if self.raw:
            return self.raw_text(text) if (text := text_terminal(form)) else ""
        shortest, longest = between(form, "minLength", "maxLength")
        said = [members for members in map(known_format, members_of(form, TEXT_KEYWORDS)) if members]
        if longest is not None and shortest > longest or not said:
            return "" if said else "JSON_STRING"
        lengths = [FORMAT_LENGTHS[members["format"]] for members in said
                   if members.get("format") in FORMAT_LENGTHS]
        if longest is None and lengths:
            said.append({"maxLength": max(shortest, *lengths)})
        return self.leaf({"type": "string", "allOf": said})

    def number(self, name: str, form: Form) -> str:
        """Numbers or integers; between bounds they have no exponents, and fractions of 8 digits."""
        if not (said := members_of(form, NUMBER_KEYWORDS)):
            return f"JSON_{name.upper()}"
        lows, highs = (
            [members[bound] for members in said for bound in bounds if is_number(members.get(bound))]
            for bounds in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")))
        if lows and highs and max(lows) > min(highs):
            return ""
        most = max([LARGEST, *(10 * abs(bound) for bound in lows + highs if abs(bound) >= LARGEST)])
        bounds = {} if lows else {"minimum": -most}
        bounds |= {} if highs else {"maximum": most}
        if name == "number" and not any("multipleOf" in members for members in said):
            bounds["multipleOf"] = 1e-8  # llguidance counts digits in 32 bits
        return self.leaf({"type": name, "allOf": [bounds, *said]})

    def array(self, form: Form) -> str:
        heads, tails = [], []
        for schema in form:
            items = schema.get("items")
            heads.append(items if isinstance(items, list) else keyword(schema, "prefixItems") or [])
            tails.append(schema.get("additionalItems") if isinstance(items, list) else items)
        low, most = between(form, "minItems", "maxItems")
        length = max(map(len, heads), default=0)
        most = max(MOST_ITEMS, low, length) if most is None else most
        places = []
        for index in range(min(length, most)):
            item = self.rule(*(schema for head, tail in zip(heads, tails) if (
                schema := head[index] if index < len(head) else tail) is not None))
            if not item:
                most = index
                break
            places.append(item)
        text, item = "", None
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
        names, patterns = keys_among(form), [
            pattern for schema in form for pattern in keyword(schema, "patternProperties") or {}]
        self.schemas.spend(1 + len(names) // 8 + sum(map(len, patterns)) // 1000)
        any_key, quote = ANY_KEY[is_bare], "" if is_bare else '"'
        keys = {pattern: self.shared(f"{any_key} & /{quote}{in_slashes(text_with(pattern))}{quote}/", True)
                for pattern in patterns}
        texts = {name: literal(bare(name) if is_bare else finite_json(name)) for name in names}
        members, every = [], (None, *keys)
        for name, required in names.items():
            pairs = [f"{self.key(texts[name], pattern, keys)} {colon} {value}" for pattern in every
                     if (value := self.rule(*schemas_of_key(form, name, pattern)))]
            if pairs:  # an optional one is in several rules
                member = pairs[0] if required and len(pairs) == 1 else self.shared(" | ".join(pairs))
                members.append((member, required))
            elif required:
                return None
        extra = [f"{self.other_key(any_key, pattern, texts.values(), keys)} {colon} {value}"
                 for pattern in every if (pattern is not None or has_other_keys(form))
                 and (value := self.rule(*schemas_of_key(form, None, pattern)))]
        return self.pairs(members, " | ".join(extra), *between(form, "minProperties", "maxProperties"))

    def key(self, text: str, pattern: str | None, keys: Mapping[str, str]) -> str:
        """A declared key of which this pattern alone is true; if it is not, the terminal matches nothing."""
        if not keys:
            return text
        return self.shared(" & ".join([text, *(
            ("" if other == pattern else "~") + terminal for other, terminal in keys.items())]), True)

    def other_key(self, any_key: str, pattern: str | None, texts: Iterable[str],
                  keys: Mapping[str, str]) -> str:
        """A key that is not declared, and of which this pattern alone is true."""
        taken = [f"~({' | '.join(texts)})"] if texts else []
        return self.shared(" & ".join([keys[pattern] if pattern is not None else any_key, *taken, *(
            f"~{terminal}" for other, terminal in keys.items() if other != pattern)]), True)

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
            ends, after = after, {}
            for count in counts:
                choices = [] if (end := ends[min(count + 1, cap)]) is None else [
                    f"{self.comma} {member} {end}" if count else f"{member} {end}"]
                if not required and (end := ends[count]) is not None:
                    choices.append(end or '""')
                after[count] = None if not choices else choices[0] if len(choices) == 1 else self.shared(
                    " | ".join(choices))
        return after[0]
