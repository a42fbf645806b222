"""Bodies with hundreds of functions: what is made of each in the event loop is bounded."""

import pytest

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.common.text import grammar
from patching import patch
from sent_bodies import HI, parsed


def functions(count, **more):
    return [{"type": "function", "function": {"name": f"f{index}", "parameters": {"type": "object"}, **more}} for index in range(count)]


def test_so_many_may_be_strict():
    most = LIMITS.strict_functions
    parsed("/v1/chat/completions", {"messages": HI, "tools": [*functions(most, strict=True), *functions(200, name="g")]})
    with pytest.raises(RequestError, match=f"strict functions: {most + 1} given, at most {most} allowed"):
        parsed("/v1/chat/completions", {"messages": HI, "tools": functions(most + 1, strict=True)})


def test_a_grammar_that_is_too_large_is_not_made_to_its_end(monkeypatch):
    """A call is required, so all functions are in one grammar."""
    made = []

    class Counted(grammar.SchemaRules):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)
    patch(monkeypatch, grammar, "SchemaRules", Counted)
    body = {"messages": HI, "tools": functions(3000), "tool_choice": "required"}
    with pytest.raises(RequestError, match="as a grammar it must have at most"):
        parsed("/v1/chat/completions", body)
    assert 0 < len(made) < 1500
