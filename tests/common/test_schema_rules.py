"""Rules for JSON schemas: every value that they allow fits the schema, and comes to an end."""

import functools
import json
import math
import random
import re
from fractions import Fraction

import pytest

from chatlm.common.errors import RequestError
from chatlm.common.text.formats import with_markers
from chatlm.common.text.grammar import byte_vocabulary, check_grammar, json_grammar
from chatlm.common.text.schema_rules import FORMATS, FORMAT_LENGTHS
from nightly import WHOLE

QUOTE = ord('"')


@functools.lru_cache(maxsize=8)
def compiled(text):
    import llguidance
    source = json_grammar(json.loads(text), "response_format")
    check_grammar(source, "response_format")
    return llguidance.LLMatcher(byte_vocabulary(), with_markers(source, {}), log_level=0)


def matcher_of(schema):
    return compiled(json.dumps(schema)).deep_copy()


def taken(schema, text):
    """How many bytes of a text the grammar takes, and whether an answer may end there."""
    matcher = matcher_of(schema)
    count = matcher.try_consume_tokens(list(text.encode()))
    return count, matcher.is_accepting()


def fits(schema, value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return taken(schema, text) == (len(text.encode()), True)


PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]}


@pytest.mark.parametrize("schema, allowed, refused", [
    (PERSON, [{"name": "a"}, {"name": "a", "age": 1}], [{"name": "a", "x": 1}, {"age": 1}, {"x": 1}]),
    (PERSON | {"additionalProperties": True}, [{"name": "a", "x": [{}], "y": None}], [{"x": 1}, {"name": "a", "age": "b"}]),
    (PERSON | {"additionalProperties": {"type": "null"}}, [{"name": "a", "x": None}], [{"name": "a", "x": 1}]),
    (PERSON | {"additionalProperties": False}, [{"name": "a"}], [{"name": "a", "x": 1}]),
    ({"type": "object", "properties": {}}, [{}], [{"x": 1}]),                   # a function without parameters
    ({"type": "object"}, [{}, {"x": [1, {"y": "z"}]}], [[], 5]), ({}, [{"x": 1}, [1], "\"a\"", None, 1.5], []), ({"description": "any"}, [5, {}], []),
    ({"properties": {"a": {"$ref": "#/$defs/p"}}, "$defs": {"p": PERSON}, "type": "object"}, [{"a": {"name": "b"}}, {}], [{"a": {"name": "b", "x": 1}}]),
    # keys that several schemas declare together
    ({"allOf": [PERSON, {"properties": {"x": {"type": "null"}}, "required": ["x"]}], "type": "object"}, [{"name": "a", "x": None}, {"name": "a", "age": 1, "x": None}],
     [{"name": "a"}, {"name": "a", "x": None, "y": 1}]),
    ({"$ref": "#/$defs/p", "properties": {"x": {"type": "null"}}, "$defs": {"p": PERSON}}, [{"name": "a", "age": 1, "x": None}], [{"x": None}, {"name": "a", "y": 1}]),
    ({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
     [{"a": None}, {"b": None}, {"a": None, "b": None}], [{}, {"c": None}]),
    ({"allOf": [PERSON | {"additionalProperties": False}, {"properties": {"x": {}}}], "type": "object"}, [{"name": "a"}], [{"name": "a", "x": 1}]),
    ({"type": "object", "properties": {"o": {"allOf": [{"type": "object", "properties": {"p": {"type": "null"}}}, {"properties": {"q": {"type": "null"}}}]}}},
     [{"o": {"p": None, "q": None}}], [{"o": {"r": None}}]),
    ({"type": "object", "required": ["a"]}, [{"a": 1}, {"a": {"x": 1}}], [{}, {"a": 1, "b": 1}]),
    # patterns
    ({"type": "object", "patternProperties": {"^x-": {"type": "null"}}}, [{}, {"x-a": None, "x-b": None}], [{"y": None}, {"x-a": 1}]),
    ({"type": "object", "properties": {"x-a": {}, "b": {"type": "null"}}, "patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}},
     [{"x-a": 1, "b": None, "x-c": 2, "d": True}, {"x-c": 5}], [{"x-a": "s"}, {"x-c": True}, {"d": 5}]),
    ({"type": "object", "patternProperties": {"a": {"type": "integer"}, "b": {"type": "null"}}}, [{"a": 1, "b": None}], [{"a": None}, {"b": 1}]),
    # how many keys
    ({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}, "minProperties": 1, "maxProperties": 2},
     [{"a": None}, {"b": None, "c": None}], [{}, {"a": None, "b": None, "c": None}]),
    ({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2, "maxProperties": 3}, [{"a": None, "b": None}, {"a": None, "b": None, "c": None}],
     [{"a": None}, {"a": None, "b": None, "c": None, "d": None}]),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": True, "minProperties": 1}, [{"a": None}, {"b": 1}], [{}]),
    # arrays
    ({"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}], "items": False}, [[], [None], [None, 1]], [[1], [None, 1, 1]]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, [[None, 1], [None, 1, 2]], [[None], [None, 1, 2, 3], [1, 2]]),
    ({"type": "array", "items": [{"type": "null"}], "additionalItems": {"type": "integer"}}, [[None, 1, 2], []], [[1]]),
    ({"type": "array", "items": {"type": "null"}, "minItems": 70}, [[None] * 70], [[None] * 69, [None] * 71]), ({"type": "array", "items": {"type": "null"}, "maxItems": 1}, [[], [None]], [[None] * 2]),
    ({"type": "array", "items": False}, [[]], [[1]]), ({"type": "array", "maxItems": 0}, [[]], [[1]]), ({"allOf": [{"minItems": 1}, {"maxItems": 1}], "type": "array"}, [[1]], [[], [1, 2]]),
    # choices
    ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}, ["\"ab\"", None], ["\"abc\"", 5]), ({"type": ["string", "null"], "enum": ["a", None, 5]}, ["\"a\"", None], [5, "\"b\""]),
    ({"enum": [{"a": [1, "é"]}, "<[x", 1.5, True]}, [{"a": [1, "é"]}, "\"<[x\"", 1.5, True], [1, {"a": []}]), ({"const": None}, [None], [False]), ({"const": 1}, [1], [True, 12]),
    ({"enum": ["ab", "abc"], "minLength": 3}, ["\"abc\""], ["\"ab\""]), ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [3, 4]}]}, [3], [1, 4]),
    ({"type": ["integer", "string"], "const": 2}, [2], ["\"2\""]),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, [1, "\"a\""], [None]),
    ({"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "is"}, "$defs": {  # as pydantic writes a union
        name: {"type": "object", "properties": {"is": {"const": name}, name: {"type": "null"}}, "required": ["is"]} for name in ("cat", "dog")}},
     [{"is": "cat", "cat": None}, {"is": "dog"}], [{"is": "cow"}, {"is": "cat", "dog": None}]),
    ({"anyOf": [{"enum": [1]}, {"type": "integer"}, {"const": "a"}, {"type": "string"}]}, [1, 12, "\"a\"", "\"ab\""], [None]),
    # numbers
    ({"type": "number"}, [0, -1.5, "6.02e23", "1E-10", 1], ["01", "1.", "NaN", "1e999"]), ({"type": "integer"}, [0, -5, 10 ** 15], ["1.0", "1e3"]),
    ({"type": "integer", "minimum": 3}, [3, 10 ** 15], [2, -3]), ({"type": "number", "exclusiveMaximum": 0}, [-1, -0.5, "-12345.678"], [0, 1]),
    ({"type": "integer", "minimum": 10 ** 17}, [10 ** 17, 5 * 10 ** 17], [10 ** 16]), ({"type": "integer", "multipleOf": 5}, [5, -10], [6]),
    ({"type": "number", "minimum": 0, "maximum": 1}, [0, 1, 0.25, "0.12345678"], [1.1, -0.1]), ({"type": "number", "multipleOf": 0.01}, [0.25, 3], [0.255]),
    ({"allOf": [{"type": "number", "minimum": 1}, {"type": "integer", "maximum": 5}]}, [1, 5], [0, 6, 1.5]), ({"type": "integer", "format": "int32"}, [1], [1.5]),
    # bounds beyond what floats of 64 bits hold exactly
    ({"type": "integer", "minimum": -2**63, "maximum": 2**63 - 1}, [-2**63, 2**63 - 1, 0], [-2**63 - 1, 2**63, "-0"]), ({"type": "integer", "minimum": -2**63}, [-2**63, 5], [-2**63 - 1]),
    ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [2**64 - 1], [2**64, -1]), ({"type": "integer", "minimum": 2**53 + 1}, [2**53 + 1, 2**53 + 2], [2**53]),
    ({"type": "integer", "exclusiveMinimum": 2**53, "exclusiveMaximum": 2**53 + 3}, [2**53 + 1, 2**53 + 2], [2**53, 2**53 + 3]),
    ({"type": "integer", "minimum": 1.2, "maximum": 4.8}, [2, 4], [1, 5]), ({"type": "integer", "maximum": 4.483347973012577e+18}, [4483347973012576768], [4483347973012577000]),
    ({"type": "number", "maximum": 2**63 - 1}, [1, "9223372036854774784.0"], ["9223372036854775807.0"]), ({"type": "number", "exclusiveMaximum": 2**53}, ["9007199254740991.0"], ["9007199254740991.99999999"]),
    ({"type": "number", "minimum": 1e-9}, ["0.000000001", 0.5, 3], [0, "0.0000000009"]), ({"type": "number", "minimum": 1e-9, "maximum": 1e-6}, ["0.000000001", "0.0000005"], [0, 0.5]),
    ({"type": "number", "exclusiveMinimum": 1e-9}, ["0.00000001"], ["0.000000001"]), ({"type": "number", "maximum": 1.797e308}, [1, -2.5], []),
    ({"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}, [1, "-2.5e30"], []), ({"type": "number", "minimum": 1.0000000000000002, "maximum": 1.0000000000000002}, ["1.0000000000000002"], [1]),
    ({"type": "number", "minimum": 0.1, "exclusiveMinimum": True}, [0.2, "0.10000001"], [0.1]), ({"type": "number", "minimum": -1.5, "maximum": -0.25}, [-1.5, -0.25, -1, "-0.30"], [-1.51, -0.2, 0, 0.5]),
    ({"type": "number", "minimum": 1, "maximum": 1}, [1, "1.0"], [1.1, 0]), ({"enum": [1, 2.5, 2**53 + 1, "a"], "minimum": 2, "maximum": 2**53}, [2.5, '"a"'], [1, 2**53 + 1]), ({"enum": [10, 15], "multipleOf": 10}, [10], [15]),
    ({"type": "integer", "multipleOf": 5, "minimum": 10, "maximum": 10}, [10], [5, 11, 15]), ({"type": "integer", "multipleOf": 0.01}, [1], []), ({"type": "number", "multipleOf": 0.5, "minimum": 1}, [1.5], [0.5, 1.25]),
    # what says nothing, and what says that nothing fits
    (True, [1, {"a": 1}], []), ({"not": False}, [1, None], []), ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}}, [{"a": 1}, {}], [{"a": "b"}]),
    *(({"type": "object", name: value}, [{}, {"a": 1}], [1]) for name, value in (
        ("propertyNames", True), ("propertyNames", {}), ("dependentRequired", {}), ("dependentSchemas", {"a": True}), ("dependencies", {"a": []}), ("unevaluatedProperties", True), ("not", {"not": {}}), ("then", False))),
    *(({"type": "array", **said}, [[], [1]], [1]) for said in ({"uniqueItems": True, "maxItems": 1}, {"uniqueItems": False}, {"contains": {}, "minContains": 0}, {"minContains": 3}, {"unevaluatedItems": {}},
                                                              {"uniqueItems": True, "prefixItems": [{}], "items": False})),
    ({"type": "string", "uniqueItems": True, "contains": False, "dependentRequired": {"a": ["b"]}}, ['"a"'], [1]), ({"if": {"type": "string"}}, [1], []),
    ({"type": "object", "required": ["b"], "dependentRequired": {"a": ["b"]}, "properties": {"a": {}, "b": {}}}, [{"a": 1, "b": 2}, {"b": 1}], [{"a": 1}]),
    ({"type": "object", "properties": {"a": {"not": {}}, "b": {}}}, [{"b": 1}, {}], [{"a": 1}]), ({"anyOf": [{"type": "null"}, {"not": {}}]}, [None], [1]),
    ({"type": "object", "unevaluatedProperties": False, "allOf": [{"properties": {"a": {}}}]}, [{"a": 1}, {}], [{"b": 1}]), ({"type": "object", "unevaluatedProperties": False}, [{}], [{"b": 1}]),
    ({"type": "array", "prefixItems": [{}], "unevaluatedItems": False}, [[], [1]], [[1, 2]]),
    # the names of keys
    ({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}}, [{"a": 1, "b": 2}, {"b": 1}, {}], [{"c": 1}, {"a": "x"}]),
    ({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "required": ["a", "b"]}, [{"a": 1, "b": 2}], [{"a": 1}, {}]), ({"type": "object", "propertyNames": False}, [{}], [{"a": 1}]),
    ({"type": "object", "propertyNames": {"pattern": "^x"}, "additionalProperties": {"type": "null"}}, [{"xa": None, "xb": None}], [{"ax": None}, {"xa": 1}]),
    ({"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}, "properties": {"a": {}, "ab": {}}, "additionalProperties": {}}, [{"ab": 1, "abc": 2}], [{"a": 1}, {"abcd": 1}]),
    ({"type": "object", "propertyNames": {"anyOf": [{"const": "q"}, {"pattern": "^x"}]}, "patternProperties": {"^x1": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
     [{"q": 1, "x2": 2}, {"x1": None}], [{"r": 1}, {"x1": 1}]),
    ({"type": "object", "propertyNames": {"format": "ipv4"}, "additionalProperties": {}}, [{"127.0.0.1": 1}], [{"127.0.0": 1}]),
    ({"type": "object", "propertyNames": {"$ref": "#/$defs/n"}, "$defs": {"n": {"pattern": "^n"}}}, [{"n1": 1}], [{"m": 1}]),
    # patterns of keys that are declared too
    ({"type": "object", "properties": {"x-a": {"type": "integer"}}, "patternProperties": {"^x-": {"type": "integer"}, "a$": {"minimum": 5}}}, [{"x-a": 7}, {"x-b": 1}], [{"x-a": 1}]),
    ({"type": "object", "properties": {"x-a": {}, "b": {}}, "required": ["x-a"], "patternProperties": {"^x-": {"type": "integer"}, "-": {"maximum": 9}, "a": {"minimum": 3}}}, [{"x-a": 5, "b": 1}], [{"x-a": 1}, {"x-a": 12}, {"b": 1}]),
    # texts
    ({"type": "string", "minLength": 1, "maxLength": 3}, ["\"abc\"", "\"é\\n\\\"\""], ["\"\"", "\"abcd\""]), ({"type": "string", "pattern": "^a+$", "maxLength": 3}, ["\"aaa\""], ["\"aaaa\"", "\"b\""]),
    *(({"type": "string", "format": name}, ["\"any\""], []) for name in ("password", "binary", "path", "x")),
    ({"type": "string", "format": "path", "maxLength": 2}, ["\"ab\""], ["\"abc\""]), ({"type": "string", "format": "date"}, ["\"2026-11-22\""], ["\"today\""]),
    # references
    ({"$id": "https://a.b/c", "$ref": "https://a.b/c#/$defs/x", "$defs": {"x": {"type": "null"}}}, [None], [1]),
    ({"$ref": "#x", "$defs": {"y": {"$anchor": "x", "type": "null"}}}, [None], [1]), ({"$ref": "urn:x", "$defs": {"y": {"$id": "urn:x", "type": "null"}}}, [None], [1]),
    ({"type": "array", "items": {"$ref": "#/prefixItems/0"}, "prefixItems": [{"type": "null"}]}, [[None, None]], [[1]]),
    ({"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": {"type": "null"}}}, [None], [1]),
    ({"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["v"]}, [{"v": 1, "next": {"v": 2, "next": None}}], [{"next": None}]),
    # what nothing fits is left out
    ({"type": "object", "properties": {"a": False, "b": {"type": "null"}}}, [{"b": None}, {}], [{"a": 1}]), ({"anyOf": [{"type": "integer", "enum": ["a"]}, {"type": "null"}]}, [None], ["\"a\""])])
def test_a_grammar_has_only_declared_keys(schema, allowed, refused):
    """A schema's grammar has its values and declared keys only."""
    assert [value for value in allowed if not fits(schema, value)] == [] and [value for value in refused if fits(schema, value)] == []


NESTED = {"type": "array", "items": {"$ref": "#"}}


@pytest.mark.parametrize("schema, text, most", [
    ({"type": "integer"}, "9" * 99, 16), ({"type": "integer"}, "-" + "9" * 99, 17), ({}, "9" * 99, 16), ({"type": "number"}, "9" * 99, 16),
    ({"type": "number"}, "1." + "9" * 99, 18), ({"type": "number"}, "1e" + "2" * 99, 5), ({"type": "number"}, "1e-" + "1" * 99, 6), ({"type": "number"}, "1.5E+" + "1" * 99, 8),
    ({"type": "integer", "minimum": 1}, "9" * 99, 16), ({"type": "integer", "maximum": 5}, "-" + "9" * 99, 17), ({"type": "number", "minimum": 0}, "8" * 99, 16),
    ({"type": "number", "minimum": 0}, "5." + "9" * 99, 18), ({"type": "number", "minimum": 0, "maximum": 1}, "0." + "0" * 99, 18), ({"type": "integer", "multipleOf": 3}, "9" * 99, 16),
    ({"type": "array", "items": {"enum": [1]}}, f"[{'1, ' * 99}", 1 + 3 * 63 + 1), ({"type": "array", "prefixItems": [{"enum": [1]}] * 2}, f"[{'1, ' * 99}", 1 + 3 * 63 + 1),
    ({}, f"[{'1, ' * 99}", 1 + 3 * 63 + 1), ({"type": "object"}, "{" + '"a": 1, ' * 99, 8 * 64 - 1), ({"type": "object"}, '{"' + "a" * 999, 66),
    ({"type": "object", "properties": {"z": {}}, "additionalProperties": True}, "{" + '"a": 1, ' * 99, 8 * 64 - 1), ({}, "[" * 99, 16), ({}, '{"a": ' * 99, 16 * 6),
    ({"type": "string", "maxLength": 5}, '"' + "é" * 99, 11), *(({"type": "string", "maxLength": 5, "pattern": pattern}, '"' + "a" * 99, 6) for pattern in ("a*", "^a+$", "a")),
    ({"type": "string", "format": "time"}, '"12:00:00.' + "1" * 99, 33), ({"type": "string", "format": "email"}, '"' + "a" * 999, 255), ({"type": "string", "format": "duration"}, '"P' + "1" * 99, 65),
    *((schema, before + " " * 99, len(before) + most) for schema, before, most in ((NESTED, "[", 0), (NESTED, "[[],", 1), ({"type": "object"}, '{"a":', 1), (PERSON, '{"name": "a",', 1),
                                                                                  (PERSON, '{"name"', 0), (PERSON, "", 0)))])
def test_what_a_schema_leaves_open_is_bounded(schema, text, most):
    assert taken(schema, text)[0] <= most


@pytest.mark.parametrize("schema, said", [
    *((schema, f"{name} is not supported") for name, schema in (
        ("not", {"not": {"type": "null"}}), ("if", {"if": {"type": "string"}, "then": {"minLength": 1}}), ("uniqueItems", {"type": "array", "uniqueItems": True}),
        ("uniqueItems", {"uniqueItems": True, "maxItems": 2}), ("dependentRequired", {"dependentRequired": {"a": ["b"]}}), ("dependencies", {"dependencies": {"a": {"required": ["b"]}}}),
        ("contains", {"type": "array", "contains": False}), ("contains", {"contains": {"type": "null"}, "minContains": 0, "maxContains": 1}))),
    ({"type": "object", "properties": {"a": {"not": {}}}, "required": ["a"]}, "no value satisfies it"), (False, "no value satisfies it"), ({"not": True}, "no value satisfies it"),
    ({"type": "object", "propertyNames": {"minLength": 2}, "required": ["a"]}, "no value satisfies it"), ({"type": "object", "propertyNames": False, "minProperties": 1}, "no value satisfies it"),
    ({"type": "number", "minimum": "5"}, 'minimum must be a finite number, not "5"'), ({"type": "number", "multipleOf": 0}, "multipleOf must be above 0"),
    ({"type": "number", "minimum": 1e300, "maximum": 1.797e308}, "more than 64 digits"), ({"type": "integer", "minimum": 2**53 + 1, "multipleOf": 5}, r"beyond 2\*\*53"), ({"oneOf": [{"type": "integer"}, {"minimum": 1}]}, "oneOf must exclude each other"), ({"$ref": "#/nope"}, "leads nowhere"),
    ({"$ref": "#"}, "too many schemas"), ({"enum": []}, "no value satisfies it"), ({"type": []}, "no value satisfies it"), ({"type": "string", "minLength": 3, "maxLength": 2}, "no value satisfies it"),
    ({"minItems": 3, "maxItems": 2, "type": "array"}, "no value satisfies it"), ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "no value satisfies it"),
    ({"const": [1e999]}, "not finite"), ({"minItems": -1}, "minItems must be an integer"),
    ({"allOf": [{"anyOf": [{}, {"type": "null"}]}] * 16}, "too many schemas"), ({"enum": ["x" * 70_000]}, "at most 65536 characters")])
def test_an_impossible_schema_is_refused_with_why(schema, said):
    """A schema that no grammar can follow is refused with the reason."""
    with pytest.raises(RequestError, match=said) as refused:
        matcher_of(schema)
    assert refused.value.code == "invalid_json_schema"


@pytest.mark.parametrize("keyword", ["pattern", "patternProperties", "propertyNames"])
@pytest.mark.parametrize("pattern, reason", [("(ab", "unclosed group"), ("[a-", "unclosed character class"), ("(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
                                             ("a\\", "it ends within an escape"), ("a{3,1}", "invalid repetition count range"), (r"\cA", "unrecognized escape sequence")])
def test_an_unreadable_pattern_is_named_with_why(keyword, pattern, reason):
    schema = {"pattern": {"pattern": pattern}, "patternProperties": {"patternProperties": {pattern: {}}}, "propertyNames": {"propertyNames": {"pattern": pattern}}}[keyword]
    with pytest.raises(RequestError) as refused:
        matcher_of(schema | {"type": "string" if keyword == "pattern" else "object"})
    assert f"the pattern {json.dumps(pattern)} cannot be read: {reason}" in str(refused.value)


def test_every_known_format_is_enforced_and_ends():
    for name in FORMATS:
        assert not fits({"type": "string", "format": name}, '"#"')
    assert all(not fits({"type": "string", "format": name}, '"' + "1" * 400 + '"') for name in FORMAT_LENGTHS)


def test_a_small_schema_that_says_much_costs_little(monkeypatch):
    from chatlm.common.text.schemas import SchemaForms
    spent, spend = [], SchemaForms.spend
    monkeypatch.setattr(SchemaForms, "spend", lambda self, count=1: spent.append(count) or spend(self, count))
    often = [{"$ref": "#/$defs/e"}] * 60
    for schema in ({"properties": {f"p{number}": {"allOf": often, "minLength": number} for number in range(600)}, "$defs": {"e": {"pattern": "/" * 50_000}}},
                   {"$defs": {"e": {"anyOf": often}}, "$ref": "#/$defs/e"}, {"allOf": often, "$defs": {"e": {"anyOf": [{"minLength": number} for number in range(50)]}}},
                   {"oneOf": often, "$defs": {"e": {"oneOf": [{"const": number} for number in range(300)]}}}):
        with pytest.raises(RequestError, match="too many schemas|at most 65536 characters|nested too deeply"):
            json_grammar(schema, "x")
    assert len(spent) < 40_000


class Schemas:
    """Random schemas, most of which some value fits."""

    def __init__(self, seed):
        self.random, self.definitions = random.Random(seed), {}

    def root(self):
        schema = self.schema(3)
        return schema | {"$defs": self.definitions} if self.definitions else schema

    def schema(self, depth):
        choose = self.random.choice
        simple = [self.text, self.number, lambda: {"enum": self.random.sample(["a", "b c", 1, 2.5, None, True, [1], {"k": "v"}], 3)}, lambda: {"type": choose(["boolean", "null"])},
                  lambda: {"const": choose(["x", 5, None, {"a": [1]}])}]
        nested = [self.object, self.array, self.object, self.any_of, self.all_of, self.reference]
        make = choose(simple + nested) if depth else choose(simple)
        return make(depth - 1) if make in nested else make()

    def text(self):
        choose = self.random.choice
        schema = {"type": "string"} | choose([{"maxLength": 4}, {"minLength": 2, "maxLength": 9}, {"pattern": "^[a-c]{1,3}$"}, {"format": choose([*FORMATS, "password"]), "maxLength": 60},
                                              {"pattern": "x", "maxLength": 6}])
        return schema | choose([{}, {"title": "a text"}])

    def number(self):
        low = self.random.randint(-50, 50)
        low = self.random.choice([low, low, low / 8, low * 2**58 + 1, low * 1e-9])
        bounds = {"minimum": low, "maximum": low + self.random.randint(0, 200), "exclusiveMinimum": low - 1, "multipleOf": self.random.choice([1, 3, 7, 0.5])}
        names = self.random.sample(list(bounds), self.random.randint(0, 2))
        return {"type": self.random.choice(["integer", "number"]), **{name: bounds[name] for name in names}}

    def object(self, depth):
        names = self.random.sample(["a", "b", "name", "x-y", "ä"], self.random.randint(0, 4))
        schema = {"type": "object", "properties": {name: self.schema(depth) for name in names}}
        more = {"required": self.random.sample(names, self.random.randint(0, len(names))), "additionalProperties": self.random.choice([False, True, self.schema(0)]),
                "patternProperties": {"^p": self.schema(0), "a": self.schema(0)}, "maxProperties": self.random.randint(1, 4),
                "propertyNames": self.random.choice([{"maxLength": 3}, {"pattern": "^[a-p]"}, {"enum": ["a", "name", "q"]}])}
        return schema | {name: more[name] for name in self.random.sample(list(more), self.random.randint(0, 2))}

    def array(self, depth):
        more = {"minItems": self.random.randint(0, 2), "maxItems": self.random.randint(2, 4), "prefixItems": [self.schema(depth)], "items": self.schema(depth)}
        return {"type": "array", **{name: more[name] for name in self.random.sample(list(more), self.random.randint(1, 4))}}

    def any_of(self, depth):
        return {"anyOf": [self.schema(depth) for _ in range(self.random.randint(1, 3))]}

    def all_of(self, depth):
        one, other = self.object(depth), self.object(depth)
        other["properties"] = {f"{name}2": value for name, value in other["properties"].items()}
        return {"allOf": [{name: value for name, value in schema.items() if name in ("type", "properties", "maxProperties")} for schema in (one, other)]}

    def reference(self, depth):
        name = f"d{len(self.definitions)}"
        self.definitions[name] = {}
        self.definitions[name] = self.schema(depth)
        return {"$ref": f"#/$defs/{name}"}


def drawn(matcher, chance, most):
    """A text that the grammar takes, drawn byte by byte; a quote comes in one of four places where it may."""
    import numpy
    text = bytearray()
    while len(text) < most and not matcher.is_stopped():
        allowed = numpy.unpackbits(numpy.frombuffer(matcher.compute_bitmask(), numpy.uint8), bitorder="little").nonzero()[0]
        letters = [int(token) for token in allowed if token < 256]
        if not letters or matcher.is_accepting() and chance.random() < 0.5:
            break
        letter = QUOTE if QUOTE in letters and chance.random() < 0.25 else chance.choice(letters)
        assert matcher.consume_token(letter)
        text.append(letter)
    assert matcher.is_accepting(), text
    return text.decode()


def check_random_schemas(seeds):
    jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")
    refused = 0
    for seed in seeds:
        schema = Schemas(seed).root()
        validator = jsonschema.Draft202012Validator(schema, format_checker=None)
        try:
            compiled(json.dumps(schema))
        except RequestError as error:
            refused += 1
            assert "satisf" in str(error) or "beyond 2**53" in str(error), (schema, str(error))
            continue
        for turn in range(3):
            text = drawn(matcher_of(schema), random.Random(seed * 10 + turn), 20_000)
            assert not (wrong := [*validator.iter_errors(json.loads(text))]), (seed, schema, text, wrong)
    assert refused <= len(seeds) // 4, refused


def test_random_texts_follow_their_random_schemas():
    check_random_schemas(range(30))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_texts_follow_very_many_random_schemas():
    check_random_schemas(range(100, 3000))


@pytest.mark.parametrize("whole", [False, True])
def test_a_number_pattern_keeps_random_bounds(whole):
    """A number of the pattern is within the bounds as a reader of JSON sees it, with floats of 64 bits; those of few digits that are within them are in the pattern."""

    from decimal import Decimal

    from chatlm.common.text.number_ranges import bounds_of, number_pattern
    chance = random.Random(5)
    kinds = [lambda: chance.randint(-300, 300), lambda: round(chance.uniform(-20, 20), chance.randint(1, 4)), lambda: chance.uniform(-1, 1) * 10**chance.randint(-12, 20),
             lambda: chance.choice([0, 2**53, -2**63, 2**63 - 1, 10**17, 1e-9, 0.1]), lambda: chance.randint(-10**20, 10**20)]
    for _ in range(1500 if WHOLE else 300):
        low, high = sorted((chance.choice(kinds)(), chance.choice(kinds)()))
        schema = {chance.choice(["minimum", "exclusiveMinimum"]): low, chance.choice(["maximum", "exclusiveMaximum"]): high}
        schema.pop(chance.choice([*schema, None]), None)
        pattern = number_pattern(bounds_of([schema], whole), 0 if whole else None)
        edges = [Decimal(repr(bound)) + Decimal(step) for bound in (low, high, 0, 5, -5) for step in ("0", "1", "-1", "0.5", "-0.5", "1e-8", "-1e-8")]
        for text in {f"{round(edge, places):f}" for edge in edges for places in (0, 1, 3, 8)}:
            number, exact = json.loads(text), Decimal(text)
            if text.startswith("-0") and number == 0 or whole and "." in text:
                continue
            allowed = [value >= schema.get("minimum", value) and value > schema.get("exclusiveMinimum", -math.inf) and value <= schema.get("maximum", value)
                       and value < schema.get("exclusiveMaximum", math.inf) for value in (number, Fraction(text))]
            matches = bool(pattern and re.fullmatch(pattern, text))
            assert not matches or allowed[0], (schema, text, pattern)
            is_short = exact.adjusted() < 15 and len(text) < 15
            assert matches or not all(allowed) or not is_short, (schema, text, pattern)
