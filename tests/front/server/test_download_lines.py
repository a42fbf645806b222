"""A download's states as Ollama's clients read them: a line for each stage, one for each progress, and one that says why it was of no use."""

import hashlib
import json

import pytest

from chatlm.front.annexes.downloads.routes import ollama_lines
from chatlm.front.pool.downloads import Download

NAME = "org/name:model.gguf"
DIGEST = f"sha256:{hashlib.sha256(NAME.encode()).hexdigest()}"


def lines_of(*changes):
    """What follows a download through its states, without what is not sent."""
    download = Download(NAME, "name")
    encode = ollama_lines(download)
    sent = [encode(download.body)]
    for state, fields in changes:
        download.become(state, **fields)
        sent.append(encode(download.body))
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in sent if line)
    return [json.loads(line) for line in sent if line]


def test_a_stage_has_one_line_and_progress_one_each_time():
    half = {"done": 5, "whole": 10}
    assert lines_of(("looking", {}), ("downloading", half), ("downloading", {"done": 10}), ("checking", {}), ("opening", {}), ("done", {})) == [
        {"status": "pulling manifest"}, *({"status": f"pulling {NAME}", "digest": DIGEST, "total": 10, "completed": done} for done in (5, 10)),
        {"status": "verifying sha256 digest"}, {"status": "writing manifest"}, {"status": "success"}]


@pytest.mark.parametrize(("state", "fields", "error"), [
    ("failed", {"error": "the hub cannot be reached"}, "the hub cannot be reached"), ("cancelled", {}, "the download was cancelled"),
    ("done", {"usable": False, "note": "this program does not run rwkv7"}, "this program does not run rwkv7")])
def test_what_is_of_no_use_ends_with_why(state, fields, error):
    assert lines_of(("looking", {}), (state, fields)) == [{"status": "pulling manifest"}, {"error": error}]


def test_what_is_usable_and_not_served_is_a_success():
    assert lines_of(("done", {"note": "it is served after a restart"}))[-1] == {"status": "success"}
