"""Clients by others, each used as its users do, against the default model in a real server.

The Python ones share a virtual environment of 888 MB, so their tests are marked slow; the others use a
node_modules. Both are in build-peers/ and are made again when the list of packages changes. Without a network
the tests are skipped with that reason. (test_openai_client.py tests the `openai` package.)
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chat_server
from engines import load
from real_server import server

HERE, HOME = Path(__file__).parent, Path(__file__).parents[2] / "build-peers"
INSTALL_S, RUN_S = 300, 170
ANSWER = "The capital of Japan is Tokyo."
pytestmark = pytest.mark.timeout(INSTALL_S + RUN_S + 60)


def made(name, source, *commands):
    """The folder build-peers/`name`, made by `commands` from the file `source`. Skips the tests if that fails
    or takes too long."""
    folder, text = HOME / name, (HERE / source).read_bytes()
    stamp = folder / "made-from"
    digest = hashlib.sha256(text + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / source).write_bytes(text)
    for command in commands:
        try:
            done = subprocess.run(command, cwd=folder, timeout=INSTALL_S, capture_output=True, text=True)
        except (subprocess.TimeoutExpired, OSError) as error:
            pytest.skip(f"the peers' packages could not be installed: {error}")
        if done.returncode:
            pytest.skip(f"the peers' packages could not be installed: {done.stderr.strip()[-300:]}")
    stamp.write_text(digest)
    return folder


@pytest.fixture(scope="module")
def python():
    venv = [sys.executable, "-m", "venv", "--without-pip", "venv"]
    pip = [sys.executable, "-m", "pip", "--python", "venv/bin/python", "install", "--quiet", "--no-deps", "--no-compile",
           "--disable-pip-version-check", "--retries", "1", "-r", "requirements.txt"]
    return made("python", "requirements.txt", venv, pip) / "venv/bin/python"


@pytest.fixture(scope="module")
def node():
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    return made("node", "package.json", ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"])


@pytest.fixture(scope="module")
def url(default_model_path):
    with server(default_model_path) as (_, url):
        yield url


def outcome(command, *arguments, cwd=None):
    """Run a client; returns the JSON on the last line that it prints."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(HOME / "hf"), "LANGSMITH_TRACING": "false", "AI_SDK_LOG_WARNINGS": "false"}
    done = subprocess.run([*map(str, command), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=RUN_S,
                          env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_langchain_chats_streams_scores_and_gets_objects(python, url):
    found = outcome([python, HERE / "langchain_peer.py"], url)
    assert found["text"] == found["streamed"] == ANSWER and found["batch"] == [ANSWER, ANSWER] and found["with_system"]
    assert found["finish_reason"] == "stop" and found["usage"] == found["streamed_usage"] == 8 and found["logprobs"] == 7
    assert found["city"] is None or set(found["city"]) == {"city", "big"}
    assert found["tools"] == "tools_not_supported"


@pytest.mark.slow
def test_litellm_completes_streams_and_maps_errors(python, url):
    found = outcome([python, HERE / "litellm_peer.py"], url)
    assert found["text"] == found["streamed"] == ANSWER and found["choices"] == 2 and found["finish_reason"] == "stop"
    assert found["streamed_usage"] == [8] and (found["cut"], found["logprobs"]) == ("length", 3)
    assert set(found["shaped"]) == {"big"} and found["raw"] == " Tokyo" and found["unknown_model"] == 404


@pytest.mark.slow
def test_lm_eval_scores_and_generates_alone_and_in_batches(python, url, tmp_path, default_model_path):
    """The likelier endings win, and ids in batches give the same numbers as texts one by one."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes(load(default_model_path).text.payload)
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    found = outcome([python, HERE / "lm_eval_peer.py"], url, tokenizer, tmp_path)
    single, batched = found["1"], found["4"]
    assert single["acc"] == batched["acc"] == 1.0
    assert single["generated"][:2] == batched["generated"][:2] == [" Paris", " Tokyo"]
    for one, other in zip(single["loglikelihoods"], batched["loglikelihoods"], strict=True):
        assert one == pytest.approx(other, abs=0 if chat_server.decode_core() else 0.3)


def test_vercels_ai_package_generates_streams_and_gets_objects(node, url):
    script = shutil.copy(HERE / "vercel_peer.mjs", node)        # beside its node_modules, where node looks for them
    found = outcome(["node", script], url, cwd=node)
    assert found["text"] == found["streamed"] == ANSWER and found["finish_reason"] == found["streamed_finish"] == "stop"
    assert found["usage"] == found["streamed_usage"] == 8 and found["completion"]
    assert found["shaped"]["city"] in ("Tokyo", "Kyoto") and found["tools"] == 400
