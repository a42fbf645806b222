"""Records that this page did not make: what it takes of them, that the server takes the same, and that what cannot be drawn costs nothing else."""

import copy
import json
import re

import pytest

from browsing import answers, button, chats, expect, fake_front, message_box, needs_browser, open_page, questions, said, visitor
from chatlm.common.errors import RequestError
from chatlm.front.annexes.chats import records

pytestmark = needs_browser

KINDS = {"chat": "conversations", "node": "nodes", "project": "projects", "prompt": "prompts"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="
CALL = {"id": "a", "name": "f", "arguments": "{}", "result": "r", "server": "s", "tool": "f", "about": "x", "digest": "d", "begun": 5, "ms": 1.5, "cut": 3, "failed": True,
        "images": [{"mime_type": "image/png", "data": "iVBO"}]}
PASSAGE = {"index": 1, "vector_store_id": "vs", "file_id": "file", "filename": "a.md", "page": 3, "heading": "H", "start": 9, "cut": False, "score": 0.5}
# what fields have that pages and servers write
GOOD = {
    "calls": [CALL], "calculator": [{"start": 0, "expression": "1+1", "result": "2"}, {"start": 3, "expression": None, "result": "4", "cut": True}, {"start": 3, "stray": "python_end"}],
    "knowledge": {"mode": "auto", "read": 1, "of": 4, "words_only": False, "text": "read", "passages": [PASSAGE]}, "timings": {"ttft_ms": 3.5, "finish_reason": "length", "gpu": 0, "measured": None, "drafts": {"ngram": {"drafted": 5, "accepted": 3}}},
    "parameters": {"temperature": 0.5, "stop": ["x"], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "response_format": {"type": "json_object"}, "reasoning_effort": "low"},
    "attachments": [{"name": "a.txt", "at": 3, "length": 9}], "pictures": [{"name": "p.png", "picture": PIXEL}], "stream": {"id": "0" * 32, "next": 4, "begin": 2}, "earlier": {"completion_tokens": 3},
    "ids": [1, 2], "prefix": [0], "seed": 7, "thought": 300, "remedy": "key", "created": 1e12, "updated": 1e12, "role": "user", "files": [{"name": "a", "text": "b"}], "stores": [{"id": "vs", "name": "n"}], "search": {"max_num_results": 3, "score_threshold": 0.5}, "tools": ["f"],
    "project": "0" * 32, "pinned": True, "inTurns": False, "continued": True, "edited": True, "starter": False}
TEXTS = ["content", "reasoning", "model", "weights", "system", "note", "error", "ended", "response", "title", "name", "prompt", "text"]
GOOD |= dict.fromkeys(TEXTS, "text")
ODD = [5, -1, 0, 1.5, 1e300, 2**53, "", "text", True, False, [], {}, [None], [5], [[]], [{}], [""], {"a": []}, {"a": {}}, {"a": "b"}, [{"id": "a", "name": "b"}], {"passages": 5}, {"passages": [None]}, {"read": "x"}]


def variants(value):
    """A value with one of its parts replaced or removed."""
    if isinstance(value, dict):
        for name in value:
            yield {key: each for key, each in value.items() if key != name}
            yield from ({**value, name: changed} for changed in variants(value[name]))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from ([*value[:index], changed, *value[index + 1:]] for changed in variants(each))
        yield [*value, None]
        yield [*value, *value[:1]]
    yield from (None, 5, -1, "x", "", True, [], {}, [None], {"a": None})


FIELDS = [(kind, name) for kind, fields in records.FIELDS.items() for name in fields if name not in ("conversation", "parent")]


def takes(kind, name, value):
    try:
        records.checked_patch(kind, {name: value})
    except RequestError:
        return False
    return True


@pytest.fixture(scope="module")
def front_url():
    with fake_front() as url:
        yield url


@pytest.fixture(scope="module")
def shared(browser, front_url):
    with visitor(browser) as page:
        open_page(page, front_url)
        yield page


@pytest.mark.parametrize("kind, name", FIELDS)
def test_page_and_server_take_the_same_values(shared, kind, name):
    values = [GOOD[name], *ODD, *variants(GOOD[name])]
    page = shared.evaluate("([kind, name, values]) => values.map(value => name in Fields.fitting(kind, {[name]: value}))", [KINDS[kind], name, values])
    server = [takes(kind, name, value) for value in values]
    assert server[0] and page[0] and not all(server)
    if name == "project":      # an id: the page compares it with those that it has
        assert all(there for there, here in zip(page, server) if here)
    else:
        assert [value for value, here, there in zip(values, page, server) if here != there] == []


def test_each_field_of_an_answer_is_exported_and_imported(shared):
    """But for those that belong to one place or one moment."""
    kept = ["knowledge", "tools", "reasoning", "thought", "timings", "note", "error", "remedy", "ids", "prefix", "seed", "weights", "continued", "edited", "pictures", "attachments", "calculator", "calls", "parameters", "model", "system"]
    node = {"role": "assistant", "content": "1+1 = 2, as in a.txt", "created": 1e12, **{name: GOOD[name] for name in kept}, "stream": GOOD["stream"], "ended": "x", "response": "resp_x", "earlier": {}}
    node["calculator"], node["attachments"] = GOOD["calculator"][:1], [{"name": "a.txt", "at": 3, "length": 9}]
    exported = shared.evaluate("""node => Tree.exportOf([{id: "c", title: "t", created: 1, updated: 1, leaf: "n", parameters: {}, system: "", tools: ["f"], allowed: {f: "d"}, running: "n"}],
        () => [{id: "n", conversation: "c", parent: null, ...node}])""", node)
    [chat] = exported["conversations"]
    assert chat["nodes"][0] == {"id": "n", "parent": None, **{name: value for name, value in node.items() if name not in ("stream", "ended", "response", "earlier")}}
    assert not {"tools", "allowed", "running", "id"} & chat.keys()
    [imported] = shared.evaluate("text => Tree.importOf(text)", json.dumps(exported))
    taken = imported["nodes"][0]
    assert {name for name in kept if name not in taken} == set()
    assert taken["knowledge"] == GOOD["knowledge"] and taken["calls"] == [{name: CALL[name] for name in ("id", "name", "arguments", "result")}]


# chats that a page finds ------------------------------------------------------------------------------------------------

WRONG = {"knowledge": {"passages": 5}, "calculator": [None], "timings": {"tokens_per_second": {}, "ttft_ms": []}, "calls": [{"id": 1}], "pictures": [{"name": 5, "picture": "x"}, None], "attachments": 7, "parameters": [],
         "stream": 5, "reasoning": {}, "note": [], "error": 3, "remedy": {}, "ids": {}, "system": 9, "model": [], "created": "now"}
STORE = """async ([chats, nodes]) => {
    for (const chat of chats) Store.change("conversations", chat.id, chat, true);
    for (const node of nodes) Store.change("nodes", node.id, node, true);
    while (Store.flushing) await Store.flushing;
}"""


def identity(number):
    return f"{number:032x}"


def chat_of(number, title, **more):
    return {"id": identity(number), "title": title, "created": number, "updated": number, "pinned": False, "system": "", "parameters": {}, "leaf": identity(1000 * number + 2), **more}


def nodes_of(number, **more):
    common = {"conversation": identity(number), "created": number}
    return [{"id": identity(1000 * number + 1), "parent": None, "role": "user", "content": f"question {number}", **common},
            {"id": identity(1000 * number + 2), "parent": identity(1000 * number + 1), "role": "assistant", "content": f"answer {number}", **common, **more}]


def test_fields_that_do_not_fit_are_left_out(page, front_url):
    """The chats are listed after a reload, open, and go on."""
    open_page(page, front_url)
    wrong = {**{name: copy.deepcopy(value) for name, value in WRONG.items()}}
    found = [chat_of(i, f"wrong {name}") for i, name in enumerate(wrong, 1)] + [chat_of(90, "all wrong", updated="never", pinned="x", stores=5, parameters=5, model=[], system={}, tools=[7], allowed="x", running=5, project={})]
    nodes = [node for i, (name, value) in enumerate(wrong.items(), 1) for node in nodes_of(i, **{name: value})] + nodes_of(90, **wrong)
    page.evaluate(STORE, [found, nodes])
    page.reload()
    expect(chats(page)).to_have_count(len(found))
    for chat in found:
        chats(page).filter(has_text=re.compile(f"^{chat['title']}$")).click()
        number = int(chat["id"], 16)
        expect(said(questions(page))).to_have_text([f"question {number}"])
        expect(said(answers(page))).to_have_text([f"answer {number}"])
        expect(button(answers(page), "Regenerate")).to_be_visible()
        expect(page.get_by_text("could not be drawn")).to_have_count(0)
    message_box(page).fill("Go on")
    button(page, "Send").click()
    expect(said(answers(page)).last).to_have_text("Hello, world!")


@pytest.fixture
def failing(browser, front_url):
    """A page whose console has errors."""
    context = browser.new_context()
    page = context.new_page()
    open_page(page, front_url)
    page.evaluate(STORE, [[chat_of(1, "one"), chat_of(2, "two")], [*nodes_of(1), *nodes_of(2)]])
    yield page
    context.close()


def test_a_turn_that_cannot_be_drawn_is_plain_text(failing):
    failing.reload()
    chats(failing).filter(has_text="one").click()
    failing.evaluate("""() => { const node = Chat.lastNode(); Object.defineProperty(node, "reasoning", {get() { throw new Error("no"); }}); Page.render(); }""")
    expect(answers(failing)).to_contain_text("answer 1")
    expect(answers(failing)).to_contain_text("could not be drawn")
    expect(said(questions(failing))).to_have_text(["question 1"])
    expect(chats(failing)).to_have_count(2)
    chats(failing).filter(has_text="two").click()
    expect(said(answers(failing))).to_have_text(["answer 2"])
    chats(failing).filter(has_text="one").click()        # it is read again
    expect(said(answers(failing))).to_have_text(["answer 1"])


@pytest.mark.parametrize("part", ["{answer: {update() { throw 1; }}}", "{answer: {buttons() { throw 1; }, looks() { throw 2; }}}", "{render() { throw 1; }}"])
def test_a_part_that_fails_leaves_the_others(failing, part):
    failing.evaluate(f"Parts.register({part}); Page.render()")
    failing.evaluate("Chat.readStored().then(() => Chat.open([...Chat.chats.keys()][0]))")
    expect(said(answers(failing))).to_have_text(["answer 1"])
    expect(button(answers(failing), "Regenerate")).to_be_visible()
    expect(chats(failing)).to_have_count(2)


def test_a_chat_with_which_the_page_ended_is_not_opened_again(failing):
    """It never finished drawing it; the reader may open it."""
    failing.reload()
    chats(failing).filter(has_text="two").click()
    expect(said(answers(failing))).to_have_text(["answer 2"])
    failing.reload()
    expect(said(answers(failing))).to_have_text(["answer 2"])                # what was drawn is opened again
    chats(failing).filter(has_text="one").click()
    expect(said(answers(failing))).to_have_text(["answer 1"])
    failing.evaluate("const create = document.createElement.bind(document); document.createElement = name => { while (name === 'article'); return create(name); }; 0")
    chats(failing).filter(has_text="two").click(no_wait_after=True)          # it holds the page for ever
    second = failing.context.new_page()
    open_page(second, failing.url)
    expect(second.locator(".notice", has_text="has not opened this chat again")).to_contain_text("two")
    expect(message_box(second)).to_be_editable()
    expect(answers(second)).to_have_count(0)
    chats(second).filter(has_text="two").click()
    expect(said(answers(second))).to_have_text(["answer 2"])
    second.reload()
    expect(said(answers(second))).to_have_text(["answer 2"])
    failing.close(run_before_unload=False)
