"""Tool servers as many really speak, each with one habit of public reports: `python spoken_mcp.py HABIT`.

`at_url(HABIT)` has it behind a URL. A good client takes all of them."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PNG = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
TEXT = base64.b64encode("grüße".encode()).decode()


def tool(name, **more):
    return {"name": name, "description": "d", "inputSchema": {"type": "object"}, **more}


def resource(mime_type, blob):
    inside = {"uri": "file:///a", "mimeType": mime_type, "blob": blob}
    return {"content": [{"type": "resource", "resource": inside}]}


def paged(first_cursor, last=()):
    """Two pages; `last` is added to the second."""
    def pages(params):
        if "cursor" not in params:
            return {"tools": [tool("first")], "nextCursor": first_cursor}
        return {"tools": [tool("second")], **dict(last)}
    return pages


LISTS = {
    "empty-cursor": paged(""), "number-cursor": paged(1), "null-cursor": paged("2", [("nextCursor", None)]),
    "stuck-cursor": paged("2", [("nextCursor", "2")]),
    "many": lambda params: {"tools": [tool(f"t{number:03}") for number in range(200)]},
    "odd-schemas": lambda params: {"tools": [
        {"name": "no_schema"}, tool("null", inputSchema=None), tool("bare", inputSchema={}),
        tool("nulls", inputSchema={"type": "object", "properties": None, "required": None}),
        tool("a.b/c"), tool("ünï"), tool("x" * 120), tool("no_text", description=None)]},
}
CALLS = {
    "picture-file": resource("image/png", PNG), "text-file": resource("text/plain", TEXT),
    "json-file": resource("application/json; charset=utf-8", TEXT), "zip-file": resource("application/zip", TEXT),
    "jpg": {"content": [{"type": "image", "data": PNG, "mimeType": "image/jpg"}]},
    "data-url": {"content": [{"type": "image", "data": f"data:image/png;base64,{PNG}", "mimeType": "image/png"}]},
    "structured": {"structuredContent": {"celsius": 21.5}}, "plain-content": {"content": "plain text"},
}


def response_to(message, habit):
    method, params = message["method"], message.get("params") or {}
    results = {
        "initialize": lambda: {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}},
        "tools/list": lambda: LISTS.get(habit, lambda params: {"tools": [tool("act")]})(params),
        "tools/call": lambda: CALLS.get(habit, {"content": [{"type": "text", "text": "done"}]})}
    number = str(message["id"]) if habit == "text-ids" else message["id"]
    if method not in results:
        return {"jsonrpc": "2.0", "id": number, "error": {"code": -32601, "message": "no such method"}}
    null_error = {"error": None} if habit == "null-error" else {}
    return {"jsonrpc": "2.0", "id": number, "result": results[method](), **null_error}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    habit = ""
    seen = []      # (HTTP method, path, method of the message)
    waiting = {}   # responses that are fetched later, by the id of the event before
    has_lost = False

    def log_message(self, *arguments):
        pass

    def reply(self, status, body=b"", kind="application/json", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        last = self.headers.get("Last-Event-ID")
        self.seen.append(("GET", self.path, last))
        if last not in self.waiting:
            return self.reply(405)
        if last == "e1" and self.habit == "closes-twice":
            self.waiting["e2"] = self.waiting.pop("e1")
            return self.reply(200, b"id: e2\nretry: 20\ndata:\n\n", "text/event-stream")
        body = b"id: e9\ndata: " + json.dumps(self.waiting.pop(last)).encode() + b"\n\n"
        self.reply(200, body, "text/event-stream")

    def do_DELETE(self):
        self.reply(200)

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        method, habit = message["method"], self.habit
        self.seen.append(("POST", self.path, method))
        if "id" not in message:
            return self.reply(202)
        if habit == "redirects" and self.path == "/mcp":
            return self.reply(307, Location="/mcp/")
        if habit == "redirects-to-get" and self.path == "/mcp":
            return self.reply(302, Location="/mcp/")
        body = json.dumps(response_to(message, habit)).encode()
        if method == "tools/call":
            return self.call(message, body)
        session = {"Mcp_Session_Id": "s"} if method == "initialize" else {}
        return self.reply(200, body, **session)

    def call(self, message, body):
        if self.habit.startswith("closes-"):
            self.waiting["e1"] = json.loads(body)
            return self.reply(200, b"id: e1\nretry: 20\ndata: \n\n", "text/event-stream")
        if self.habit == "no-empty-line":
            return self.reply(200, b"event: message\ndata: " + body + b"\n", "text/event-stream")
        if self.habit.startswith("loses-") and not self.has_lost:
            type(self).has_lost = True
            return self.reply(*LOST[self.habit])
        return self.reply(200, body)


def error(text, number=None):
    return json.dumps({"jsonrpc": "2.0", "id": number, "error": {"code": -32000, "message": text}}).encode()


LOST = {  # habit -> what the first call is answered
    "loses-session-404": (404, error("Session not found")),
    "loses-session-400": (400, error("Bad Request: No valid session ID provided")),
    "loses-session-in-plain-text": (400, b"Invalid session", "text/plain"),
    "loses-without-a-word": (400, b""),
    "loses-no-session": (400, error("Bad Request: x must be a number")),
}


def at_url(habit):
    """A running server with its handler class, which has `seen`."""
    handler = type("Habit", (Handler,), {"habit": habit, "seen": [], "waiting": {}, "has_lost": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.seen = handler.seen
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def by_stdio(habit):
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            text = json.dumps(response_to(message, habit))
            sys.stdout.write({"bom": "\ufeff"}.get(habit, "") + text + ("\r\n" if habit == "crlf" else "\n"))
            sys.stdout.flush()


if __name__ == "__main__":
    by_stdio(sys.argv[1])
