"""Fields that several APIs have mean the same in each: efforts, a response format without members."""

import json
from types import SimpleNamespace

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import Known
from chatlm.common.text.formats import CALL_FORMATS
from chatlm.common.text import load
from chatlm.front.api.field_types import EFFORTS
from chatlm.front.api.reading import read_answer
from real_server import post

KNOWN = Known(Settings(), "tagged")
ASK = [{"role": "user", "content": "Hi"}]
PLACES = {
    "reasoning_effort": lambda value: read_answer(
        "/v1/chat/completions", {"messages": ASK, "reasoning_effort": value}, KNOWN),
    "reasoning.effort": lambda value: read_answer(
        "/v1/responses", {"input": "Hi", "reasoning": {"effort": value}}, KNOWN),
    "output_config.effort": lambda value: read_answer(
        "/v1/messages", {"messages": ASK, "max_tokens": 9, "output_config": {"effort": value}}, KNOWN),
    "think": lambda value: read_answer("/api/chat", {"messages": ASK, "think": value}, KNOWN)}


@pytest.mark.parametrize("place", PLACES)
def test_every_api_knows_the_same_efforts(place):
    for effort in EFFORTS:
        assert PLACES[place](effort).request.template_options == {"reasoning_effort": effort}
    for wrong in "maximal", "MAX", "", ["max"]:
        with pytest.raises(RequestError) as refused:
            PLACES[place](wrong)
        said = str(refused.value)
        assert f"{place} must be " in said and "xhigh, max or a number" in said
        assert "maximal" in said or wrong != "maximal"


@pytest.mark.parametrize("name, template, word", [
    (None, "{{ reasoning_effort }}", "xhigh"), (None, "{% if reasoning_effort == 'max' %}", "max"),
    ("harmony", "", "high"), ("mistral settings", "", "high"), ("qwen tags", "", "xhigh")])
def test_max_becomes_the_highest_word_of_a_template(name, template, word):
    call_format = CALL_FORMATS[name] if name else SimpleNamespace(efforts={})
    tokenizer = SimpleNamespace(call_format=call_format, spec=SimpleNamespace(chat_template=template))
    owner = next(each for each in vars(load).values() if hasattr(each, "_effort_word"))
    assert owner._effort_word(tokenizer, "max") == word


@pytest.mark.parametrize("path, absent, field", [
    ("/v1/chat/completions", {"messages": ASK}, {"response_format": {}}),
    ("/v1/responses", {"input": "Hi"}, {"text": {"format": {}}}),
    ("/v1/messages", {"messages": ASK, "max_tokens": 9}, {"output_config": {"format": {}}}),
    ("/v1/messages", {"messages": ASK, "max_tokens": 9}, {"output_format": {}})])
def test_a_format_without_members_is_as_if_absent(path, absent, field):
    assert read_answer(path, absent, KNOWN).request.params.grammar == ""
    assert read_answer(path, absent | field, KNOWN).request.params.grammar == ""


def test_an_input_is_cut_at_truncate_prompt_tokens(default_url):
    text = "The cat sat on the mat, and a kitten rested on a rug."
    tokens = json.load(post(default_url + "/tokenize", {"content": text}))["tokens"]

    def vector(**body):
        answer = json.load(post(default_url + "/v1/embeddings", {"model": "default", **body}))
        return answer["usage"]["prompt_tokens"], answer["data"][0]["embedding"]
    assert vector(input=text, truncate_prompt_tokens=5) == vector(input=tokens[:5])
    assert vector(input=text, truncate_prompt_tokens=1000) == vector(input=text)
    assert vector(input=text, truncate_prompt_tokens=-1) == vector(input=text)
