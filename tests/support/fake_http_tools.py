"""The tool server of fake_tools.py over HTTP, with faults of its own."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fake_tools


class Handler(BaseHTTPRequestHandler):
    """Streamable HTTP. It sends tool results as events, all else as JSON."""

    protocol_version = "HTTP/1.1"
    faults = ()
    seen = []       # (method, headers) of each request
    sessions = set()
    begun = 0

    def log_message(self, *arguments):
        pass

    def do_DELETE(self):
        self.sessions.discard(self.headers.get("Mcp-Session-Id"))
        self.reply(200, b"")

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        message = json.loads(data)
        self.seen.append((message.get("method"), dict(self.headers)))
        if "gone" in self.faults:
            self.close_connection = True
            return None
        if "redirects" in self.faults:
            return self.reply(302, b"", Location="http://127.0.0.1:9/elsewhere")
        if "unauthorized" in self.faults and self.headers.get("Authorization") != "Bearer right":
            return self.reply(401, b"")
        is_legacy = "legacy" in self.faults
        session = {}
        if is_legacy and message["method"] == "initialize":
            type(self).begun += 1
            session = {"Mcp-Session-Id": f"session-{self.begun}"}
            self.sessions.add(f"session-{self.begun}")
        elif is_legacy and message["method"] != "server/discover" and self.headers.get("Mcp-Session-Id") not in self.sessions:
            return self.reply(404, b"")
        if is_legacy and message["method"] == "server/discover":
            return self.reply(400, b'{"jsonrpc": "2.0", "id": null, "error": {"code": -32000, "message": "no session"}}')
        if message["method"] == "tools/call":
            return self.stream(message)
        response = fake_tools.FakeServer(self.faults, lambda message: None).take(message)
        if response is None:
            return self.reply(202, b"")
        self.reply(200, json.dumps(response).encode(), **session)

    def stream(self, message):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def send(value):
            self.chunk(b"event: message\r\ndata: " + json.dumps(value).encode() + b"\r\n\r\n")

        self.chunk(b"id: 1\ndata:\n\n")
        try:
            while "endless-events" in self.faults:
                self.chunk(b": still here\n\n" * 1000)
            send(fake_tools.FakeServer(self.faults, send).take(message))
            self.chunk(b"")
        except OSError:
            self.close_connection = True

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def reply(self, status, data, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def http_server(*faults):
    """A running server over HTTP on a free port of loopback, with its handler class."""
    handler = type("Handler", (Handler,), {"faults": faults, "seen": [], "sessions": set(), "begun": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, handler
