"""Every route is asked and every command is run once, as an installation has them. CI runs this here, and where neither torch nor a
compiler is.

What an answer says is tested elsewhere. Here: nothing is forgotten, nothing ends with a traceback or a 5xx.
"""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from importlib.util import find_spec

import pytest

import chat_server
import fake_tools
from chatlm.commands import COMMANDS
from chatlm.common.core import decode_core
from chatlm.front.front import ROUTES
from fake_hub import fake_hub
from forked import run_command
from real_server import SCRIPT, server
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, sentencepiece_metadata

TEMPLATE = {"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "general.architecture": "llama"}
QUESTION = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 4}
BATCH_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": QUESTION}
pytestmark = pytest.mark.timeout(600)


class Asking:
    """A client that remembers which routes it has asked."""

    def __init__(self, url):
        self.address = urllib.parse.urlsplit(url).netloc
        self.asked = set()
        self.wrong = []

    def __call__(self, method, route, body=None, status=200, query="", content_type="application/json", space="", **names):
        """Ask a route, whose {names} are filled in; returns the JSON of the answer, or its bytes."""
        self.asked.add((method, route))
        path = re.sub(r"{(\w+)(:[^}]*)?}", lambda match: urllib.parse.quote(names[match[1]]), route)
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        connection = http.client.HTTPConnection(self.address, timeout=120)
        headers = {"X-Chat-Space": space} if space else {}
        connection.request(method, path + query, data, headers | ({"Content-Type": content_type} if data is not None else {}))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if response.status != status:
            self.wrong.append((method, path, response.status, content[:300]))
        try:
            return json.loads(content)
        except ValueError:
            return content

    def until(self, holds, method, route, **more):
        """Ask until the answer is as it should be."""
        ends = time.monotonic() + 120
        while not holds(answer := self(method, route, **more)):
            assert time.monotonic() < ends, answer
            time.sleep(0.05)        # between two questions to a process of its own
        return answer


def form(**parts):
    """A multipart body, (its bytes, its type); a part is a text or (file name, bytes)."""
    lines = []
    for name, part in parts.items():
        file, data = part if isinstance(part, tuple) else (None, part.encode())
        more = f'; filename="{file}"' if file else ""
        lines.append(f'--cut\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data)
    return b"\r\n".join([*lines, b"--cut--\r\n"]), "multipart/form-data; boundary=cut"


def ask_what_computes(ask):
    """Every route that a model answers."""
    ask("POST", "/chat/completions", QUESTION)
    for root in ("/v1", "/api/v0"):
        ask("POST", f"{root}/chat/completions", QUESTION)
        ask("POST", f"{root}/completions", {"prompt": "One, two,", "max_tokens": 3})
    ask("POST", "/infill", {"input_prefix": "a", "input_suffix": "b"}, status=400)      # the model has no tokens for it
    ask("POST", "/v1/messages", QUESTION)
    ask("POST", "/v1/messages/count_tokens", QUESTION)
    ask("POST", "/api/chat", {"messages": QUESTION["messages"], "stream": False, "options": {"num_predict": 3}})
    ask("POST", "/api/generate", {"prompt": "One, two,", "stream": False, "options": {"num_predict": 3}})
    for route in ("/v1/embeddings", "/api/v0/embeddings", "/api/embed"):
        ask("POST", route, {"input": "One, two"})
    ask("POST", "/api/embeddings", {"prompt": "One, two"})
    ask("POST", "/embed", {"inputs": "One, two"})
    documents = {"query": "tea", "documents": ["green tea", "a stone"]}
    for route in ("/v1/rerank", "/v2/rerank", "/rerank", "/reranking", "/v1/reranking"):
        ask("POST", route, documents, status=400)       # the model is no reranker
    for route in ("/v1/score", "/score"):
        ask("POST", route, {"text_1": "tea", "text_2": ["green tea", "a stone"]}, status=400)
    ask("POST", "/v1/compare", {**QUESTION, "models": ["default", "default"]})
    tokens = ask("POST", "/tokenize", {"content": "One, two"})["tokens"]
    ask("POST", "/detokenize", {"tokens": tokens})
    ask("POST", "/apply-template", {"messages": QUESTION["messages"]})
    ask("GET", "/tokenizer_info")
    name = ask("GET", "/api/v0/models")["data"][0]["id"]
    ask("GET", "/api/v0/models/{name:.+}", name=name)
    ask("GET", "/props")
    ask("GET", "/slots")
    ask("POST", "/v1/cancel/{id}", status=404, id="nobody")
    ask("GET", "/v1/streams/{id}", status=404, id="nobody")
    ask("POST", "/extract", b"One, two", query="?name=a.txt", content_type="text/plain")
    ask("POST", "/extract", b"\x00\x01\xff" * 9, status=400, query="?name=a.bin")    # no document


def ask_what_is_kept(ask):
    """Every route of --database."""
    body, content_type = form(purpose="batch", file=("a.jsonl", json.dumps(BATCH_LINE).encode()))
    file = ask("POST", "/v1/files", body, content_type=content_type)["id"]
    ask("GET", "/v1/files")
    ask("GET", "/v1/files/{id}", id=file)
    ask("GET", "/v1/files/{id}/content", id=file)
    batch = ask("POST", "/v1/batches", {"input_file_id": file, "endpoint": BATCH_LINE["url"], "completion_window": "24h"})["id"]
    ask("GET", "/v1/batches")
    done = ask.until(lambda batch: batch["status"] == "completed", "GET", "/v1/batches/{id}", id=batch)
    assert done["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    ask("POST", "/v1/batches/{id}/cancel", status=409, id=batch)        # it is over
    ask("DELETE", "/v1/files/{id}", id=file)
    ask("POST", "/v1/responses/input_tokens", {"input": "Say yes."})
    answer = ask("POST", "/v1/responses", {"input": "Say yes.", "max_output_tokens": 16})["id"]
    ask("POST", "/v1/responses/{id}/cancel", id=answer)
    ask("GET", "/v1/responses/{id}", id=answer)
    ask("GET", "/v1/responses/{id}/input_items", id=answer)
    ask("DELETE", "/v1/responses/{id}", id=answer)
    own = {"kind": "chat", "id": "0" * 32, "patch": {"created": 1, "title": "Yes"}}
    assert ask("POST", "/v1/chats/changes", {"changes": [own]}, space="A" * 22)["data"][0]["state"] == "stored"
    ask("GET", "/v1/chats/changes", space="A" * 22)
    ask("GET", "/v1/chats", space="A" * 22)
    ask("GET", "/v1/chats/{id}", id=own["id"], space="A" * 22)
    ask("GET", "/v1/chats/search", query="?q=yes", space="A" * 22)
    ask("GET", "/v1/chats/export", space="A" * 22)
    picture = ask("POST", "/v1/chats/files", b"\x89PNG\r\n\x1a\n", content_type="image/png", space="A" * 22)["id"]
    ask("GET", "/v1/chats/files/{sha256}", sha256=picture, space="A" * 22)
    ask("DELETE", "/v1/chats/{id}", id=own["id"], space="A" * 22)
    ask("DELETE", "/v1/chats", query="?count=0", space="A" * 22)
    chat = ask("POST", "/v1/conversations", {})["id"]
    ask("GET", "/v1/conversations/{id}", id=chat)
    ask("POST", "/v1/conversations/{id}", {"metadata": {"topic": "yes"}}, id=chat)
    item = ask("POST", "/v1/conversations/{id}/items", {"items": [{"role": "user", "content": "hello"}]}, id=chat)["data"][0]["id"]
    ask("GET", "/v1/conversations/{id}/items", id=chat)
    ask("GET", "/v1/conversations/{id}/items/{item}", id=chat, item=item)
    ask("DELETE", "/v1/conversations/{id}/items/{item}", id=chat, item=item)
    ask("DELETE", "/v1/conversations/{id}", id=chat)
    ask("GET", "/v1/usage")


def ask_about_vector_stores(ask):
    """Every route of vector stores. Nothing embeds here: tests/front/annexes/knowledge/ has a real embedder."""
    ask("POST", "/v1/vector_stores", {"name": "zoo"}, status=409)
    ask("GET", "/v1/vector_stores")
    store = {"id": "vs_none", "status": 404}
    ask("GET", "/v1/vector_stores/{id}", **store)
    ask("POST", "/v1/vector_stores/{id}", {"name": "new"}, **store)
    ask("DELETE", "/v1/vector_stores/{id}", **store)
    ask("POST", "/v1/vector_stores/{id}/search", {"query": "cats"}, **store)
    ask("POST", "/v1/vector_stores/{id}/files", {"file_id": "file-none"}, **store)
    ask("GET", "/v1/vector_stores/{id}/files", **store)
    file = {**store, "file": "file-none"}
    ask("GET", "/v1/vector_stores/{id}/files/{file}", **file)
    ask("POST", "/v1/vector_stores/{id}/files/{file}", {"attributes": {}}, **file)
    ask("DELETE", "/v1/vector_stores/{id}/files/{file}", **file)
    ask("GET", "/v1/vector_stores/{id}/files/{file}/content", **file)
    ask("POST", "/v1/vector_stores/{id}/file_batches", {"file_ids": ["file-none"]}, **store)
    batch = {**store, "batch": "vsfb_none"}
    ask("GET", "/v1/vector_stores/{id}/file_batches/{batch}", **batch)
    ask("POST", "/v1/vector_stores/{id}/file_batches/{batch}/cancel", **batch)
    ask("GET", "/v1/vector_stores/{id}/file_batches/{batch}/files", **batch)


def ask_about_models(ask):
    """Every route that lists, loads or fetches models."""
    default = ask("GET", "/v1/models")["data"][0]["id"]
    ask("GET", "/models")
    ask("GET", "/v1/models/{name:.+}", name=default)
    ask("GET", "/v1/runs")
    ask("GET", "/v1/runs/{tag:.+}", tag="d4")
    ask("GET", "/api/tags")
    ask("GET", "/api/ps")
    ask("POST", "/api/show", {"model": default})
    ask("GET", "/api/version")
    ask("POST", "/models/unload", {"model": default})
    ask("POST", "/models/load", {"model": default})
    ask("GET", "/models/exports")
    ask("GET", "/v1/tools")
    assert ask("POST", "/v1/tools/call", {"name": "fake__add", "arguments": {"a": 1, "b": 2}})["text"] == "3"
    ask("POST", "/models/export", {"model": default, "name": "made"})
    ask("GET", "/models/hub")
    ask("GET", "/models/hub/{name:.+}", name="org/small")
    ask("POST", "/models/download", {"model": "org/small"}, status=202)
    ask("GET", "/models/downloads")         # until it has arrived
    ask("POST", "/models/cancel", {"model": "org/small"}, status=404)       # it has arrived
    ask("POST", "/models/delete", {"model": "org/small"})
    ask("POST", "/api/pull", {"model": "org/small", "stream": False})
    ask("DELETE", "/api/delete", {"model": "org/small"})


def ask_what_is_open(ask):
    """The page, and what a monitor asks."""
    ask("GET", "/")
    ask("GET", "/static/{name:.+}", name="page.js")
    ask("GET", "/usage")
    for route in ("/health", "/livez", "/readyz", "/stats", "/stats/history", "/metrics", "/openapi.json"):
        ask("GET", route)


def test_every_route_answers(nanochat_fixtures, tmp_path):
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "run")
    text = sentencepiece_metadata()
    small = gguf_bytes({**LLAMA_NUMBERS, **text, **TEMPLATE}, random_llama(vocab=len(text["tokenizer.ggml.tokens"])))
    (tmp_path / "tiny.gguf").write_bytes(small)
    log = []
    with fake_hub(org__small={"small.gguf": small}) as hub:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CHAT_SERVER_"))}
        env = ours | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        tools = tmp_path / "mcp.json"
        tools.write_text(json.dumps({"mcpServers": {"fake": {"command": sys.executable, "args": [fake_tools.__file__]}}}))
        flags = ["--mcp-config", tools, "--watch", tmp_path / "run", "--database", tmp_path / "kept.db", "--kv-cache-memory", "64M", "--nice", "0", "--idle-unload", "600",
                 "--export-folder", tmp_path / "exports"]
        with server(tmp_path / "tiny.gguf", *flags, env=env, log=log) as (process, url):
            ask = Asking(url)
            for part in (ask_what_computes, ask_what_is_kept, ask_about_vector_stores, ask_about_models, ask_what_is_open):
                part(ask)
            process.terminate()
            log.extend(process.stdout)
    assert ask.wrong == [], "\n".join(map(str, ask.wrong))
    assert {(route.method, route.path) for route in ROUTES} - ask.asked == set()
    assert [line for line in log if re.search("Traceback|unexpected error", line)] == [], "".join(log)


def run(*words, status=0, forked=True):
    """The stdout of a command of the program, which a forked process runs, or one that Python starts."""
    words = list(map(str, words))
    if forked and sys.platform == "linux":
        done = run_command(SCRIPT, words, os.environ)
    else:
        done = subprocess.run([sys.executable, str(SCRIPT), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == status and "Traceback" not in done.stderr, (words, done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def test_every_command_runs(default_model_path, nanochat_fixtures, tmp_path):
    tiny = nanochat_fixtures / "gen5"       # what a command computes is tested elsewhere; `generate` here runs the default model
    small = "--kv-cache-memory", "64M"
    texts, lines, out = tmp_path / "texts.jsonl", tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    texts.write_text('"One, two"\n"three"\n')
    lines.write_text(json.dumps(BATCH_LINE) + "\n")
    suite = tmp_path / "questions.jsonl"
    suite.write_text(json.dumps({"context": "One, two,", "continuation": " three"}) + "\n")
    texts_to_read = tmp_path / "book.txt"
    texts_to_read.write_text("It was the best of times, it was the worst of times. " * 10)
    ran = {
        "chat": run("chat", tiny, "-p", "Say yes.", "-m", "4", *small),
        "generate": run("generate", default_model_path, "-p", "The capital of Japan is", "-m", "12", "-t", "0", *small, forked=False),
        "compare": run("compare", tiny, nanochat_fixtures / "gen4", "-p", "Say yes.", "-m", "4", *small),
        "score": run("score", tiny, "--text", texts, *small),
        "eval": run("eval", tiny, "--suite", suite, "--results", tmp_path / "results", *small),
        "embed": run("embed", tiny, texts, "-o", tmp_path / "vectors.npy", "--nice", "0", *small) or "-",
        "batch": run("batch", tiny, lines, "-o", out, *small) or "-",
        "check": run("check", tiny),
        "imatrix": run("imatrix", tiny, "-f", texts_to_read, "-o", tmp_path / "imatrix.gguf", "--chunks", "1"),
        "quantize": run("quantize", tiny, "-o", tmp_path / "gen5.gguf"),
    }
    assert ran.keys() == {command.name for command in COMMANDS if command.run} - {"serve"} and all(ran.values())
    assert "Tokyo" in ran["generate"] and json.loads(out.read_text())["response"]["status_code"] == 200
    lines = {
        "store": run("store", tmp_path / "nothing", status=2) or "-",
        # test_bundle.py makes bundles, where torch is
        "bundle": (run("bundle", tmp_path / "chat_server.pyz") if find_spec("torch") is None
                   else run("bundle", "--verify", tmp_path / "nothing", status=2) or "-"),
        "export": run("export", nanochat_fixtures / "gen6", "-o", tmp_path / "exported"),
        "push": run("push", tmp_path / "exported", "nowhere", status=2) or "-"}
    assert lines.keys() == {command.name for command in COMMANDS if command.lines} and all(lines.values())
    assert "as nanochat_generations in float32" in lines["export"]
    assert "chat_server" in run("--version")


@pytest.mark.skipif(find_spec("torch") is not None, reason="there is torch: tests/core/test_check.py checks them, in a minute")
@pytest.mark.skipif(decode_core() is None, reason="the compiled core is not installed")
def test_the_kernels_are_checked_without_torch():
    assert "no op is wrong" in run("check")
