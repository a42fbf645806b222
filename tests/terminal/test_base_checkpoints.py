"""A base checkpoint of nanochat: a model for texts, which has the tokens of a chat and chats for those who ask for it."""

import json
import shutil
import urllib.error

import pytest
from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.load import open_model
from real_server import ask, events, get, post, server
from run_here import run_forked

GREEDY = ("--temperature", "0", "--max-tokens", "6", "--dtype", "float32")
DRAWN = {"temperature": 0, "max_tokens": 6}


def run(command, *words, given=""):
    """What a command writes to stdout, and to stderr."""
    ended = run_forked(command, *words, *GREEDY, given=given)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr


@pytest.fixture(scope="module")
def served(base_checkpoint):
    with server(base_checkpoint, "--dtype", "float32") as (process, url):
        yield url


def text_of(url, **body):
    return json.loads(post(url + "/v1/completions", DRAWN | body).read())["choices"][0]["text"]


def chat_of(url, text):
    return json.loads(post(url + "/v1/chat/completions", ask(text, max_tokens=6)).read())["choices"][0]["message"]["content"]


@pytest.mark.parametrize("source, is_base", [("base", True), ("mid", False), ("chatsft", False), ("chatrl", False)])
def test_only_the_source_base_is_for_texts(base_checkpoint, tmp_path, source, is_base):
    shutil.copytree(base_checkpoint / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(base_checkpoint / "base_checkpoints", tmp_path / f"{source}_checkpoints")
    settings = Settings(model=str(tmp_path))
    tokenizer = open_tokenizer(open_model(resolve_model(settings), settings, "cpu").text)
    assert tokenizer.continues_texts == is_base and tokenizer.has_chat_template


def test_a_base_server_names_itself_and_still_chats(served):
    """The server says that its model is for texts, and its chat routes work."""
    listed, = get(served + "/v1/models")["data"]
    assert (listed["tag"], listed["stage"], listed["step"]) == ("d4", "base", 650)
    assert (listed["type"], listed["capabilities"]["chat"], listed["capabilities"]["completion"]) == ("text", True, True)
    text, chat = text_of(served, prompt="Once upon"), chat_of(served, "Once upon")
    assert text and chat and text != chat
    generated = json.loads(post(served + "/api/generate", {"prompt": "Once upon", "stream": False, "options": {"temperature": 0, "num_predict": 6}}).read())
    assert generated["response"] == text            # Ollama's route continues what a model for texts is given
    conversed = json.loads(post(served + "/api/chat", ask("Once upon", stream=False, options={"temperature": 0, "num_predict": 6})).read())
    assert conversed["message"]["content"] == chat
    tokens = [event.get("token", "") for event in events(post(served + "/chat/completions", ask("Once upon", max_tokens=6)))]
    assert "".join(tokens) == chat


def test_a_comparison_takes_a_text_or_a_conversation(served):
    two = {"variants": [{}, {"temperature": 0.5, "seed": 3}]} | DRAWN

    def answers(**asked):
        found = ["", ""]
        for event in events(post(served + "/v1/compare", two | asked)):
            found[event.get("index", 0)] += event.get("token", "")
        return found

    assert answers(prompt="Once upon")[0] == text_of(served, prompt="Once upon")
    assert answers(messages=ask("Once upon")["messages"])[0] == chat_of(served, "Once upon")
    for asked, words in (({}, "messages is missing, or prompt"), ({"prompt": "a", "messages": ask("a")["messages"]}, "exclude each other"), ({"prompt": 1}, "prompt")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(served + "/v1/compare", two | asked)
        assert caught.value.code == 400 and words in json.loads(caught.value.read())["error"]["message"]


@pytest.mark.slow
def test_commands_continue_texts_and_chat_on_demand(base_checkpoint, served, tmp_path):
    text, chat = text_of(served, prompt="Once upon"), chat_of(served, "Once upon")
    for words in ([base_checkpoint], [base_checkpoint, "-i", "base"], ["--url", served]):
        assert run("generate", *words, "-p", "Once upon")[0].rstrip("\n") == text.rstrip("\n")
        assert run("chat", *words, "-p", "Once upon", "--conversation")[0].rstrip("\n") == chat.rstrip("\n")
    assert run("generate", base_checkpoint, "Once")[0].rstrip("\n") == text_of(served, prompt="Once").rstrip("\n")      # a prompt of one word
    out, said = run("generate", base_checkpoint, "-p", "Once upon", "--system", "Be brief")
    assert out.rstrip("\n") == text.rstrip("\n") and "--system has no effect" in said
    out, said = run("chat", base_checkpoint, "--json", given="Once upon\n/clear\n/conversation\nOnce upon\n")
    assert [json.loads(line)["text"] for line in out.splitlines() if line.startswith("{")] == [text, chat]
    assert "a base checkpoint, which was not taught to chat: it continues the text that you type" in said
    other = tmp_path / "other"
    shutil.copytree(base_checkpoint, other)
    for words, first in (([], text), (["--conversation"], chat)):
        lines = run("compare", base_checkpoint, other, "-p", "Once upon", "--json", *words)[0].splitlines()
        assert [json.loads(line)["text"] for line in lines] == [first, first]
    assert [json.loads(line)["text"] for line in run("compare", "nanochat-d4-base", "default", "-p", "Once upon", "--json", "--url", served)[0].splitlines()] == [
        text, text]
    checked = run_forked("check", base_checkpoint)
    assert checked.returncode == 0 and "note: template: it is a base checkpoint, which was not taught to chat" in checked.stdout
