"""Chats that llama-server's own page has exported come in: each of its four formats, with branches, thoughts, calls and files."""

import io
import json
import zipfile

import pytest

from browsing import answers, button, chats, expect, menu, needs_browser, open_page, questions, said

pytestmark = needs_browser

PICTURE = ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
           "AABJRU5ErkJggg==")
CALLS = [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]


def message(id, parent, role, content="", **more):
    """A row of its database, DatabaseMessage in its sources."""
    return {"id": id, "convId": "c1", "type": "text", "timestamp": 1760000000000 + 1000 * len(id), "role": role, "content": content,
            "parent": parent, "children": [], **more}


CONVERSATION = {"id": "c1", "name": "Mills", "lastModified": 1760000100000, "currNode": "answer22"}
MESSAGES = [
    message("root", None, "system", type="root"),
    message("sys", "root", "system", "Be brief.", type="system"),
    message("ask", "sys", "user", "What is this?", extra=[
        {"type": "IMAGE", "name": "mill.png", "base64Url": PICTURE},
        {"type": "TEXT", "name": "notes.py", "content": "print(1)\n"},
        {"type": "AUDIO", "name": "a.mp3", "base64Data": "AAAA", "mimeType": "audio/mpeg"}]),
    message("answer", "ask", "assistant", "An old mill.", model="qwen3", reasoningContent="Mills grind.",
            timings={"prompt_n": 10, "prompt_ms": 5.0, "predicted_n": 30, "predicted_ms": 2000.0, "cache_n": 2}),
    message("answer2", "ask", "assistant", "", toolCalls=json.dumps(CALLS), thinking="I need a tool."),
    message("tool2", "answer2", "tool", "3", toolCallId="call_1"),
    message("answer22", "tool2", "assistant", "It grinds **corn**.", model="qwen3"),
]
EXPORT = {"conv": CONVERSATION, "messages": MESSAGES}
OLD = {  # the page before 2025-09 had numbers as ids, -1 above the root, and thoughts in the text
    "conv": {"id": "conv-1750000000000", "lastModified": 1750000009000, "currNode": 1750000002000, "name": "Old"},
    "messages": [
        {"id": 1750000000000, "convId": "conv-1750000000000", "type": "root", "timestamp": 1750000000000, "role": "system",
         "content": "", "parent": -1, "children": [1750000001000]},
        {"id": 1750000001000, "convId": "conv-1750000000000", "type": "text", "timestamp": 1750000001000, "role": "user",
         "content": "hello", "parent": 1750000000000, "children": [1750000002000],
         "extra": [{"type": "context", "content": "pasted"}, {"type": "textFile", "name": "a.txt", "content": "words"},
                   {"type": "imageFile", "name": "b.png", "base64Url": PICTURE},
                   {"type": "pdfFile", "name": "c.pdf", "content": "a page", "processedAsImages": False}]},
        {"id": 1750000002000, "convId": "conv-1750000000000", "type": "text", "timestamp": 1750000002000, "role": "assistant",
         "content": "<think>\nWell.\n</think>\n\nHi.", "parent": 1750000001000, "children": []}]}


def jsonl(export):
    """The format since 2026: a line for the chat, and one for each message; calls are no text in it."""
    def line(row):
        return {"type": "message", "message": row | ({"toolCalls": json.loads(row["toolCalls"])} if "toolCalls" in row else {})}
    return "\n".join(map(json.dumps, [{"type": "session", "harness": "llama.cpp", **export["conv"]}, *map(line, export["messages"])]))


def zipped(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in names.items():
            archive.writestr(name, text)
    return file.getvalue()


def dexie(*exports):
    """The whole database, as some builds of 2025 exported it."""
    rows = {"conversations": [each["conv"] for each in exports], "messages": [row for each in exports for row in each["messages"]]}
    return json.dumps({"formatName": "dexie", "formatVersion": 1, "data": {"databaseName": "LlamacppWebui", "databaseVersion": 1,
                       "tables": [], "data": [{"tableName": name, "inbound": True, "rows": found} for name, found in rows.items()]}})


def offered(page, name, content):
    """The dialog that a file opens."""
    page.locator("#import-file").set_input_files({"name": name, "mimeType": "", "buffer": content if isinstance(content, bytes) else content.encode()})
    return page.get_by_role("dialog", name=f"Import {name}?")


def take(page, name, content):
    button(offered(page, name, content), "Import").click()


FORMATS = {"one chat": ("a.json", json.dumps(EXPORT)), "several chats": ("b.json", json.dumps([EXPORT], indent=2)), "lines": ("c.jsonl", jsonl(EXPORT)),
           "a zip": ("d.zip", zipped({"2026_conv_c1_mills.jsonl": jsonl(EXPORT)})), "its database": ("e.json", dexie(EXPORT))}


@pytest.mark.parametrize("name", FORMATS)
def test_each_of_its_formats_comes_in_whole(page, stand_in, name):
    open_page(page, stand_in.url)
    dialog = offered(page, *FORMATS[name])
    expect(dialog).to_contain_text("It contains 1 chat with 4 messages.")
    expect(dialog).to_contain_text("Left out, because there is no place for it here: 1 file.")
    button(dialog, "Import").click()
    expect(page.get_by_role("heading", name="Mills")).to_be_visible()
    expect(said(answers(page)).last).to_have_text("It grinds corn.")
    expect(answers(page).first).to_contain_text("2/2")
    expect(questions(page).get_by_role("img", name="mill.png")).to_be_visible()
    expect(questions(page)).to_contain_text("notes.py")
    assert page.evaluate("(({title, system, created, updated}) => [title, system, created, updated])(Chat.current)") == \
        ["Mills", "Be brief.", 1760000003000, 1760000100000]
    ask, answer, call, last = page.evaluate("['ask', 'answer', 'call', 'last'].map((_, i) => [...Chat.nodes.values()][i])")
    assert ask["content"] == "What is this?\n\nnotes.py:\n```py\nprint(1)\n```" and ask["pictures"][0]["picture"] == PICTURE
    assert (answer["content"], answer["reasoning"], answer["model"]) == ("An old mill.", "Mills grind.", "qwen3")
    assert answer["timings"] == {"prompt_tokens": 12, "cached_tokens": 2, "completion_tokens": 30, "tokens_per_second": 15}
    assert call["calls"] == [{"id": "call_1", "name": "add", "arguments": '{"a": 1}', "result": "3"}]
    assert call["reasoning"] == "I need a tool." and last["parent"] == call["id"] and "reasoning" not in last
    button(page, "Previous answer").first.click()
    expect(said(answers(page)).last).to_have_text("An old mill.")


@pytest.mark.parametrize("text", [json.dumps(OLD), dexie(OLD)], ids=["chat", "database"])
def test_chats_of_the_old_page_come_in(page, stand_in, text):
    open_page(page, stand_in.url)
    take(page, "old.json", text)
    expect(said(answers(page))).to_have_text("Hi.")
    question, answer = page.evaluate("Chat.path")
    assert [each["name"] for each in question["attachments"]] == ["context.txt", "a.txt", "c.pdf"]
    assert "pasted" in question["content"] and "a page" in question["content"] and question["pictures"][0]["name"] == "b.png"
    assert answer["reasoning"].strip() == "Well." and page.evaluate("Chat.current.title") == "Old"


def test_several_chats_of_one_zip_come_in(page, stand_in):
    other = {"conv": {**CONVERSATION, "id": "c2", "name": "Other", "pinned": True}, "messages": MESSAGES}
    open_page(page, stand_in.url)
    take(page, "all.zip", zipped({"a.jsonl": jsonl(EXPORT), "b.jsonl": jsonl(other), "readme.txt": "x"}))
    expect(chats(page)).to_have_text(["Other", "Mills"])


def test_the_path_alone_is_enough(page, stand_in):
    """For a while, the open chat was exported without its root and its other branches."""
    open_page(page, stand_in.url)
    take(page, "path.json", json.dumps({"conv": CONVERSATION | {"currNode": "gone"}, "messages": MESSAGES[2:4]}))
    expect(said(answers(page))).to_have_text("An old mill.")


def test_marks_of_thoughts_and_calls_in_a_text_are_taken_out(page, stand_in):
    """Early in 2026 they stood in the content."""
    text = ("<<<reasoning_content_start>>>Let me see.<<<reasoning_content_end>>>I look.\n\n<<<AGENTIC_TOOL_CALL_START>>>\n<<<TOOL_NAME:find>>>\n"
            "<<<TOOL_ARGS_START>>>\n{\"q\": 1}\n<<<TOOL_ARGS_END>>>\nfound it\n<<<AGENTIC_TOOL_CALL_END>>>\n\nDone.")
    open_page(page, stand_in.url)
    take(page, "marks.json", json.dumps({"conv": {**CONVERSATION, "currNode": "b2"}, "messages": [message("a", None, "user", "q"), message("b2", "a", "assistant", text)]}))
    body = said(answers(page))
    expect(body.locator("summary")).to_have_text("find")
    expect(body).to_contain_text("Done.")
    expect(body).not_to_contain_text("<<<")
    body.locator("summary").click()
    expect(body.locator("details code")).to_have_text('{"q": 1}')
    expect(body.locator("details")).to_contain_text("found it")
    assert page.evaluate("Chat.lastNode().reasoning") == "Let me see."


WRONG = {
    "no text": (json.dumps({"conv": CONVERSATION, "messages": [message("a", None, "user", 3)]}), "a.json",
                "a.json is not a conversation: message 1 of chat 1 lacks a role or text."),
    "no message": (json.dumps([EXPORT, {"conv": CONVERSATION, "messages": [message("a", None, "user", "x"), None]}]), "a.json",
                   "a.json is not a conversation: message 2 of chat 2 lacks a role or text."),
    "no messages": (json.dumps({"conv": CONVERSATION, "messages": []}), "a.json", "a.json is not a conversation: it must be JSON with"),
    "a conversation alone": (json.dumps(CONVERSATION), "a.json", "a.json is not a conversation: it must be JSON with"),
    "cut off": (jsonl(EXPORT)[:-9], "a.jsonl", "a.jsonl is damaged: line 8 is not valid JSON. It may have been cut off."),
    "no session first": (jsonl(EXPORT).split("\n", 1)[1], "a.jsonl", "a.jsonl is not a conversation"),
    "a zip without chats": (zipped({"readme.txt": "x"}), "a.zip", "a.zip contains no chats: no .jsonl file and no conversations.json."),
    "half a zip": (zipped({"a.jsonl": jsonl(EXPORT)})[:-30], "a.zip", "a.zip is damaged, or no zip file that this page can read."),
    "two of one id": (json.dumps({"conv": CONVERSATION, "messages": [message("a", None, "user", "x"), message("a", None, "user", "y")]}), "a.json",
                      "a.json is not a conversation: two messages have the same id."),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_file_says_what_is_wrong_and_changes_nothing(page, stand_in, name):
    content, file, error = WRONG[name]
    open_page(page, stand_in.url)
    take(page, "good.json", json.dumps(OLD))
    expect(chats(page)).to_have_text(["Old"])
    page.locator("#import-file").set_input_files({"name": file, "mimeType": "", "buffer": content if isinstance(content, bytes) else content.encode()})
    expect(page.get_by_role("log").locator(".notice")).to_contain_text(error)
    expect(chats(page)).to_have_text(["Old"])
    expect(said(answers(page))).to_have_text("Hi.")


def test_circles_and_lost_parents_end(page, stand_in):
    open_page(page, stand_in.url)
    rows = [message("a", "bb", "user", "one"), message("bb", "a", "assistant", "two"), message("ccc", "gone", "user", "three")]
    take(page, "circle.json", json.dumps({"conv": {"id": "c1", "name": "x", "lastModified": 1, "currNode": "bb"}, "messages": rows}))
    expect(said(answers(page))).to_have_text("two")
    assert page.evaluate("Chat.nodes.size") == 3


def test_a_zip_that_unpacks_to_too_much_is_refused(page, stand_in):
    open_page(page, stand_in.url)
    bomb = zipped({"a.jsonl": b"\n" * 3_000_000})
    assert len(bomb) < 10_000
    said_so = page.evaluate("""async bytes => {
        await Parts.need("zip");
        return Zip.textsIn(new Blob([new Uint8Array(bytes)]), "b.zip", 1e6).then(() => "", error => error.message);
    }""", list(bomb))
    assert said_so == "b.zip unpacks to more than 1 MB."


def test_a_huge_file_leaves_frames_to_the_page(page, stand_in):
    """Chats are converted a few at a time: the page draws between them."""
    open_page(page, stand_in.url)
    frames = page.evaluate("""async text => {
        let frames = 0, going = true;
        const count = () => { frames++; if (going) requestAnimationFrame(count); };
        requestAnimationFrame(count);
        let clock = 0;
        const now = performance.now;
        performance.now = () => clock += 5;                 // as if each chat took long
        const chats = await Tree.importIn(text, "it");
        performance.now = now;
        going = false;
        return [chats.length, frames];
    }""", json.dumps([EXPORT] * 300))
    assert frames[0] == 300 and frames[1] > 20


def test_the_menu_takes_every_format(page, stand_in):
    open_page(page, stand_in.url)
    with page.expect_file_chooser() as chooser:
        menu(page, "Import")
    assert chooser.value.element.get_attribute("accept") == "application/json,.json,.jsonl,application/zip,.zip"


def test_a_huge_import_is_written_in_parts(page, stand_in):
    """The page waits while changes are handed over to its database."""
    open_page(page, stand_in.url)
    counts = page.evaluate("""async text => {
        const counts = [], {transaction} = IDBDatabase.prototype, {get} = IDBObjectStore.prototype;
        IDBDatabase.prototype.transaction = function (...given) { counts.push(0); return transaction.apply(this, given); };
        IDBObjectStore.prototype.get = function (...given) { counts[counts.length - 1]++; return get.apply(this, given); };
        await Chats.importAll(Tree.importOf(text), "it");
        await Store.flushing;
        return counts.filter(Boolean);
    }""", json.dumps([EXPORT] * 1100))
    assert sum(counts) == 5500 and max(counts) <= 2000
    page.reload()
    expect(chats(page)).to_have_count(1100)
    assert page.evaluate("Store.read('nodes').then(found => found.length)") == 4400
