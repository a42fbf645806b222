"""A file that `quantize` writes answers in llama-server as here.

LLAMA_SERVER names llama.cpp's llama-server; without it, and without one on the PATH, the tests are skipped."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.export.gguf.export import export_gguf
from real_server import Output, free_port, post, server, wait_for

PROGRAM = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PROGRAM, reason="LLAMA_SERVER names no llama-server")]

PROMPTS = (
    "The capital of France is", "One, two, three, four,", "def fibonacci(n):\n", "Once upon a time there was a",
    "Water boils at a temperature of", "The quick brown fox jumps over", "import numpy as np\n", "Q: What is 2 + 2?\nA:",
    "Dear Sir or Madam,", "In 1969, the first man walked on", "| name | age |\n|---|---|\n| Ann |", "Les enfants jouent dans")
TOKENS = 24
NEAR = 0.5  # nats: so near are two tokens of which each server may find another likelier


@contextmanager
def llama_server(model):
    port = free_port()
    libraries = os.pathsep.join([str(Path(PROGRAM).parent), os.environ.get("LD_LIBRARY_PATH", "")])
    process = subprocess.Popen([PROGRAM, "-m", model, "-c", "1024", "-np", "1", "--host", "127.0.0.1", "--port", str(port)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"LD_LIBRARY_PATH": libraries})
    process.stdout = Output(process.stdout)
    try:
        wait_for(process, r"listening on http")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        process.stdout.thread.join(10)


def answer(url, prompt):
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 5}
    with post(f"{url}/v1/completions", body) as response:
        return json.load(response)["choices"][0]


@pytest.fixture(scope="module")
def answers(default_model_path, tmp_path_factory):
    """Kind of file -> (ours, theirs) of each prompt."""
    found = {}
    for kind in ("Q4_K_M", "Q8_0"):
        path = tmp_path_factory.mktemp("quantized") / "model.gguf"
        export_gguf(resolve_model(Settings(model=str(default_model_path))), path, type=kind)
        with server(str(path), "--no-drafts") as (_, url):
            ours = [answer(url, prompt) for prompt in PROMPTS]
        with llama_server(str(path)) as url:
            theirs = [answer(url, prompt) for prompt in PROMPTS]
        found[kind] = ours, theirs
    return found


@pytest.mark.parametrize("kind", ("Q4_K_M", "Q8_0"))
def test_greedy_answers_are_those_of_llama_server(kind, answers):
    """Until two tokens are about equally likely, so that rounding decides; from there on texts differ."""
    shares = []
    for prompt, ours, theirs in zip(PROMPTS, *answers[kind]):
        tokens = ours["logprobs"]["tokens"]
        agreed = 0
        while agreed < len(tokens) and theirs["text"].startswith("".join(tokens[:agreed + 1])):
            agreed += 1
        shares.append(agreed / len(tokens))
        if agreed < len(tokens):
            likeliest = ours["logprobs"]["top_logprobs"][agreed]
            rest = theirs["text"][len("".join(tokens[:agreed])):]
            chosen = [value for text, value in likeliest.items()
                      if (text and rest.startswith(text) if rest else text.startswith("<|"))]  # theirs may have ended
            assert chosen and max(likeliest.values()) - max(chosen) < NEAR, (prompt, ours["text"], theirs["text"])
    assert sum(shares) / len(shares) > 0.5, shares
