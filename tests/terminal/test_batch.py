"""The command `batch`: each line is answered once, however often the command is killed, and the output is the same."""

import json
import os
import re
import time

import pytest

from chatlm.common.errors import RequestError
from chatlm.front.api.batch_lines import lasting_body, read_line
from chatlm.terminal.batch_files import InputFile
from forked import fork_front
from real_server import SCRIPT
from run_here import run_forked, run_here


def chat(custom_id, text="Hello", **more):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": text}], "max_tokens": 12, **more}}


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def batch(*words):
    """(exit status, stderr)."""
    ended = run_forked("batch", *words)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


@pytest.fixture
def here(capfd):
    """The same of a command that this process runs."""
    def here(*words):
        status, out, said = run_here(capfd, "batch", *words)
        assert out == ""
        return status, said
    return here


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(path):
    return re.sub(r'"created(_at)?": \d+', '"created": 0', path.read_text())


@pytest.fixture(scope="module")
def model(nanochat_fixtures):
    return nanochat_fixtures / "gen5"


def test_answers_and_errors_keep_the_file_s_order(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [
        chat("a", temperature=0), "", chat("b", n=2, seed=7), "no json", {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 3}},
        chat("d", messages="x"), chat("e", stream=True), {"custom_id": "f", "url": "/v1/files", "body": {}},
        {"custom_id": "g", "url": "/v1/responses", "body": {"input": "Hi", "max_output_tokens": 16}}, {"custom_id": "h", "url": "/v1/embeddings", "body": {"input": "x"}}])
    status, said = batch(model, source, "-o", tmp_path / "out.jsonl")
    assert status == 1 and "9 lines in" in said and "4 of all with errors" in said
    found = results(tmp_path / "out.jsonl")
    assert [one["custom_id"] for one in found] == ["a", "b", None, "c", "d", None, None, "g", "h"]
    codes = [one["response"] and one["response"]["status_code"] for one in found]
    assert codes == [200, 200, None, 200, 400, None, None, 200, 200]
    assert len(found[1]["response"]["body"]["choices"]) == 2 and found[1]["response"]["body"]["usage"]["completion_tokens"] == 24
    assert found[2]["error"] == {"code": "invalid_line", "message": "line 4: is not JSON in UTF-8"}
    assert "stream must be false in a batch" in found[5]["error"]["message"] and "/v1/embeddings, not \"/v1/files\"" in found[6]["error"]["message"]
    assert found[4]["response"]["body"]["error"]["param"] == "messages"
    assert found[7]["response"]["body"]["object"] == "response" and found[8]["response"]["body"]["data"][0]["embedding"]
    assert batch(model, source, "-o", tmp_path / "out.jsonl") [0] == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl", "out.jsonl.of"]


def test_a_killed_run_resumes_to_the_same_output(model, tmp_path):
    """A killed run goes on and its output is that of an undisturbed one."""
    lines = [chat(f"line {number}", f"Tell me about {number}", max_tokens=8 + number % 20, temperature=number % 2) for number in range(80)]
    source = write(tmp_path / "in.jsonl", lines)
    assert batch(model, source, "-o", tmp_path / "undisturbed.jsonl")[0] == 0
    part, kills = tmp_path / "out.jsonl.part", 0
    for least in (2, 20, 40):
        with open(os.devnull, "wb") as nowhere:
            words = "batch", model, source, "-o", tmp_path / "out.jsonl"
            running = fork_front(SCRIPT, [*map(str, words)], os.environ, nowhere.fileno(), nowhere.fileno())
        while running.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < least):
            time.sleep(0.01)
        kills += running.poll() is None
        running.kill()
        running.wait()
    assert kills
    with part.open("ab") as file:
        file.write(b'80 ok {"half of a li')               # as a power cut may leave it
    before = part.read_bytes().count(b"\n") - 2      # after two lines that say of what they are
    status, said = batch(model, source, "-o", tmp_path / "out.jsonl")
    assert status == 0 and f"{80 - before:,} lines in" in said and not part.exists()
    assert without_time(tmp_path / "out.jsonl") == without_time(tmp_path / "undisturbed.jsonl")


def test_a_server_answers_a_batch_the_same(model, tiny_url, tmp_path):
    called = {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}], "tool_choice": "required"}
    source = write(tmp_path / "in.jsonl", [
        *(chat(str(number), f"Count to {number}", temperature=number % 2) for number in range(12)), chat("bad", temperature=9), chat("call", max_tokens=60, **called),
        {"custom_id": "items", "method": "POST", "url": "/v1/responses", "body": {"input": "Hi", "max_output_tokens": 16, "temperature": 0, "store": False}}])
    assert batch(source, "-o", tmp_path / "there.jsonl", "--url", tiny_url)[0] == 1
    assert batch(model, source, "-o", tmp_path / "here.jsonl")[0] == 1
    there, here = (without_time(tmp_path / f"{name}.jsonl").splitlines() for name in ("there", "here"))
    assert there == here and len(there) == 15 and any('"id": "call_' in line for line in there)


def test_mismatched_files_are_refused_and_stay(model, tmp_path, here):
    source, out = write(tmp_path / "in.jsonl", [chat("a")]), tmp_path / "out.jsonl"
    out.write_text("mine\nand mine\n")
    part = tmp_path / "other.jsonl.part"
    part.write_text('{"chat_server": "batch", "input": "another", "created": 1, "run": "0123456789abcdef"}\n')
    for words, reason in (
            ((source, "-o", out), "exists, and no "), ((source, "-o", tmp_path / "other.jsonl"), "is of another input; delete it"),
            ((source,), "batch takes a FILE"), ((tmp_path / "none.jsonl", "-o", out), "No such file"), ((write(tmp_path / "empty", ["", " "]), "-o", out), "has no lines"),
            ((model, source, source, "-o", out), "unrecognized arguments"), ((source, "-o", tmp_path / "no" / "folder"), "No such file"),
            ((source, "-o", tmp_path / "x.jsonl", "--url", "http://127.0.0.1:9"), "no server answers")):
        status, said = here(*words)
        assert status == 2 and reason in said.splitlines()[-1], said
    assert not (tmp_path / "x.jsonl.part").exists()
    assert out.read_text() == "mine\nand mine\n" and part.read_text().endswith('cdef"}\n')


def test_answers_of_other_settings_are_not_reused(model, nanochat_fixtures, tmp_path, here):
    """The answers of another model or with other settings are not taken for these."""
    source, out = write(tmp_path / "in.jsonl", [chat("a", temperature=0)]), tmp_path / "out.jsonl"
    assert batch(model, source, "-o", out)[0] == 0
    before = out.read_bytes()
    for words, reason in (((nanochat_fixtures / "gen4", source), "out.jsonl has answers with "), ((model, source, "--dtype", "float32"), 'dtype null, not "float32"'),
                          ((model, source, "--context-length", 64), "context_length null, not 64"), ((model, write(tmp_path / "other.jsonl", [chat("b", temperature=0)])), "for another input")):
        status, said = here(*words, "-o", out)
        assert status == 2 and reason in said.splitlines()[-1], said
    status, said = batch(model, source, "-o", out)
    assert status == 0 and "has the answers to all 1 lines already" in said and out.read_bytes() == before
    (tmp_path / "new.jsonl.part").write_bytes(b"")
    for name, reason in ((".", "is a folder"), (source, "is the input"), ("/dev/null", "must be a regular file"), (tmp_path / "new.jsonl", "no batch has written it")):
        status, said = here(model, source, "-o", name)
        assert status == 2 and reason in said and len(said.splitlines()) == 1, said
    assert (tmp_path / "new.jsonl.part").exists() and source.read_text()


@pytest.mark.parametrize("text, reason", [
    (b"[1]", "must be an object, not a list of 1"), (b'{"custom_id": ""}', "custom_id must be a text"), (b'{"custom_id": "a", "method": "GET"}', "method must be POST"),
    (b'{"custom_id": "a", "url": "/v1/chat/completions"}', "body must be an object"), (b"[" * 100_000, "is not JSON"), (b"\xff", "is not JSON"),
    (b'{"custom_id": "%s"}' % (b"x" * 513), "at most 512 characters"), (b" " * ((16 << 20) + 1), "more than 16,777,216 bytes")])
def test_a_wrong_line_is_explained(text, reason):
    with pytest.raises(RequestError, match="line 3: ") as caught:
        read_line(3, text)
    assert reason in str(caught.value)


@pytest.mark.parametrize("body", [{}, {"usage": None}, {"usage": [1]}, {"usage": {"completion_tokens_details": None}}, {"error": "no"},
                                  {"usage": {"input_tokens_details": 5}}, {"choices": [None, {"logprobs": {"content": [1, None, {"token": "a"}]}}, {"logprobs": [{"drafted": 1}]}]},
                                  {"choices": {"logprobs": 3}}, {"metadata": {"drafted": "true", "timings": "x"}}])
def test_bodies_of_any_shape_are_kept(body):
    assert lasting_body(json.loads(json.dumps(body)), 7) == body


def test_what_changes_each_time_is_left_out():
    usage = {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}, "completion_tokens_details": {"reasoning_tokens": 2, "accepted_prediction_tokens": 3}}
    assert lasting_body({"created": 1, "timings": {}, "usage": usage}, 7) == {
        "created": 7, "usage": {"prompt_tokens": 1, "completion_tokens_details": {"reasoning_tokens": 2}}}
    tokens = [{"token": "a", "logprob": -1, "drafted": True}, {"token": "b", "logprob": -2}]
    found = lasting_body({"choices": [{"index": 0, "logprobs": {"content": tokens}}, {"index": 1, "logprobs": None}]}, 7)
    assert found["choices"][0]["logprobs"]["content"] == [{"token": "a", "logprob": -1}, {"token": "b", "logprob": -2}]
    # without them it would be no Response of the openai package
    assert lasting_body({"created_at": 1, "usage": {"input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0}}}, 7) == {
        "created_at": 7, "usage": {"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}}}


@pytest.mark.slow
def test_the_default_model_answers_a_batch(tmp_path):
    source = write(tmp_path / "in.jsonl", [chat("a", "What is the capital of France?", temperature=0)])
    assert batch(source, "-o", tmp_path / "out.jsonl")[0] == 0
    assert results(tmp_path / "out.jsonl")[0]["response"]["body"]["model"] == "SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", ["model", "m\\u006fdel", "\\u006dodel"])
def test_a_model_is_found_however_its_name_is_spelled(tmp_path, name):
    source = tmp_path / "lines.jsonl"
    source.write_text('{"body": {"%s": "another"}}\n{"body": {"note": "a model"}}\n' % name)
    assert InputFile(source).models == {"another"}
