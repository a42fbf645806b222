"""Clients by others, each used as its users do, against the default model in a real server.

The Python ones share a virtual environment of 888 MB, so their tests are marked slow; the others use a
node_modules. Both are in build-peers/ and are made again when the list of packages changes. Without a network
the tests are skipped with that reason. (test_openai_client.py tests the `openai` package.)
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import gguf
import pytest

from agent_conversations import AGENTS, conversations, repository, run
from browsing import fake_front
from chatlm.common.core import decode_core
from chatlm.front.server.describe import OLLAMA_VERSION
from engines import load
from fake_hub import fake_hub
from peer_packages import HOME, INSTALL_S, NPM, made, made_venv
from real_server import server
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

HERE, RUN_S, AGENT_S = Path(__file__).parent, 170, 900
ANSWER = "The capital of Japan is Tokyo."
pytestmark = pytest.mark.timeout(INSTALL_S + RUN_S + 60)


@pytest.fixture(scope="module")
def python():
    return made_venv("python", "requirements.txt")


@pytest.fixture(scope="module")
def agents():
    """The folder of the programs of the command-line agents."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    return made("agents", "agents.json", NPM, called="package.json") / "node_modules/.bin"


@pytest.fixture
def stand_in_url():
    """The real HTTP side over a pool without a model: the agents' prompts have up to 20,000 tokens, which takes
    the default model minutes on a busy machine."""
    with fake_front(ANSWER.partition("Tokyo"), tool_format="tagged") as url:
        yield url.rstrip("/")


@pytest.fixture(scope="module")
def long_url(default_model_path, tmp_path_factory):
    """A server of the default model that says its context is 40,960 tokens: the agents' prompts have up to 20,000.
    Beyond its own 8,192 it writes nonsense, of which each answer has 40 tokens."""
    path = shutil.copy(default_model_path, tmp_path_factory.mktemp("long") / "long.gguf")
    gguf.GGUFReader(path, "r+").get_field("llama.context_length").parts[-1][0] = 40_960
    log = []
    with server(path, "-m", "40", "--no-drafts", log=log) as (process, url):
        threading.Thread(target=lambda: log.extend(process.stdout), daemon=True).start()
        yield url


@pytest.fixture(scope="module")
def node():
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    return made("node", "package.json", NPM)


@pytest.fixture(scope="module")
def url(default_model_path):
    with server(default_model_path) as (_, url):
        yield url


def outcome(command, *arguments, cwd=None, limit_s=RUN_S):
    """Run a client; returns the JSON on the last line that it prints."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(HOME / "hf"), "LANGSMITH_TRACING": "false", "AI_SDK_LOG_WARNINGS": "false"}
    done = subprocess.run([*map(str, command), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=limit_s,
                          env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_langchain_chats_and_gets_objects(python, url):
    """It streams and scores too."""
    found = outcome([python, HERE / "langchain_peer.py"], url)
    assert found["text"] == found["streamed"] == ANSWER and found["batch"] == [ANSWER, ANSWER] and found["with_system"]
    assert found["finish_reason"] == "stop" and found["usage"] == found["streamed_usage"] == 8 and found["logprobs"] == 7
    assert found["city"] is None or set(found["city"]) == {"city", "big"}
    assert found["tools"] is None


@pytest.mark.slow
def test_litellm_completes_and_maps_errors(python, url):
    """It streams too."""
    found = outcome([python, HERE / "litellm_peer.py"], url)
    assert found["text"] == found["streamed"] == ANSWER and found["choices"] == 2 and found["finish_reason"] == "stop"
    assert found["streamed_usage"] == [8] and (found["cut"], found["logprobs"]) == ("length", 3)
    assert set(found["shaped"]) == {"big"} and found["raw"] == " Tokyo" and found["unknown_model"] == 404


@pytest.mark.slow
def test_lm_eval_scores_alone_and_in_batches(python, url, tmp_path, default_model_path):
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
        assert one == pytest.approx(other, abs=0 if decode_core() else 0.3)


@pytest.mark.slow
def test_lm_eval_gets_what_nanochat_computes(python, nanochat_fixtures, tmp_path):
    """With the server's tokenizer and eight requests at a time: log-likelihoods, whether they are greedy, texts longer than the window,
    generated text."""
    torch = Path(importlib.util.find_spec("torch").origin).parents[1]
    with server(nanochat_fixtures / "gen1", "--source", "mid", "--dtype", "float32") as (_, url):
        found = outcome([python, HERE / "lm_eval_twin_peer.py"], url, nanochat_fixtures / "gen1", tmp_path, torch)
    theirs, ours = found["hf"], found["server"]
    assert {name: len(items) for name, items in ours.items()} == {"choose": 24, "roll": 24, "go_on": 24}
    for item, other in zip(ours["choose"], theirs["choose"], strict=True):
        assert [score for score, _ in item] == pytest.approx([score for score, _ in other], abs=1e-4)
        assert [greedy for _, greedy in item] == [greedy for _, greedy in other]
    assert [score for score, in ours["roll"]] == pytest.approx([score for score, in theirs["roll"]], rel=1e-4, abs=1e-4)
    mine, other = ([text.rstrip("\ufffd") for text, in found[name]["go_on"]] for name in ("server", "hf"))     # here a cut character has no mark
    assert mine == other and len({*mine}) > 12


@pytest.mark.slow
def test_inspect_ai_chats_and_scores_prompts(nanochat_fixtures, url, tmp_path):
    """On the default model and, with token ids, on a nanochat checkpoint, whose first log-probability upstream's code has found."""
    python = made_venv("inspect", "inspect.txt")
    prompts = [[1, 504, 3575, 282, 4649, 314, 7042, 30], [1, 504, 3575]]
    found = outcome([python, HERE / "inspect_peer.py"], url, tmp_path, json.dumps(prompts))
    assert found["accuracy"] == 1.0 and [len(each) for each in found["each"]] == [7, 2]
    assert found["each"][1] == pytest.approx(found["each"][0][:2], abs=0 if decode_core() else 0.3)
    with server(nanochat_fixtures / "gen5", "--dtype", "float32") as (_, tiny):
        oracle = json.loads((nanochat_fixtures / "gen5/oracle.json").read_text())["cases"][0]
        found = outcome([python, HERE / "inspect_peer.py"], tiny, tmp_path, json.dumps([oracle["prompt_ids"] + oracle["greedy"][:4]]))
    likely = found["each"][0][len(oracle["prompt_ids"]) - 1:]           # of tokens that upstream's greedy answer has
    logits = oracle["next_logits"]
    assert likely[0] == pytest.approx(logits[oracle["greedy"][0]] - math.log(math.fsum(map(math.exp, logits))), abs=1e-3)
    assert len(likely) == 4 and found["sums"][0] == pytest.approx(sum(found["each"][0]))


@pytest.mark.slow
def test_other_apis_packages_get_the_same(url):
    """openai's Responses, anthropic's Messages and ollama's package."""
    found = outcome([made_venv("apis", "apis.txt"), HERE / "apis_peer.py"], url)
    responses, messages, ollama = found["responses"], found["messages"], found["ollama"]
    assert responses["text"] == responses["streamed"] == responses["deltas"] == ANSWER and responses["last"] == "response.completed"
    assert messages["text"] == messages["streamed"] == messages["final"] == ANSWER and messages["stop"] == ["end_turn", "tool_use"]
    assert ollama["text"] == ollama["streamed"] == ollama["generated"] == ANSWER and ollama["models"] == 1
    assert {each["tokens"] for each in found.values()} == {8} and responses["call"] == messages["call"] == ["add", ["a"]]
    assert responses["with_system"] and responses["later"] and messages["later"] and messages["counted"] > 10
    assert responses["shaped"] == "bool" and "big" in ollama["shaped"] and ollama["capabilities"] == ["completion", "tools"]
    assert responses["logprobs"] == [7, 7, 7] and ollama["logprobs"] == [7, 2, 7] and responses["skipped"] == "web_search_call" and messages["read"]
    assert (responses["missing"], messages["missing"], ollama["missing"]) == (404, "not_found_error", 404)


@pytest.mark.slow
def test_ollamas_package_pulls_and_deletes_a_model(tmp_path, nanochat_fixtures):
    """From a hub on loopback, into a cache of its own."""
    numbers = LLAMA_NUMBERS | {"llama.feed_forward_length": 8192}
    text = {**small_gguf_metadata("gpt-2"), "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    data = gguf_bytes({**numbers, **text}, random_llama(numbers=numbers))
    with fake_hub(org__large={"large.gguf": data}) as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CHAT_SERVER_"))}
        env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        with server("--models", nanochat_fixtures / "gen5", "--kv-cache-memory", "4M", env=env) as (_, of_many):
            found = outcome([made_venv("apis", "apis.txt"), HERE / "pull_peer.py"], of_many)
    assert [found["steps"][0][0], found["steps"][-1][0], found["again"], found["deleted"]] == ["pulling manifest", "success", "success", "success"]
    assert [len(data)] * 2 in [step[1:] for step in found["steps"]] and found["pulled"][1:] == ["org/large:latest"] and len(found["left"]) == 1
    assert found["tokens"] == 3 and found["missing"] == [404, 500]


@pytest.mark.slow
def test_the_classes_of_openresponses_read_all(url):
    """What its suite asks over HTTP. The default model calls nothing on its own, but writes on and on, so that answer is cut."""
    found = outcome([made_venv("openresponses", "openresponses.txt"), HERE / "openresponses_peer.py"], url)
    statuses = dict.fromkeys(found, "completed") | {"tool-calling": "incomplete"}
    assert {name: (status, last) for name, (status, _, last) in found.items()} == {name: (word, f"response.{word}") for name, word in statuses.items()}
    assert len(found) == 7 and all(items for _, items, _ in found.values()) and found["required call"][1] == ["function_call"]


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
async def test_an_agent_edits_a_file_as_it_was_recorded(agents, name):
    """In as many requests as in tests/fixtures/agents/conversations, with the same tools. The model's words are a script's."""
    with repository() as folder:
        rows = [row["body"] for row in await run(name, agents / name, folder) if row["body"]]
    [recorded] = [[row["body"] for row in rows if row["body"]] for known, _, rows in conversations() if known == name]
    assert [names_of_tools(body) for body in rows] == [names_of_tools(body) for body in recorded]


def names_of_tools(body):
    return [tool.get("name") or tool.get("function", tool).get("name") for tool in body.get("tools", ())]


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_S + AGENT_S + 60)
def test_answers_of_declared_types_are_whole(url):
    """The form, not the sense. OpenAI's two parse helpers, instructor in two modes, pydantic-ai and Anthropic's tools."""
    found = outcome([made_venv("typed", "typed.txt"), HERE / "typed_peer.py"], url, *range(20), limit_s=AGENT_S)
    assert found == dict.fromkeys(("chat.completions.parse", "responses.parse", "instructor", "instructor, JSON", "pydantic-ai", "anthropic"), {})


def run_agent(command, home, limit_s=RUN_S, **environment):
    """What a command-line agent prints; it has nothing of this machine's own settings."""
    done = subprocess.run([*map(str, command)], cwd=home, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL,
                          env={"PATH": os.environ["PATH"], "HOME": str(home), **environment})
    cut = "output token maximum" in done.stdout     # as Claude Code says, with status 1, of an answer that is cut
    assert (done.returncode == 0 or cut) and done.stdout.strip(), done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def run_codex(agents, url, home, limit_s=RUN_S):
    provider = f'{{name="here", base_url="{url.rstrip("/")}/v1", wire_api="responses", request_max_retries=0, stream_max_retries=0}}'
    return run_agent([agents / "codex", "exec", "--skip-git-repo-check", "--sandbox", "read-only", "-c", "model=default", "-c", "model_provider=here",
                      "-c", f"model_providers.here={provider}", "What is the capital of Japan?"], home, limit_s)


def run_claude(agents, url, home, limit_s=RUN_S):
    return run_agent([agents / "claude", "-p", "What is the capital of Japan?"], home, limit_s, ANTHROPIC_BASE_URL=url, ANTHROPIC_AUTH_TOKEN="none",
                     ANTHROPIC_MODEL="default", ANTHROPIC_DEFAULT_HAIKU_MODEL="default", CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
                     DISABLE_AUTOUPDATER="1", CLAUDE_CODE_MAX_OUTPUT_TOKENS="64")


@pytest.mark.slow
def test_codex_answers_through_responses(agents, stand_in_url, tmp_path):
    assert ANSWER in run_codex(agents, stand_in_url, tmp_path)


@pytest.mark.slow
def test_claude_code_answers_through_messages(agents, stand_in_url, tmp_path):
    assert run_claude(agents, stand_in_url, tmp_path).strip() == ANSWER


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_S + AGENT_S + 60)
@pytest.mark.parametrize("run, route", [(run_codex, "/v1/responses"), (run_claude, "/v1/messages")])
def test_agents_print_what_the_default_model_writes(agents, long_url, tmp_path, run, route):
    """They exit with 0, and the model has computed their whole prompts."""
    before = answered(long_url, route)
    assert run(agents, long_url, tmp_path, AGENT_S).strip()
    (count, tokens), (later, more) = before, answered(long_url, route)
    assert later > count and more - tokens > 2000


def answered(url, route):
    """How many requests of a route the server has answered with 200, and how many prompt tokens it has computed."""
    lines = urllib.request.urlopen(url + "/metrics").read().decode().splitlines()
    count = [line for line in lines if f'route="{route}"' in line and 'status="200"' in line]
    tokens = [line for line in lines if line.startswith('chat_server_tokens_total{kind="prompt')]
    return sum(float(line.split()[-1]) for line in count), sum(float(line.split()[-1]) for line in tokens)


@pytest.mark.slow
def test_agents_and_litellm_use_the_newer_routes(url):
    """They are OpenAI's agents, LangChain and LiteLLM with its proxy."""
    found = outcome([made_venv("clients", "clients.txt"), HERE / "clients_peer.py"], url)
    agents, langchain, litellm, proxy = (found[name] for name in ("agents", "langchain", "litellm", "proxy"))
    assert agents["text"] == agents["streamed"] == ANSWER and agents["last"] == "response.completed"
    assert agents["called"] in ("it is True", "it is False") and langchain["call"] == ["switch", ["on"]]
    assert langchain["text"] == langchain["streamed"] == ANSWER and langchain["usage"] == 8
    assert litellm["openai"] == litellm["anthropic"] == [ANSWER, ANSWER] and litellm["responses"] == ANSWER
    assert proxy["text"] == proxy["streamed"] == proxy["responses"] == ANSWER
    assert langchain["vectors"] == litellm["vectors"] == [2, 576] and proxy["vector"] == 576


@pytest.mark.slow
def test_vercels_package_streams_and_gets_objects(node, url):
    """It generates whole answers too."""
    script = shutil.copy(HERE / "vercel_peer.mjs", node)        # beside its node_modules, where node looks for them
    found = outcome(["node", script], url, cwd=node)
    assert found["text"] == found["streamed"] == ANSWER and found["finish_reason"] == found["streamed_finish"] == "stop"
    assert found["usage"] == found["streamed_usage"] == 8 and found["completion"]
    assert found["shaped"]["city"] in ("Tokyo", "Kyoto") and found["tools"] is None
    assert found["responses"] == found["responses_streamed"] == ANSWER      # its default provider asks for /v1/responses


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_S + AGENT_S)
def test_open_webui_answers_through_ollama_s_routes(url, tmp_path):
    """It finds the model by its tag, and asks for /api/ps, /api/show and both routes of embeddings."""
    found = outcome([made_venv("open_webui", "open_webui.txt"), HERE / "open_webui_peer.py"], url, tmp_path / "data", limit_s=500)
    name = "SmolLM2-135M-Instruct.Q4_1:latest"
    assert found == {"models": [name], "text": ANSWER, "streamed": ANSWER, "loaded": [name], "version": OLLAMA_VERSION, "family": "llama",
                     "vector": 576, "older_vector": 576}


@pytest.mark.slow
def test_ray_replicas_outlive_a_node_and_the_head(default_model_path):
    python = made_venv("ray", "ray.txt")
    done = subprocess.run([python, HERE / "ray_peer.py", HERE.parents[1]], capture_output=True, text=True, timeout=RUN_S + INSTALL_S,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "without its head:" in done.stdout
