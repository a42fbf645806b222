"""Whole conversations of coding agents (tests/fixtures/agents/conversations) at the level of prompts: each turn begins with all of the prompt before it.

The prompts are those of a template like Qwen2.5's, in the default model's tokens. What is computed anew is what the prefix cache cannot have."""

import json
import re
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

import chat_server
from agent_conversations import SIGN, conversations, hidden, packed, prose, unpacked
from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Known
from chatlm.common.text.load import open_tokenizer
from chatlm.front.api.reading import read_answer
from engines import load
from fake_pool import serving
from scripted_pool import ScriptedPool

TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n\\nYou may call these functions:\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools>\\n\\nCall one as <tool_call>\\n{}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif not (loop.first and m.role == 'system') %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}{{- c.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
RECORDED = [pytest.param(name, program, rows, id=name) for name, program, rows in conversations()]
DOCUMENT = Path(chat_server.__file__).parent / "docs/api/agents.md"


@pytest.fixture(scope="module")
def tokenizer(default_model_path):
    return open_tokenizer(replace(load(default_model_path).text, system=None, chat_template=TEMPLATE))


def requests_of(rows, tokenizer):
    """What the model is asked in the main conversation, which has tools."""
    known = Known(Settings(seed=1), tokenizer.tool_format, template=TEMPLATE, native_tools=True)
    read = [read_answer(row["path"].partition("?")[0], row["body"], known).request for row in rows if row["body"]]
    return [request for request in read if request.params.tool_names]


def prompts_of(rows, tokenizer):
    return [tokenizer.render(request.messages, request.tools, request.template_options) for request in requests_of(rows, tokenizer)]


def common(first, second):
    """How many tokens two prompts begin with alike."""
    pairs = zip(first, second)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def test_three_agents_are_recorded():
    assert [program for _, program, _ in conversations()] == ["Claude Code 2.1.332", "Codex 0.171.0", "opencode 1.18.33"]


@pytest.mark.parametrize("name, program, rows", RECORDED)
def test_a_turn_begins_with_the_whole_prompt_before_it(name, program, rows, tokenizer):
    prompts = prompts_of(rows, tokenizer)
    assert len(prompts) >= 5
    for before, after in zip(prompts, prompts[1:]):
        assert common(before, after) == len(before), tokenizer.show(after[common(before, after) - 20:][:60])


@pytest.mark.parametrize("name, program, rows", RECORDED)
def test_the_document_says_how_many_tokens_each_turn_computes(name, program, rows, tokenizer):
    """In its table, a row for each program: those of the first prompt, and what each later turn computes anew."""
    lengths = [len(prompt) for prompt in prompts_of(rows, tokenizer)]
    anew = [after - before for before, after in zip(lengths, lengths[1:])]
    table = DOCUMENT.read_text().partition("computed anew in each later turn")[2]
    row = next(line for line in table.splitlines() if line.startswith(f"| {program} |"))
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", row.split("|", 2)[2])]
    assert numbers == [lengths[0], *anew], [lengths[0], *anew]


def test_claude_code_finds_tools_and_keeps_its_head(tokenizer):
    [rows] = [rows for name, _, rows in conversations() if name == "claude"]
    requests = requests_of(rows, tokenizer)
    assert len({json.dumps(request.tools) for request in requests}) == 1
    found = [[tool["function"]["name"] for message in request.messages for tool in message.tools] for request in requests]
    assert found == [[]] + [["WebFetch", "NotebookEdit"]] * 5
    assert all("WebFetch" in request.params.tool_names for request in requests[1:]) and "WebFetch" not in requests[0].params.tool_names
    assert not any("DeferredToolPlaceholder" in request.params.tool_names for request in requests)


@pytest.mark.parametrize("name, program, rows", RECORDED)
async def test_no_request_of_a_conversation_is_refused(name, program, rows):
    pool = ScriptedPool("Yes.")
    pool.prompts.context_length = 1 << 20
    async with serving(pool) as url, aiohttp.ClientSession() as http:
        for row in rows:
            if row["body"]:
                async with http.post(url + row["path"], json=row["body"], headers=row["headers"]) as answer:
                    assert answer.status == 200, await answer.text()
                    body = await answer.read()
                    assert b'"error": {' not in body and b"event: error" not in body


def test_recorded_words_are_others_of_the_same_length():
    sent = {"system": "This is a long text of somebody.\nIt has lines.\nThis is a long text of somebody.", "name": "short", "arguments": json.dumps({"a": "x" * 50, "b": 1})}
    kept = hidden(sent)
    assert kept["system"].startswith(SIGN) and "somebody" not in json.dumps(kept) and kept["name"] == "short"
    again = prose(kept)
    assert [len(line) for line in again["system"].split("\n")] == [len(line) for line in sent["system"].split("\n")] and again["system"] != sent["system"]
    assert again["system"].split("\n")[0] == again["system"].split("\n")[2] and prose(kept) == again
    assert json.loads(again["arguments"])["b"] == 1 and len(json.loads(again["arguments"])["a"]) == 50
    rows = [{"tools": [kept] * 3, "n": number} for number in range(3)]
    assert unpacked(*packed(rows)) == rows and len(json.dumps(packed(rows))) < len(json.dumps(rows)) / 3
