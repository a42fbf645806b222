"""Tool servers that mean harm: `python hostile_tools.py ATTACK..` on stdio; `at_url(ATTACK..)` behind a URL.

Apart from its attacks it is a legacy server with one tool, `act`. An attack is a row of LISTS (what it answers
to tools/list), RESULTS (to tools/call), NOISE (what it writes before each answer), or a word that `by_stdio` or
`Connection` knows. bench/hostile.py runs the same attacks."""

import gzip
import json
import os
import socketserver
import sys
import threading
import time

MIB = 1 << 20
NOISE_BYTES = 2 * MIB
TRICKLE_BYTES = 200_000
ACT = '{"name": "act", "description": "acts", "inputSchema": {"type": "object"}}'
DEEP = 975


def listed(*tools, **more):
    """The JSON of a result of tools/list. tools: each as JSON."""
    members = "".join(f', "{name}": {value}' for name, value in more.items())
    return '{"tools": [%s]%s}' % (", ".join(tools), members)


def tool(name, schema='{"type": "object"}', **more):
    """The JSON of a tool; the values of `more` are JSON, too."""
    members = "".join(f', "{member}": {value}' for member, value in more.items())
    return '{"name": %s, "inputSchema": %s%s}' % (json.dumps(name), schema, members)


def nested(depth):
    return '{"type": "object", "properties": {"x": ' * depth + "{}" + "}}" * depth


def heavy_page(params):
    """One of six pages of 4 MiB of empty lists."""
    page = int(params.get("cursor") or 0)
    schema = '{"type": "object", "enum": [%s[]]}' % ("[]," * ((4 * MIB - 400) // 3))
    return listed(tool(f"heavy{page}", schema), *([ACT] if page == 0 else []),
                  **({"nextCursor": f'"{page + 1}"'} if page < 5 else {}))


def endless_page(params):
    """A page that comes late, and never the last."""
    time.sleep(0.05)
    page = int(params.get("cursor") or 0)
    return listed(ACT, nextCursor=f'"{page + 1}"')


LISTS = {  # attack -> the result of tools/list, by its params
    "heavy-pages": heavy_page,
    "slow-pages": endless_page,
    "heavy-schema": lambda params: listed(ACT, tool("heavy", '{"enum": [%s[]]}' % ("[]," * 400_000))),
    "deep-schema": lambda params: listed(ACT, tool("deep", nested(300))),
    "unreadably-deep-schema": lambda params: listed(ACT, tool("deep", nested(DEEP // 2))),
    "deep-annotations": lambda params: listed(ACT, tool("deep", annotations='{"x": %s}' % nested(400))),
    "many-small": lambda params: listed(ACT, *(tool(f"t{number:03}") for number in range(998))),
    "long-description": lambda params: listed(tool("a", description=json.dumps("d" * 300_000)), ACT),
    "not-a-number": lambda params: listed(ACT, tool("nan", '{"type": "object", "maximum": NaN}')),
    "infinite-literal": lambda params: listed(ACT, tool("big", annotations='{"x": -Infinity}')),
    "infinite": lambda params: listed(ACT, tool("big", '{"type": "object", "minimum": 1e400}')),
    "infinite-ttl": lambda params: listed(ACT, ttlMs="1e400"),
    "huge-ttl": lambda params: listed(ACT, ttlMs="1" + "0" * 400),
    "odd-ttl": lambda params: listed(ACT, ttlMs='{"a": []}'),
    "odd-schemas": lambda params: listed(
        ACT, *(tool(f"odd{number}", schema) for number, schema in enumerate((
            '{"properties": null, "required": null}', '{"properties": 7}', '{"properties": {"x": 7}}',
            '{"required": {}}', '{"type": []}', '{"type": {"x": 1}}', '{"$ref": []}', '{"anyOf": 3}',
            '{"enum": {}}', '{"properties": {"\\ud800": {}}}', '{"pattern": "("}', '{"$defs": []}')))),
    "odd-texts": lambda params: listed(
        ACT, tool("\ud800", description='"\\ud800\\u0000\\u001b[31m"'), tool("a\u0000b"), tool("\u202eevil"),
        tool("nulls", description="null", title="[]", annotations="[]")),
}
RESULTS = {  # attack -> the result of tools/call
    "heavy-result": lambda: '{"content": [%s{}]}' % ("[]," * 1_300_000),
    "heavy-text": lambda: '{"content": [{"type": "text", "text": "%s"}]}' % ("\\n" * (2 * MIB - 100)),
    "deep-result": lambda: '{"content": [], "structuredContent": %s}' % nested(100_000),
    "nan-result": lambda: '{"content": [], "structuredContent": {"x": NaN}}',
    "infinite-result": lambda: '{"content": [], "structuredContent": {"x": [1e999]}}',
    "digits": lambda: '{"content": [], "structuredContent": {"x": 1%s}}' % ("0" * 100_000),
}
NOISE = {  # attack -> what it writes again and again
    "blank-lines": "",
    "notifications": '{"jsonrpc": "2.0", "method": "notifications/message", "params": {}}',
    "pings": '{"jsonrpc": "2.0", "id": 7, "method": "ping"}',
    "list-changes": '{"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}',
    "progress": '{"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 3, "progress": 1}}',
    "strangers": '{"jsonrpc": "2.0", "id": 123456, "result": {}}',
    "numbers": "[1]",
    "broken": '{"jsonrpc": ',
}


def answer_to(message, attacks):
    """The JSON of the answer to a message; None for a notification."""
    method, params = message.get("method"), message.get("params") or {}
    if "id" not in message or method is None:
        return None
    result = None
    if method == "initialize":
        result = '{"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}}'
    elif method == "tools/list":
        makers = [LISTS[attack] for attack in attacks if attack in LISTS]
        result = makers[0](params) if makers else listed(ACT)
    elif method == "tools/call":
        makers = [RESULTS[attack] for attack in attacks if attack in RESULTS]
        said = json.dumps(params.get("arguments"))[:100]
        result = makers[0]() if makers else '{"content": [{"type": "text", "text": %s}]}' % json.dumps(said)
    number = json.dumps(message["id"])
    if result is None:
        return '{"jsonrpc": "2.0", "id": %s, "error": {"code": -32601, "message": "no such method"}}' % number
    return '{"jsonrpc": "2.0", "id": %s, "result": %s}' % (number, result)


def noise_of(message, attacks):
    """Lines of noise before the answer to a call, of NOISE_BYTES together."""
    if message.get("method") != "tools/call":
        return []
    return [NOISE[attack] for attack in attacks if attack in NOISE]


def is_mute(message, attacks):
    """Whether a call gets no answer."""
    arguments = (message.get("params") or {}).get("arguments")
    return "mute" in attacks and bool(arguments and arguments.get("mute"))


def by_stdio(attacks):
    if "echoes" in attacks:
        sys.exit(f"bad variables: {dict(os.environ)}")
    if "stderr-flood" in attacks:
        threading.Thread(target=lambda: [sys.stderr.write("x\n" * (MIB // 2)) for _ in range(64)], daemon=True).start()
    for line in sys.stdin:
        message = json.loads(line)
        for noise in noise_of(message, attacks):
            text = (noise + "\n") * (65_536 // (len(noise) + 1))
            for _ in range(NOISE_BYTES // 65_536):
                sys.stdout.write(text)
        if is_mute(message, attacks):
            continue
        answer = answer_to(message, attacks)
        if answer is not None:
            sys.stdout.write(answer + "\n")
            sys.stdout.flush()


class Connection(socketserver.StreamRequestHandler):
    """A connection of the server behind a URL; it says what it likes, also what is not HTTP."""

    attacks = ()
    seen = []  # the methods of the messages

    def handle(self):
        try:
            while self.request_line():
                pass
        except (OSError, ValueError):
            pass

    def request_line(self):
        line = self.rfile.readline()
        if not line.strip():
            return False
        headers = {}
        while (header := self.rfile.readline()).strip():
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", 0)))
        message = json.loads(body) if body else {}
        method = message.get("method")
        self.seen.append(method)
        if f"hangs-at-{method}" in self.attacks or is_mute(message, self.attacks):
            threading.Event().wait(600)
        if "no-http" in self.attacks:
            self.wfile.write(b"SSH-2.0-evil\r\n\r\n")
            return False
        if "bad-length" in self.attacks and method == "tools/call":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n")
            return False
        if "bad-chunks" in self.attacks and method == "tools/call":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
            return False
        if "breaks-off" in self.attacks and method == "tools/call":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            return False
        if "redirects-away" in self.attacks:
            self.wfile.write(b"HTTP/1.1 307 X\r\nLocation: http://u:pw@127.0.0.1:9/x?token=theirs\r\n"
                             b"Content-Length: 0\r\n\r\n")
            return True
        if "redirects-for-ever" in self.attacks:
            self.wfile.write(b"HTTP/1.1 307 X\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % line.split()[1])
            return True
        if "echoes" in self.attacks or "echoes-calls" in self.attacks and method == "tools/call":
            said = json.dumps(f"no such place: {line.decode()} {headers}")
            self.refuse(400, '{"jsonrpc": "2.0", "id": null, "error": {"code": 1, "message": %s}}' % said)
            return True
        answer = answer_to(message, self.attacks)
        if answer is None:
            self.wfile.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
            return True
        self.send(method, message, answer)
        return True

    def refuse(self, status, body):
        self.wfile.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    def send(self, method, message, answer):
        lines = noise_of(message, self.attacks)
        if method == "tools/call" and "bomb" in self.attacks:
            bomb = gzip.compress(b" " * (64 * MIB))
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
                             b"Content-Length: %d\r\n\r\n%s" % (len(bomb), bomb))
        elif method == "tools/call" and "trickle" in self.attacks:
            self.begin_events()
            for byte in b"data: " + b" " * TRICKLE_BYTES + answer.encode() + b"\n\n":
                self.wfile.write(b"1\r\n%c\r\n" % byte)
            self.wfile.write(b"0\r\n\r\n")
        elif lines:
            self.begin_events()
            for noise in lines:
                text = ((f"data: {noise}\n" if noise else "") + "\n").encode()
                for _ in range(NOISE_BYTES // 65_536):
                    self.chunk(text * (65_536 // len(text)))
            self.chunk(b"data: " + answer.encode() + b"\n\n")
            self.chunk(b"")
        else:
            data = answer.encode("utf-8", "surrogatepass")
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                             % (len(data), data))

    def begin_events(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                         b"Transfer-Encoding: chunked\r\n\r\n")

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/mcp"


def at_url(*attacks):
    """A running server behind a URL on a free port of loopback; `seen` has the methods it was sent."""
    handler = type("Handler", (Connection,), {"attacks": attacks, "seen": []})
    server = Server(("127.0.0.1", 0), handler)
    server.seen = handler.seen
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    if sys.argv[1:2] == ["--url"]:  # it says its URL, and then serves
        print(at_url(*sys.argv[2:]).url, flush=True)
        threading.Event().wait()
    by_stdio(sys.argv[1:])
