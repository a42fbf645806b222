"""Servers that tests attack over HTTP, and how they are asked."""

import json
import shutil
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from subprocess import Popen
from typing import Any
from urllib.parse import quote

from families import make_model, save
from lora import random_adapter, shapes_of

CHAT, COMPLETIONS, RESPONSES, MESSAGES = ("/v1/chat/completions", "/v1/completions", "/v1/responses",
                                          "/v1/messages")
HI = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Reply:
    status: int
    body: Any  # JSON, else a text
    headers: Message

    @property
    def text(self):
        """Of an answer of the chat API."""
        assert self.status == 200, self.body
        return self.body["choices"][0]["message"]["content"]

    @property
    def cached(self):
        assert self.status == 200, self.body
        return self.body["usage"]["prompt_tokens_details"]["cached_tokens"]

    @property
    def error(self):
        """What it was refused with, "" if it was not."""
        found = self.body.get("error") if isinstance(self.body, dict) else None
        return found["message"] if isinstance(found, dict) else found or ""

    @property
    def ignored(self):
        return (self.headers["X-Ignored-Fields"] or "").split(", ")


@dataclass(frozen=True)
class Attacked:
    url: str
    process: Popen
    folder: Path

    def ask(self, path, body=None, key="mallory", method=None, **headers):
        """body: bytes as they are, else as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return reply_of(response.status, response)
        except urllib.error.HTTPError as error:
            return reply_of(error.code, error)

    def get(self, path, name, key="mallory"):
        return self.ask(path + quote(name), key=key)

    def chat(self, key="mallory", text="hi", path=CHAT, **more):
        return self.ask(
            path, {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8} | more,
            key)

    def upload(self, *lines, key="mallory"):
        """A file for a batch; returns its id."""
        text = b"\n".join(json.dumps(line).encode() for line in lines)
        form = (
            b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--XX\r\nContent-Disposition: form-data; '
            b'name="file"; filename="a.jsonl"\r\n\r\n' + text + b"\r\n--XX--\r\n")
        return self.ask("/v1/files", form, key, Content_Type="multipart/form-data; boundary=XX").body["id"]

    def workers(self):
        """The process ids of its workers, and how often these were started again; all rows and pages must be free again."""
        workers = self.ask("/stats").body["workers"]
        while any(worker["running"] or worker["kv_pages_used"] for worker in workers):
            workers = self.ask("/stats").body["workers"]
        return {(worker["pid"], worker["restarts"]) for worker in workers}


def reply_of(status, response):
    text = response.read()
    try:
        return Reply(status, json.loads(text), response.headers)
    except ValueError:
        return Reply(status, text.decode(errors="replace"), response.headers)


def two_models(folder):
    """The file of --config with two tiny llamas, `red` with an adapter `poet`, and `blue`; and the file of keys, of which `bound` is limited to `blue`."""
    base = save(make_model("llama3.1"), folder / "red")
    shutil.copytree(base, folder / "blue")
    random_adapter(folder / "poet", *shapes_of(base), 1, size=0.3)
    (folder / "config.toml").write_text(
        f"[[models]]\nname = 'red'\npath = '{base}'\nadapter = {{poet = '{folder / 'poet'}'}}\n"
        f"[[models]]\nname = 'blue'\npath = '{folder / 'blue'}'\n")
    (folder / "keys").write_text("mallory: mallory\nalice: alice\nbound: bound models=blue\n")
    (folder / "keys").chmod(0o600)
    return "--config", folder / "config.toml", "--api-key-file", folder / "keys"


class Trap:
    """A port that nobody may connect to."""

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setblocking(False)
        self.url = "http://127.0.0.1:%d/x.png" % self.socket.getsockname()[1]
        return self

    def __exit__(self, *error):
        self.socket.close()

    @property
    def sprung(self):
        try:
            self.socket.accept()
        except BlockingIOError:
            return False
        return True
