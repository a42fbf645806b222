"""What leaves this process is JSON that everybody reads, whatever numbers are in it."""

import json
import math

import pytest

from chatlm.common.jsontext import as_json, dump, read_json, strict_json
from chatlm.front.api.encode import frame
from chatlm.front.server.responses import json_response
from chatlm.front.tools.rules import BAD_ARGUMENTS, arguments_of, why_not_run

BAD = [math.nan, math.inf, -math.inf, [1, [math.inf]], {"x": {"y": (math.nan, 2)}}, {math.inf: 1}]


@pytest.mark.parametrize("value", BAD, ids=str)
def test_nothing_is_written_that_json_does_not_have(value):
    texts = as_json(value), dump(value).decode(), json_response(value).body.decode()
    for text in (*texts, frame(value).decode().removeprefix("data: ")):
        json.loads(text, parse_constant=pytest.fail)
        assert "null" in text
    with pytest.raises(ValueError):
        strict_json(value)


@pytest.mark.parametrize("value", [1.5, [], {"a": (1, 2)}, "NaN", 10 ** 400, -0.0, True, None], ids=str)
def test_other_values_are_written_as_before(value):
    assert as_json(value) == json.dumps(value, ensure_ascii=False)


def test_what_refers_to_itself_is_still_an_error():
    value = []
    value.append(value)
    with pytest.raises((ValueError, RecursionError)):
        as_json(value)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"x": -Infinity}', '{"x": [1e400]}', "-1e999", '{"x": NaN}'])
def test_nothing_is_read_that_json_does_not_have(text):
    """The arguments of a model's call among them: it is told to write others."""
    with pytest.raises(ValueError):
        read_json(text)
    assert arguments_of(text) is None and why_not_run("f", text, []) == BAD_ARGUMENTS


@pytest.mark.parametrize("text, value", [("1e300", 1e300), ('{"x": [0.5, 1e-400]}', {"x": [0.5, 0.0]})])
def test_other_numbers_are_read(text, value):
    assert read_json(text) == value
