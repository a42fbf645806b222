"""The first requests of coding agents, as shapes in tests/fixtures/agents: what is where, no one's prose.

A text of more than a few words is only its length here, "(6,979 characters)". Names, types, numbers, and the
structure of the tools' schemas are as sent. To record a program's next version: run it once, in a small git
repository, with this between it and a server, and press Ctrl-C once it has answered.

    python tests/support/agent_requests.py http://127.0.0.1:8000 8001 "aider 0.87.0"
"""

import json
import re
import sys
import urllib.error
import urllib.request
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "agents"
HEADERS = ("accept", "user-agent", "anthropic-beta", "anthropic-version")
LONG = 32               # characters; a longer text is prose
EVER_NEW = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|ses_\w+")


def shape(value, name=""):
    """A body without its prose. name: the member whose value this is."""
    if isinstance(value, dict):
        return {key: shape(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    if len(value) > LONG and name not in ("$schema", "pattern") or name == "description" and len(value) > 12:
        return f"({len(value):,} characters)"
    return EVER_NEW.sub("an-id", value)


def agents():
    """(short name, program and version, its requests) of every recorded file."""
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(path.read_text())
        yield path.stem, record["program"], record["requests"]


def requests_of_agents():
    """pytest's parameters: a short name, and one request of it."""
    return [pytest.param(name, each, id=f"{name}-{number}")
            for name, _, requests in agents() for number, each in enumerate(requests, 1)]


def asked(url, request, most):
    """(status, headers, answer) of a recorded request to a server, greedy and with at most so many
    tokens. The answer is a stream's events, or JSON, or text."""
    body = request["body"] and {**request["body"], "temperature": 0, limit_of(request["path"]): most}
    data = body and json.dumps(body).encode()
    sent = urllib.request.Request(url + request["path"], data, request["headers"], method=request["method"])
    if data:
        sent.add_header("Content-Type", "application/json")
    try:
        response = urllib.request.urlopen(sent, timeout=900)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        kind, text = response.headers["Content-Type"], response.read().decode()
    if kind.startswith("text/event-stream"):
        lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        answer = [json.loads(line) for line in lines if line != "[DONE]"]
    else:
        answer = json.loads(text) if text and "json" in kind else text
    return response.status, response.headers, answer


def check_whole(request, answer):
    """That an answer, as `asked` gives it, is whole: it ended, says how, and counts its tokens."""
    if request["path"].startswith("/v1/responses"):
        assert answer[0]["type"] == "response.created", answer[0]
        assert [each["sequence_number"] for each in answer] == list(range(len(answer)))
        end = answer[-1]["response"]
        assert answer[-1]["type"] == f"response.{end['status']}", end
        assert end["status"] in ("completed", "incomplete"), end
        assert end["output"] and end["usage"]["input_tokens"] > 0 and end["usage"]["output_tokens"] > 0, end
    elif request["path"].startswith("/v1/messages"):
        kinds = [each["type"] for each in answer]
        assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") > 0, kinds
        assert answer[-2]["delta"]["stop_reason"] in ("end_turn", "max_tokens", "tool_use"), answer[-2]
        assert answer[-2]["usage"]["output_tokens"] > 0, answer[-2]
    else:
        chunks = answer if isinstance(answer, list) else [answer]
        ends = [choice["finish_reason"] for each in chunks for choice in each["choices"]]
        assert [end for end in ends[:-1] if end] == [] and ends[-1] in ("stop", "length", "tool_calls"), ends
        usage, body = chunks[-1].get("usage"), request["body"]
        if not body.get("stream") or body.get("stream_options", {}).get("include_usage"):
            assert usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0, chunks[-1]


def limit_of(path):
    """The field of most tokens in bodies of this path."""
    return "max_output_tokens" if path.startswith("/v1/responses") else "max_tokens"


def recorded(method, target, headers, body):
    """One request as a row of a file."""
    kept = {name: value for name, value in headers.items() if name.lower() in HEADERS}
    return {"method": method, "path": target, "headers": kept, "body": shape(json.loads(body or "null"))}


class Recorder(BaseHTTPRequestHandler):
    """Forwards each request, and keeps its shape."""

    upstream, rows, row_of = "", [], staticmethod(recorded)

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.rows.append(self.row_of(self.command, self.path, self.headers, body))
        there = HTTPConnection(urlsplit(self.upstream).netloc)
        sent = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        there.request(self.command, self.path, body, sent)
        answer = there.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        while piece := answer.read1(1 << 16):
            self.wfile.write(piece)
        self.close_connection = True

    do_GET = do_POST = do_HEAD = forward


def main(upstream, port, program):
    Recorder.upstream = upstream
    with ThreadingHTTPServer(("127.0.0.1", int(port)), Recorder) as listener:
        try:
            listener.serve_forever()
        except KeyboardInterrupt:
            pass
    write(program, Recorder.rows)


def write(program, rows):
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{program.split()[0].lower()}.json"
    path.write_text(json.dumps({"program": program, "requests": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
