"""Coding agents' first requests (tests/fixtures/agents) are read whole by a tiny model's real server."""

import pytest

from agent_requests import agents, asked, check_whole, requests_of_agents
from real_server import server
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

TEMPLATE = """{% if tools %}{{ tools | tojson }} <tool_call></tool_call>{% endif %}
{% for message in messages %}
{{ message.role }}: {{ message.content }}{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}"""
CONTEXT = 65_536
# The fields without an effect here: they are for reasoning, caches and accounts of the makers' own services
IGNORED = {
    "codex": {
        "reasoning.summary", "include.reasoning.encrypted_content", "client_metadata"},
    "claude": {
        "thinking.type", "thinking.display", "output_config.effort", "context_management", "metadata"}}
IGNORED_TOOLS = {"codex": {"namespace", "web_search"}}      # of several agents; run at the maker


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    numbers = LLAMA_NUMBERS | {"llama.context_length": CONTEXT}
    metadata = small_gguf_metadata("gpt-2", **{"tokenizer.chat_template": TEMPLATE})
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    path.write_bytes(gguf_bytes({**numbers, **metadata}, random_llama(numbers=numbers)))
    with server(path) as (_, at):
        yield at


def words(headers, name):
    return {word for word in headers.get(name, "").split(", ") if word}


def test_six_agents_are_recorded():
    names = [name for name, _, _ in agents()]
    assert names == ["aider", "claude", "codex", "continue", "opencode", "qwen-code"]


@pytest.mark.parametrize("name, request_", requests_of_agents())
def test_a_request_is_read_whole(url, name, request_):
    """Nothing of it is refused; what has no effect is known, and named in the answer's headers."""
    status, headers, answer = asked(url, request_, most=4)
    assert status == 200, answer
    if request_["body"]:
        assert words(headers, "X-Ignored-Fields") == IGNORED.get(name, set())
        assert words(headers, "X-Ignored-Tools") == IGNORED_TOOLS.get(name, set())
        check_whole(request_, answer)
