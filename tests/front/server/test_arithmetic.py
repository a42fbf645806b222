"""--arithmetic fine, on the default model: every activation that a quantized matrix multiplies has 16 bits."""

import json
import os
import signal
import subprocess
import sys

import pytest

from chatlm.common.core import decode_core
from openai_routes import TEMPLATE_SYSTEM
from real_server import SCRIPT, ask, get, post, server, wait_for

core = decode_core()
pytestmark = pytest.mark.skipif(core is None, reason="the arithmetic is decode_core's")
QUESTION = "What is the capital of France?"        # with the template's own system prompt, for which the two differ
IN_FLOAT32 = "The capital of France is Paris."     # transformers' greedy answer, in float32 on the dequantized weights


def generated(arithmetic, isa):
    flags = ["--arithmetic", arithmetic, "-t", "0", "-m", "24", "--system", TEMPLATE_SYSTEM["content"],
             "--prompt", QUESTION]
    return subprocess.run([sys.executable, SCRIPT, "generate", *flags], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"DECODE_CORE_ISA": isa}, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.usefixtures("default_model_path")
def test_fine_answers_are_those_of_float32():
    """They are on every instruction set."""
    for isa in {*core.offered_isas()} - {"portable"}:       # which takes long, and has the bits of record
        assert generated("fine", isa) == IN_FLOAT32, isa
    assert generated("fast", core.isa()) != IN_FLOAT32      # else this shows nothing: take another question


def test_one_server_keeps_both_arithmetics_apart(default_model_path, tmp_path):
    """It also says which answer has which."""
    config = tmp_path / "both.toml"
    config.write_text("".join(f'[[models]]\nname = "{name}"\npath = "{default_model_path}"\narithmetic = "{name}"\n' for name in ("fast", "fine")))
    with server("--config", config) as (process, url):
        def answer(model, question=QUESTION):
            messages = [TEMPLATE_SYSTEM, *ask(question)["messages"]]
            found = json.load(post(url + "/v1/chat/completions", ask(question, messages=messages, model=model, max_tokens=24)))
            return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

        fast, fine = answer("fast"), answer("fine")     # of the same file, which the first has put into the prefixes' memory
        assert fast[0] != fine[0] == IN_FLOAT32 and fine[1] == 0
        assert answer("fine") == (IN_FLOAT32, 32) and answer("fast") == (fast[0], 32)
        assert {model["id"]: model["arithmetic"] for model in get(url + "/v1/models")["data"]} == {"fast": "fast", "fine": "fine"}


@pytest.mark.slow
def test_a_fine_answer_survives_its_worker(default_model_path):
    """A fine answer whose worker is killed goes on in fine arithmetic."""
    log = []
    with server("--arithmetic", "fine", "--num-workers", "2", "--no-drafts", log=log) as (process, url):
        assert any("fine arithmetic" in line for line in log)
        question = ask("Tell me about the sea.", max_tokens=100, ignore_eos=True, stream=True)

        def text(kill):
            pieces = []
            for line in post(url + "/v1/chat/completions", question):
                if line.startswith(b"data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
                if kill and len(pieces) == 40:
                    kill, (busy,) = False, (worker["pid"] for worker in get(url + "/stats")["workers"] if worker["running"])
                    os.kill(busy, signal.SIGKILL)
            return "".join(pieces)

        whole = text(kill=False)
        assert len(whole) > 200 and text(kill=True) == whole
        wait_for(process, "restarting")
