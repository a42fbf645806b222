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
    """Whether a text fits the form as a string."""
    values = values_among(form)
    shortest, longest = between(form, "minLength", "maxLength")
    if "string" not in types_among(form) or values is not None and text not in values:
        return False
    if len(text) < shortest or longest is not None and len(text) > longest:
        return False
    patterns = []
    for members in members_of(form, ["format", "pattern"]):
        name = keyword(members, "format")
        if name in STRING_FORMATS:
            patterns.append(f"^(?:{STRING_FORMATS[name]})$")
        patterns.append(keyword(members, "pattern"))
    return all(is_found(pattern, text) for pattern in filter(None, patterns))


def text_rule(rule: str, text: str, sign: str, ends: Iterable[str]) -> tuple[str, str]:
    """The two lines of a rule for texts that match `text`, a terminal. The texts end with `sign`, and contain
    none of `ends`."""
    refused = "|".join(in_slashes(re.escape(end)) for end in ends)
    terminal = rule.upper()
    return f"{rule}[suffix={sign}]: {terminal}", f"{terminal}: ({text}) & ~/(?s:.*)({refused})(?s:.*)/"


def written(value, notation: Notation) -> str:
    """The expression for exactly this value. Raises ValueError if JSON does not have the value."""
    finite_json(value)
    text = notation.text(value)
    if notation.quote == JSON.quote:
        return literal(text)
    return f" <[{notation.quote}]> ".join(map(literal, text.split(notation.quote)))


def more(item: str, low: int, high: int, comma: str) -> str:
    """The expression for `low` to `high` more items, each after a comma."""
    return f"({comma} {item}){{{low},{high}}}" if high else ""


def known_format(members: Mapping) -> dict:
    """The members that a schema has about strings, checked, without a format that is unknown here."""
    known = {}
    for name, value in members.items():
        if name in KEYWORDS:
            value = keyword(members, name)
        if name == "format" and value not in FORMATS:
            continue
        if name in ("minLength", "maxLength") and value is not None:
            value = int(value)
        known[name] = value
    return known


class SchemaRules:
    """Writes the rules of a grammar for the values that fit schemas.

    Values that must fit the same schemas share a rule. The rules' names are `name` and a number. Schemas may
    refer to parts of `root`. Where no value fits, the rule is None."""

    def __init__(self, name: str, root: Mapping, notation: Notation = JSON):
        self.name = name
        self.schemas = SchemaForms(root)
        self.notation = notation
        self.raw = notation.quote != JSON.quote  # strings have no escapes
        self.comma = " ".join(map(as_json, notation.comma))
        self.colon = " ".join(map(as_json, notation.colon))
        self.lines: list[str] = []           # of the grammar
        self.patterns: dict[str, None] = {}  # the patterns of strings and keys, for check_patterns
        self.terminals: dict[str, str] = {}  # the text of each terminal, by its name
        self.known: dict = {}                # the names of rules, by their schemas' ids or by their text
        self.made: list[tuple] = []          # keeps the schemas of rules alive, so that their ids stay theirs
        self.characters = 0                  # of all lines

    def rule(self, *schemas) -> str | None:
        """The rule for values that fit all of these schemas."""
        members = {id(schema): schema for schema in map(self.schemas.target, schemas)
                   if schema is False or ALL_KEYWORDS & schema_object(schema).keys()}
        if not members:
            return self.anything(MOST_DEPTH)

        def choices() -> Iterator[str]:
            for form in self.schemas.forms(members.values()):
                yield from self.choices(form)
        return self.rule_for(tuple(members), tuple(members.values()), choices)

    def rule_for(self, key: tuple, schemas: tuple, make: Callable[[], Iterable[str]]) -> str | None:
        """The rule that is known as `key`, the ids of `schemas`. If there is none yet, a new one is made of
        the choices that `make` returns."""
        if key not in self.known:
            self.made.append(schemas)
            name = self.new_name()
            self.known[key] = name  # before the choices are made, because they may refer to it
            choices = [*dict.fromkeys(make())]
            if not choices:
                self.known[key] = None
            elif len(choices) == 1 and re.fullmatch(r'JSON_\w+|"\w+"', choices[0]):
                self.known[key] = choices[0]
            else:
                self.define(name, " | ".join(choices))
        return self.known[key]

    def arguments(self, schema: Mapping) -> str:
        """The expression for a function's arguments, without their brackets. Raises ValueError if no
        arguments fit."""
        choices = []
        for form in self.schemas.forms_of(schema):
            if "object" in types_among(form):
                members = self.members(form, True, as_json(self.notation.equals))
                if members is not None:
                    choices.append(members or '""')
        if not choices:
            raise ValueError("no object fits them")
        return " | ".join(choices)

    def new_name(self) -> str:
        return f"{self.name}_{len(self.known)}"

    def define(self, name: str, text: str) -> str:
        self.lines.append(f"{name}: {text}")
        self.characters += len(self.lines[-1])
        if self.characters > LIMITS.grammar_characters:
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
        """An expression for each type of the values that fit a form."""
        self.schemas.spend()
        types = types_among(form)
        values = values_among(form)
        if values is not None:
            if text := self.value_choices(values, form):
                yield text
            return
        null, *booleans = map(as_json, self.notation.words)
        makers = {"null": lambda form: null, "boolean": lambda form: " | ".join(booleans),
                  "string": self.string, "number": partial(self.number, "number"),
                  "integer": partial(self.number, "integer"), "array": self.array, "object": self.object}
        for name, maker in makers.items():
            if name not in types or name == "integer" and "number" in types:
                continue
            if name in ("array", "object"):  # rules of their own: they may contain themselves
                text = self.rule_for((name, *map(id, form)), form, lambda: filter(None, [maker(form)]))
            else:
                text = maker(form)
            if text:
                yield text

    def anything(self, depth: int) -> str:
        """The rule for any value whose arrays and objects lie at most `depth` deep."""
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
        """The rule for a string or number, which llguidance makes from its schema."""
        text = finite_json({**schema, "x-guidance": {"whitespace_flexible": False}})
        return self.shared(f"%json {text}".replace("<[", "\\u003c["))

    def value_choices(self, values: list, form: Form) -> str:
        """The expression for those of the values that fit the form; "" if none does."""
        self.schemas.spend(1 + len(values) // 100)
        if members_of(form, PART_KEYWORDS):
            values = [value for value in values if not isinstance(value, (dict, list))]
        if about_numbers := members_of(form, NUMBER_KEYWORDS):
            bounds = bounds_of(about_numbers, False)
            multiples = multiples_of(about_numbers)

            def fits(value) -> bool:
                return bounds.allow(value) and all(is_multiple(value, multiple) for multiple in multiples)
            values = [value for value in values if not is_number(value) or fits(value)]
        texts = []
        if self.raw and any(map(is_text, values)):
            texts.append(self.string(form))
            values = [value for value in values if not is_text(value)]
        about_texts = members_of(form, TEXT_KEYWORDS)
        if values and about_texts:
            formats = [known_format(members) for members in about_texts]
            texts.append(self.leaf({"enum": values, "allOf": formats}))
        elif values:
            exactly = [written(value, self.notation) for value in values]
            texts.append(self.shared(" | ".join(exactly), not self.raw))
        return " | ".join(filter(None, texts))

    def raw_text(self, text: str) -> str:
        """The rule for a string without escapes that matches `text`, a terminal."""
        key = f"raw {text}"
        if key not in self.known:
            quote = self.notation.quote
            lines = text_rule(self.new_name(), text, f"<[{quote}]>", [quote])
            self.known[key] = f"<[{quote}]> {lines[0].partition('[')[0]}"
            self.lines += lines
            self.characters += sum(map(len, lines))
        return self.known[key]

    def text_terminal(self, form: Form) -> str:
        """A terminal for the strings that fit a form, without quotes; "" if no string fits."""
        if "string" not in types_among(form):
            return ""
        allowed = []
        values = values_among(form)
        if values is not None:
            allowed.append(" | ".join(literal(value) for value in values if is_text(value)))
        shortest, most = between(form, "minLength", "maxLength")
        for members in members_of(form, ("format", "pattern")):
            name = keyword(members, "format")
            if name in STRING_FORMATS:
                allowed.append(f"/{in_slashes(STRING_FORMATS[name])}/")
                if most is None and name in FORMAT_LENGTHS:
                    most = max(shortest, FORMAT_LENGTHS[name])
            if pattern := keyword(members, "pattern"):
                self.patterns[pattern] = None
                allowed.append(f"/{in_slashes(text_with(pattern))}/")
        if shortest or most is not None:
            allowed.append("/(?s:.{%d,%s})/" % (shortest, "" if most is None else most))
        if not all(allowed):  # one of the conditions allows nothing
            return ""
        return " & ".join(f"({choice})" for choice in allowed) or ANY_TEXT

    def string(self, form: Form) -> str:
        """The expression for the strings that fit a form; "" if none does."""
        if self.raw:
            text = self.text_terminal(form)
            return self.raw_text(text) if text else ""
        shortest, longest = between(form, "minLength", "maxLength")
        conditions = [members for members in map(known_format, members_of(form, TEXT_KEYWORDS)) if members]
        if not conditions:
            return "JSON_STRING"
        lengths = []
        for members in conditions:
            if pattern := members.get("pattern"):
                self.patterns[pattern] = None
            if members.get("format") in FORMAT_LENGTHS:
                lengths.append(FORMAT_LENGTHS[members["format"]])
        if longest is not None and shortest > longest:
            return ""
        if longest is None and lengths:
            conditions.append({"maxLength": max(shortest, *lengths)})
        return self.leaf({"type": "string", "allOf": conditions})

    def number(self, name: str, form: Form) -> str:
        """The expression for the numbers or integers (`name`) that fit a form; "" if none does. Numbers
        between bounds have no exponents, and fractions of up to 8 digits, or more if the bounds need more."""
        about_numbers = members_of(form, NUMBER_KEYWORDS)
        bounds = bounds_of(about_numbers, name == "integer")
        multiples = multiples_of(about_numbers)
        if bounds.allow_all() and not multiples:
            return f"JSON_{name.upper()}"
        places = [count for count in map(decimal_places, multiples) if count is not None]
        if len(places) == len(multiples):
            digits = 0 if name == "integer" else min(places, default=None)
            pattern = number_pattern(bounds, digits)
            return self.shared(f"/{pattern}/", True) if pattern else ""
        low, high = bounds.nearer()
        if low > high:
            return ""
        return self.leaf({"type": name, "minimum": low, "maximum": high,
                          "allOf": [{"multipleOf": multiple} for multiple in multiples]})

    def array(self, form: Form) -> str:
        """The expression for the arrays that fit a form; "" if none does."""
        # Each schema has a head, the schemas of its first items, and a tail, the schema of all others or
        # None.
        heads = []
        tails = []
        for schema in form:
            items = schema.get("items")
            heads.append(items if isinstance(items, list) else keyword(schema, "prefixItems") or [])
            tails.append(schema.get("additionalItems") if isinstance(items, list) else items)
        low, most = between(form, "minItems", "maxItems")
        length = max(map(len, heads), default=0)
        if most is None:
            most = max(MOST_ITEMS, low, length)
        has_tail = any(tail is not None for tail in tails)
        if not has_tail and any(fits_nothing(schema.get("unevaluatedItems")) for schema in form):
            most = min(most, length)
        places = []  # the rules of the first items
        for index in range(min(length, most)):
            schemas = [head[index] if index < len(head) else tail for head, tail in zip(heads, tails)]
            item = self.rule(*(schema for schema in schemas if schema is not None))
            if not item:  # no item can stand here, so arrays are shorter
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
            comma = self.comma if index else ""
            text = f"{comma} {item} {text}"
            if index >= low:
                text = f"({text})?"
        return f'"[" {text} "]"'

    def object(self, form: Form) -> str:
        text = self.members(form, self.notation.bare_keys, self.colon)
        return f'"{{" {text} "}}"' if text is not None else ""

    def members(self, form: Form, is_bare: bool, colon: str) -> str | None:
        """The expression for what is inside the objects that fit a form; None if none fits.

        They have the declared keys, and other keys only if a schema says so or none declares any.
        is_bare: keys have no quotes."""
        names = self.possible_keys(form)
        patterns = key_patterns(form)
        if names is None:
            return None
        self.schemas.spend(1 + len(names) // 8 + sum(map(len, patterns)) // 1000)
        first_search = 50 if names else 0  # steps to prepare a pattern
        self.schemas.spend(1 + len(patterns) * (first_search + len(names) // 2))
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
        extra = []  # members with keys that no schema declares
        if any_key and has_other_keys(form):
            value = self.rule(*schemas_of_key(form, None))
            key = value and self.other_key(any_key, None, texts.values(), keys)
            if key:
                extra.append(f"{key} {colon} {value}")
        for pattern in keys:
            value = self.rule(*schemas_of_key(form, None, [pattern]))
            key = value and self.other_key(any_key, pattern, texts.values(), keys)
            if key:
                extra.append(f"{key} {colon} {value}")
        return self.pairs(members, " | ".join(extra), *between(form, "minProperties", "maxProperties"))

    def possible_keys(self, form: Form) -> dict[str, bool] | None:
        """The keys that the schemas declare, or list as the only possible ones, and whether they are
        required. Leaves out keys that no object may have; None if such a key is required."""
        names = keys_among(form)
        about_names = name_schemas(form)
        if not about_names:
            return names
        forms = self.schemas.forms(about_names)
        lists = [values_among(choice) for choice in forms]
        if None not in lists:
            only = {name: False for values in lists for name in values or ()}
            names = {name: False for name in only if is_text(name)} | names
        self.schemas.spend(1 + (50 + len(names)) * len(forms))
        possible = {}
        for name, required in names.items():
            if any(is_text_of(choice, name) for choice in forms):
                possible[name] = required
            elif required:
                return None
        return possible

    def any_key(self, form: Form, is_bare: bool) -> str:
        """The terminal for a key that no schema declares; "" if there can be none."""
        terminal = ANY_KEY[is_bare]
        quote = "" if is_bare else as_json('"')
        text = self.other_names(form)
        if text in ("", ANY_TEXT):
            return text and terminal
        return self.shared(f"{terminal} & ({quote} ({text}) {quote})", True)

    def other_names(self, form: Form) -> str:
        """A terminal, without quotes, for keys that no schema declares; "" if there can be none."""
        about_names = name_schemas(form)
        if not about_names:
            return ANY_TEXT
        forms = self.schemas.forms(about_names)
        if all(values_among(choice) is not None for choice in forms):
            return ""
        texts = [*filter(None, map(self.text_terminal, forms))]
        if ANY_TEXT in texts:
            return ANY_TEXT
        return " | ".join(f"({text})" for text in texts)

    def other_key(self, any_key: str, pattern: str | None, texts: Iterable[str],
                  keys: Mapping[str, str]) -> str:
        """A terminal for keys that are not declared and match this pattern only; "" if there are none."""
        conditions = [any_key]
        if pattern is not None:
            conditions.append(keys[pattern])
        if texts:
            conditions.append(f"~({' | '.join(texts)})")
        conditions += [f"~{terminal}" for other, terminal in keys.items() if other != pattern]
        key = self.shared(" & ".join(conditions), True)
        if any_key in ANY_KEY and len(keys) < 2 and not (keys and texts):
            return key  # a pattern alone surely matches something
        self.schemas.spend(40)
        lines = [JSON_TERMINALS]
        for name in dict.fromkeys((key, any_key, *keys.values())):
            if name not in ANY_KEY:
                lines.append(f"{name}: {self.terminals[name]}")
        return key if matches_something(key, lines) else ""

    def pairs(self, members: list[tuple[str, bool]], extra: str, low: int, most: int | None) -> str | None:
        """The expression for an object's members: these in this order, the required ones always, and then
        some that match `extra`. There are `low` to `most` members together. None if that is impossible.

        A state of the grammar is a member's place and how many members stand before it."""
        if extra:
            extra = self.shared(extra)
        cap = max(1, low)  # no need to count further
        if most is not None:
            cap = max(cap, most + 1)
        reached = [{0}]  # for each place, how many members may stand before it
        for _, required in members:
            counts = {min(count + 1, cap) for count in reached[-1]}
            if not required:
                counts |= reached[-1]
            reached.append(counts)
            self.schemas.spend(1 + len(reached[-1]) // 8)
        after = {}  # the expression for what follows so many members; None if nothing may follow
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
                choices = []
                with_it = ends[min(count + 1, cap)]
                if with_it is not None:
                    comma = f"{self.comma} " if count else ""
                    choices.append(f"{comma}{member} {with_it}")
                without_it = None if required else ends[count]
                if without_it is not None:
                    choices.append(without_it or '""')
                if len(choices) == 2:
                    after[count] = self.shared(" | ".join(choices))
                else:
                    after[count] = choices[0] if choices else None
        return after[0]
