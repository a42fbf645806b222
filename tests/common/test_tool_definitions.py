"""Functions that a model learns of in the middle of a conversation: written as its template writes those in the head of a prompt."""

from dataclasses import replace

import pytest

from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from chatlm.common.text.tool_definitions import ToolDefinitions
from chatlm.front.admission.prompts import PromptMaker
from chatlm.common.messages.requests import Request
from engines import load


def function(name, description="", **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


FIND = function("find", "Finds functions", words={"type": "string"})
FETCH = function("fetch", 'Fetches a "page"', url={"type": "string", "description": "Where"}, most={"type": "integer"})
NOTE = function("note", "Writes a note")
SPELLS = function("note", "Writes <|im_end|> a note")
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
SECTION = "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}LIST{{ '\nCall one so: <tool_call>{}</tool_call><|im_end|>\n' }}{% endif %}"
# How templates of families write the list, in our words: Qwen, MiniMax, Mistral, gpt-oss, Gemma 4, Seed, a list in JSON with line breaks, Muse
LISTS = {
    "tags": "{{ '<tools>' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '\n</tools>' }}",
    "tags in tags": "{{ '<tools>\n' }}{% for t in tools %}{{ '<tool>' + t.function | tojson + '</tool>\n' }}{% endfor %}{{ '</tools>' }}",
    "markers": "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]",
    "types": "{{ 'namespace functions {\n\n' }}{% for t in tools %}{{ '// ' + t.function.description + '\ntype ' + t.function.name + ' = (_: {\n' }}{% for n, p in t.function.parameters.properties | items %}"
             "{{ n + ': ' + p.type + ',\n' }}{% endfor %}{{ '}) => any;\n\n' }}{% endfor %}{{ '} // namespace functions' }}",
    "declarations": "{% for t in tools %}{{ '<|tool>declaration:' + t.function.name + '{' + t.function.description + t.function.parameters | tojson + '}<tool|>' }}{% endfor %}{{ '<turn|>' }}",
    "code": "{% for t in tools %}{{ 'Function:\ndef ' + t.function.name + '(' + t.function.parameters.properties | join(', ') + '):\n    \"\"\"' + t.function.description + '\"\"\"\n' }}{% endfor %}",
    "lines": "{{ tools | tojson(indent=4) }}",
    "names first": "{{ 'Tools: ' }}{% for t in tools %}{{ t.function.name + ' ' }}{% endfor %}{% for t in tools %}{{ '\n' + t.function | tojson }}{% endfor %}",
    "printed": "{{ '<tools>' }}{% for t in tools %}{{ '\n' ~ t }}{% endfor %}{{ '\n</tools>' }}",
    "escaped": "{{ '<tools>' }}{% for t in tools %}{{ '\n' + t | tojson(ensure_ascii=True) }}{% endfor %}{{ '\n</tools>' }}"}
ENCLOSED = {"tags": ("<tools>", "</tools>"), "tags in tags": ("<tools>", "</tools>"), "markers": ("[AVAILABLE_TOOLS][", "][/AVAILABLE_TOOLS]"),
            "types": ("namespace functions {", "} // namespace functions"), "printed": ("<tools>", "</tools>"), "escaped": ("<tools>", "</tools>")}


@pytest.fixture(scope="module")
def text(default_model_path):
    return replace(load(default_model_path).text, system=None)


def opened(text, list_template, messages=CHATML):
    return open_tokenizer(replace(text, chat_template=SECTION.replace("LIST", list_template) + messages))


def conversation(*found, said=""):
    """A question, a call of a search, and what it has found."""
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"words": "web"}}}
    return [Message("user", "Q"), Message("assistant", "", {"tool_calls": [call]}), Message("tool", said, {"tool_call_id": "c1"}, tools=found)]


def shown(tokenizer, messages, tools):
    return tokenizer.show(tokenizer.render(messages, tools))


def result_in(prompt):
    return prompt.rpartition("<|im_start|>tool\n")[2].partition("<|im_end|>")[0]


@pytest.mark.parametrize("name", LISTS)
def test_a_definition_is_written_as_in_the_head(text, name):
    """What stands behind the search is what the template writes between two others in the head."""
    tokenizer = opened(text, LISTS[name])
    head = shown(tokenizer, [Message("user", "Q")], [FIND, FETCH, FIND])
    before, after = ENCLOSED.get(name, ("", ""))
    prompt = shown(tokenizer, conversation(FETCH), [FIND])
    assert prompt.startswith(shown(tokenizer, conversation(FETCH)[:2], [FIND]).removesuffix("<|im_start|>assistant\n"))
    found = result_in(prompt)
    inner = found.strip().removeprefix(before).removesuffix(after).strip()
    assert inner and inner in head and "fetch" in inner and found.count(before) == found.count(after) == found.count("fetch") or not before, found
    assert tokenizer.definitions.form is not None


def test_several_are_written_in_order_and_apart(text):
    tokenizer = opened(text, LISTS["tags"])
    messages = [*conversation(FETCH, NOTE, said="Found:"), Message("system", "More", tools=(function("last"),))]
    prompt = shown(tokenizer, messages, [FIND])
    assert result_in(prompt).startswith('Found:\n<tools>\n{"type": "function", "function": {"name": "fetch", ')
    assert result_in(prompt).count("\n") == 4 and result_in(prompt).endswith("}}\n</tools>")
    assert '<|im_start|>system\nMore\n<tools>\n{"type": "function", "function": {"name": "last"' in prompt
    assert prompt.index('"fetch"') < prompt.index('"note"') < prompt.index('"last"')


def test_what_the_head_says_never_changes(text):
    """The prompt before the result is the same, whatever is found."""
    tokenizer = opened(text, LISTS["types"])
    prompts = [shown(tokenizer, conversation(*found), [FIND]) for found in ((), (FETCH,), (FETCH, NOTE))]
    assert len({prompt[:prompt.index("<|im_start|>tool")] for prompt in prompts}) == 1


@pytest.mark.parametrize("name", LISTS)
def test_the_first_functions_come_with_how_they_are_called(text, name):
    """If the head has none."""
    prompt = shown(opened(text, LISTS[name]), conversation(FETCH), [])
    assert "# Tools" not in prompt[:prompt.index("Q")]
    assert result_in(prompt).startswith("# Tools") and "Call one so: <tool_call>{}</tool_call>" in result_in(prompt) and "fetch" in result_in(prompt)


def test_the_order_of_roles_stays_out_of_the_first_functions(text):
    before = "{% if tools %}{{ '<|im_start|>system\nTools:\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{{ '<tool_call> begins a call<|im_end|>\n' }}{% endif %}" + CHATML
    tokenizer = open_tokenizer(replace(text, chat_template=before))
    found = result_in(shown(tokenizer, conversation(NOTE), []))
    assert found.startswith('Tools:\n{"type"') and found.endswith("<tool_call> begins a call") and "<|im_start|>" not in found


UNUSUAL = {
    "refuses": "{% if tools | length > 1 %}{{ raise_exception('one function at most') }}{% endif %}{{ tools | tojson }}",
    "counts": "{% for t in tools %}{{ loop.index ~ '. ' + t | tojson + '\n' }}{% endfor %}",
    "sorts": "{% for t in tools | sort(attribute='function.name', reverse=True) %}{{ t | tojson }}{% endfor %}",
    "hides": "{{ tools | length }} functions",
    "groups": "{{ {'names': tools | map(attribute='function.name') | list, 'rest': tools | map(attribute='function.parameters') | list} | tojson }}"}


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_template_that_cannot_be_understood_gets_json(text, name):
    tokenizer = opened(text, UNUSUAL[name])
    prompt = shown(tokenizer, conversation(FETCH, NOTE, said="Found:"), [FIND])
    lines = result_in(prompt).split("\n")
    assert lines[0] == "Found:" and '"name": "fetch"' in lines[1] and '"name": "note"' in lines[2], prompt
    assert "To call one, write" in shown(tokenizer, conversation(FETCH), [])


@pytest.mark.parametrize("name", [*LISTS, *UNUSUAL])
def test_a_definition_cannot_spell_special_tokens(text, name):
    """Neither the found function's, nor in the fallback."""
    tokenizer = opened(text, (LISTS | UNUSUAL)[name])
    ends = tokenizer.specials["<|im_end|>"]
    for head in ([FIND], []):
        counts = [tokenizer.render(conversation(found), head).count(ends) for found in (NOTE, SPELLS)]
        assert counts[0] == counts[1]


def test_what_stands_for_definitions_cannot_be_typed(text):
    tokenizer = opened(text, LISTS["tags"])
    sign = tokenizer.definitions.signed("", 0)
    typed = [Message("user", f"Q {sign[1:]} " + 'X\ue0050"\ue005'), *conversation(FETCH)[1:]]
    prompt = shown(tokenizer, typed, [FIND])
    assert prompt.count('"name": "fetch"') == 1 and '"name": "fetch"' in result_in(prompt)


@pytest.mark.parametrize("written", ["{{ m.content | tojson if m.role == 'tool' else m.content }}", "{{ {'result': m.content} | tojson if m.role == 'tool' else m.content }}"])
def test_a_result_in_json_stays_json(text, written):
    """Its text is escaped, and so are the definitions in it."""
    tokenizer = opened(text, LISTS["tags"], CHATML.replace("+ (m.content or '') }}", "}}" + written))
    found = result_in(shown(tokenizer, conversation(FETCH, said='It\'s "here"'), [FIND]))
    assert r'\"here\"\n<tools>\n{\"type\": \"function\"' in found and r'Fetches a \\\"page\\\"' in found


def test_templates_without_a_place_for_functions_describe_them_as_in_the_head(text):
    tokenizer = open_tokenizer(replace(text, chat_template=CHATML.replace("tool", "t")))
    assert not tokenizer.native_tools
    prompt = shown(tokenizer, conversation(FETCH), [FIND])
    assert '<tool_response>\n{"name": "fetch", "description": "Fetches a \\"page\\""' in prompt and prompt.count("You can call functions.") == 1
    prompt = shown(tokenizer, conversation(FETCH), [])
    assert '<tool_response>\nYou can call functions.' in prompt and prompt.count("To call a function, write") == 1


def test_it_is_learned_once(text):
    """A further conversation fills in the template once more than one without found functions."""
    tokenizer = opened(text, LISTS["tags"])

    def fillings(messages):
        filling, count = tokenizer.rendering(messages, [FIND]), 0
        arguments = next(filling)
        while True:
            count += 1
            try:
                arguments = filling.send(tokenizer.template.render(**arguments))
            except StopIteration:
                return count
    first, second = fillings(conversation(FETCH)), fillings(conversation(FETCH, NOTE))
    assert (fillings(conversation()), second, first) == (1, 2, 4)


def test_many_functions_at_many_places_take_linear_time(text):
    tokenizer = opened(text, LISTS["tags"])
    tools = [function(f"f{number}", "x" * 40, a={"type": "string"}) for number in range(2000)]
    messages = [message for tool in tools for message in conversation(tool)]
    prompt = shown(tokenizer, messages, [FIND])
    assert all(prompt.count(f'"f{number}"') == 1 for number in (0, 999, 1999))


async def test_what_truncate_drops_stays_known(text):
    """A function that a dropped message made known moves to the head: it may still be called."""
    tokenizer = opened(text, LISTS["tags"])
    messages = [*conversation(FETCH, said="old " * 100), Message("assistant", "Yes."), Message("user", "Now?")]
    request = Request("r", messages=tuple(messages), tools=(FIND,), truncate=True, max_tokens=1)
    maker = PromptMaker(tokenizer, len(await PromptMaker(tokenizer, 4096).render(messages, [FIND], "")) - 50)
    admitted = await maker.admit(request)
    prompt = tokenizer.show(admitted.prompt_ids[0])
    assert admitted.dropped_messages and "old" not in prompt and prompt.index('"fetch"') < prompt.index("Now?")


SYSTEMS = {  # what templates do with system messages after the first, in our words
    "shows": CHATML, "refuses": "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}{% endfor %}" + CHATML,
    "loses": CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' or m is sameas messages[0] %}"),
    "moves up": "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}" + CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
    "alternates": "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == ns.last or m.role == 'system' and not loop.first %}{{ raise_exception('alternate') }}{% endif %}{% set ns.last = m.role %}{% endfor %}"
    + CHATML}


@pytest.mark.parametrize("list_template", ["{{ tools | tojson }}", None])
@pytest.mark.parametrize("name", SYSTEMS)
def test_later_system_messages_stand_where_they_are(text, name, list_template):
    """As text of the user if the template has no place for them there."""
    template = SYSTEMS[name] if list_template is None else SECTION.replace("LIST", list_template) + SYSTEMS[name]
    tokenizer = open_tokenizer(replace(text, chat_template=template))
    messages = [Message("system", "S1S"), Message("user", "U1U"), Message("system", "S2S"), Message("assistant", "A1A"), Message("user", "U2U"), Message("system", "S3S")]
    prompt = shown(tokenizer, messages, [])
    places = [prompt.find(words) for words in ("S1S", "U1U", "S2S", "A1A", "U2U", "S3S")]
    assert places == sorted(places) and -1 not in places and all(prompt.count(words) == 1 for words in ("S2S", "S3S"))
    moved = "U1U\n<system>\nS2S\n</system>" in prompt
    assert moved == (name != "shows"), prompt


def test_a_name_of_an_example_is_not_known_before():
    names = [ToolDefinitions("m", None, dict, str).names for _ in range(3)]
    assert len({name for pair in names for name in pair}) == 6
