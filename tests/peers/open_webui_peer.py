"""open-webui in front of the server at the URL, which it takes for Ollama's: prints what its users would get.

    python open_webui_peer.py URL FOLDER
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

URL, FOLDER = sys.argv[1], Path(sys.argv[2])
QUESTION = "What is the capital of Japan?"
START_S = 400
SETTINGS = {"OLLAMA_BASE_URL": URL, "DATA_DIR": str(FOLDER), "STATIC_DIR": str(FOLDER / "static"), "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "x",
            "ENABLE_OPENAI_API": "False", "RAG_EMBEDDING_ENGINE": "ollama", "OFFLINE_MODE": "True", "ANONYMIZED_TELEMETRY": "False",
            "ENABLE_TITLE_GENERATION": "False", "ENABLE_TAGS_GENERATION": "False", "ENABLE_FOLLOW_UP_GENERATION": "False"}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def ask(path, body=None, token="", raw=False):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(base + path, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=100) as response:
        return response.read().decode() if raw else json.load(response)


def wait_until_it_answers():
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            return ask("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise SystemExit("open-webui does not start:\n" + (FOLDER / "log").read_text()[-3000:])


FOLDER.mkdir(exist_ok=True)
base = f"http://127.0.0.1:{(port := free_port())}"
command = [Path(sys.executable).with_name("open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)]
with open(FOLDER / "log", "wb") as log:
    process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=FOLDER, env=os.environ | SETTINGS)
try:
    wait_until_it_answers()
    token = ask("/api/v1/auths/signin", {"email": "", "password": ""})["token"]
    models = [model["id"] for model in ask("/api/models", token=token)["data"] if model.get("owned_by") == "ollama"]
    question = {"model": models[0], "messages": [{"role": "user", "content": QUESTION}], "params": {"temperature": 0}}
    wanted = {"temperature": 0, "max_tokens": 60}
    whole = ask("/api/chat/completions", question | wanted | {"stream": False}, token)
    streamed = ask("/api/chat/completions", question | wanted | {"stream": True}, token, raw=True)
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    print(json.dumps({
        "models": models, "text": whole["choices"][0]["message"]["content"],
        "streamed": "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk.get("choices")),
        "loaded": [model["model"] for model in ask("/ollama/api/ps", token=token)["models"]], "version": ask("/ollama/api/version", token=token)["version"],
        "family": ask("/ollama/api/show", {"model": models[0]}, token)["details"]["family"],
        "vector": len(ask("/ollama/api/embed", {"model": models[0], "input": ["Tokyo"]}, token)["embeddings"][0]),
        "older_vector": len(ask("/ollama/api/embeddings", {"model": models[0], "prompt": "Tokyo"}, token)["embedding"])}))
finally:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
