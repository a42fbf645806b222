"""Hostile clients, one kind after another, and what other clients notice.

    python bench/hostile.py [--only WORD ...] [--seconds 40] [--memory 4G] [--json FILE]   a server of its own
    python bench/hostile.py --url http://HOST:PORT [--key KEY --other-key KEY]             one that runs
    python bench/hostile.py --list

The server that it starts has the default model, a chat template with tools, and two keys: one for the
attacker, one for everyone else. An attack ends after --seconds. The other clients run in a process of their
own. They poll /livez, and ask in turn for short answers, streamed answers and JSON that fits a schema. They
also kill the server if it takes more than --memory. If the server has died, or does not serve within 30 s
after an attack, a new one is started.

Columns of the table: what the attacker got; the longest pause of the server's event loop, as measured by a
task in it and by /livez; for the others the worst first token, the worst gap between two pieces and the worst
first token of a structured answer; how much the memory (PSS) of the front and of its processes rose; bytes of
log; and anything else: how the server died, answers that others were refused, restarted workers, KV pages
still in use, 5xx responses to others, and processor time that the front still takes when all is quiet. Exits
with 1 if a server died or did not serve, a worker was restarted, or a page leaked.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import mmap
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import zlib
from collections import Counter
from pathlib import Path

import aiohttp
import psutil

import servers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(ROOT))
sys.path.append(str(ROOT / "tests" / "support"))
import chat_server      # noqa: E402
import hostile_tools    # noqa: E402
from chatlm.common import config    # noqa: E402
from chatlm.common.config import LIMITS    # noqa: E402
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402
from chatlm.common.processes.child import die_with_parent    # noqa: E402
from chatlm.common.program import page_files    # noqa: E402
from chatlm.front import serve as serve_module    # noqa: E402

CHAT, OPENAI, COMPLETIONS = "/chat/completions", "/v1/chat/completions", "/v1/completions"
MESSAGES = "/v1/messages"
TOKENIZE, DETOKENIZE, APPLY_TEMPLATE = "/tokenize", "/detokenize", "/apply-template"
RESPONSES, SHOW, COMPARE = "/v1/responses", "/api/show", "/v1/compare"
MIB = 1 << 20
SETTLE_S = 30.0             # after an attack; a server that does not serve by then counts as dead
TEMPLATE = """{%- if tools %}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{% endif -%}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\n{"name": ' + (call.function.name | tojson) -}}
{{- ', "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor -%}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
REFUSAL = "{{ raise_exception('no') }}"
LONG = "{{ 'ab ' * 20000000 }}"
ENDLESS = "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ 'a' * 10000000000 }}{{ f(1) }}"
HOSTILE = {"99,999 x 99,999 loops": LOOPS, "a refusal": REFUSAL, "60 MB": LONG, "no end": ENDLESS}
TRAPS = "".join(f"{{%- if messages[0].content == '{name}' %}}{source}{{% endif -%}}"
                for name, source in HOSTILE.items())
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
PERSON = {"type": "object", "required": ["name", "age"], "additionalProperties": False,
          "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}}


# the server


def shared_number(path):
    """A number in the first bytes of a file, visible to two processes."""
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 8)).cast("d")


def serve(parent, pauses_path, *words):
    """chat_server with a task that records the longest pause of the event loop, in seconds."""
    die_with_parent(int(parent))
    longest_s, serve_forever = shared_number(pauses_path), serve_module.serve_forever

    async def watch():
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(0.002)
            longest_s[0] = max(longest_s[0], time.monotonic() - began_s - 0.002)

    async def watched(settings, annexes):
        watching = asyncio.create_task(watch())
        try:
            return await serve_forever(settings, annexes=annexes)
        finally:
            watching.cancel()

    serve_module.serve_forever = watched
    sys.exit(chat_server.main(["serve", *words]))


class Server:
    """A server of the bench."""

    key, other_key, process = "mallory", "alice", None

    def __init__(self, folder, memory, template=TRAPS + TEMPLATE, has_tools=False):
        self.folder, self.memory, self.model = folder, memory, folder / "model.gguf"
        self.has_tools, self.tool_urls = has_tools, []
        (folder / "keys").write_text("mallory: mallory tools=*\nalice: alice\n")
        (folder / "pauses").write_bytes(bytes(8))
        self.pause_s = shared_number(folder / "pauses")
        copy = ["-m", "gguf.scripts.gguf_new_metadata", "--force", "--chat-template", template]
        copy += [fetch_default_model(), self.model]
        subprocess.run([sys.executable, *copy], check=True, capture_output=True)

    def begin(self):
        """Start the process."""
        limit = self.memory + (12 << 30)        # of address space, in case the watchdog is too slow
        words = [sys.executable, __file__, "serve", os.getpid(), self.folder / "pauses", self.model]
        words += ["--kv-cache-memory", "256M", "--api-key-file", self.folder / "keys"]
        if self.has_tools:
            words += ["--mcp-config", self.write_tools(), "--tool-timeout", "10"]
        self.running = servers.Server(
            words, "chat_server", log=self.folder / "log", start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
        self.process, self.url = self.running.process, self.running.url

    def write_tools(self):
        """The file of --mcp-config, with a hostile tool server for each attack of TOOL_ATTACKS."""
        program, table = str(ROOT / "tests" / "support" / "hostile_tools.py"), {}
        for attack in TOOL_ATTACKS:
            table[attack] = {"command": sys.executable, "args": [program, attack]}
        for attack in URL_ATTACKS:
            command = [sys.executable, program, "--url", attack]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self.tool_urls.append(process)
            table[f"url-{attack}"] = {"url": process.stdout.readline().strip()}
        path = self.folder / "mcp.json"
        path.write_text(json.dumps({"mcpServers": table}))
        return path

    def start(self):
        """Start it and wait until it serves."""
        self.begin()
        self.running.wait_until_ready()

    @property
    def alive(self):
        return self.process.poll() is None

    @property
    def log_bytes(self):
        return (self.folder / "log").stat().st_size

    def cpu_share(self, seconds):
        """The share of a core that the front takes."""
        front = self.running.front
        before = sum(front.cpu_times()[:2])
        time.sleep(seconds)
        return (sum(front.cpu_times()[:2]) - before) / seconds

    def stop(self):
        self.running.stop(0)
        for process in self.tool_urls:
            process.kill()
            process.wait()
        self.tool_urls = []


class Elsewhere:
    """A server that is already running; less of it can be observed."""

    process = pause_s = None
    alive, log_bytes = True, 0

    def __init__(self, options):
        self.url, self.key = options.url.rstrip("/"), options.key
        self.other_key = options.other_key or options.key

    def cpu_share(self, seconds):
        return 0.0

    def start(self):
        pass

    stop = start


# the others


class Others:
    """Harmless clients, and the watchdog of the server's memory, in a process that does none of the
    attacker's work.

    It reads the lines `begin` and `end`. After `end` it waits until each client has sent another request and
    got its answer, for at most SETTLE_S. Then it writes the worst values since `begin` as a line of JSON.
    """

    def __init__(self, url, key, pid, memory):
        self.url, self.headers, self.memory = url, {"Authorization": f"Bearer {key}"} if key else {}, memory
        self.server, self.killed = psutil.Process(pid) if pid else None, None
        self.clear()

    def clear(self):
        self.worst, self.rounds, self.refused = Counter(), Counter(), Counter()
        self.since = {}             # what is awaited -> since when
        self.peak = self.base = self.sizes()

    def sizes(self):
        """PSS of the front and of the processes that it started, in MB."""
        sizes = [0.0, 0.0]
        if self.server:
            with contextlib.suppress(psutil.Error):
                sizes[0] = self.server.memory_full_info().pss / 1e6
                workers = self.server.children(recursive=True)
                sizes[1] = sum(worker.memory_full_info().pss for worker in workers) / 1e6
        return sizes

    @property
    def gone(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(self.server) and self.server.status() == psutil.STATUS_ZOMBIE
        return True

    async def guard(self):
        while self.server and not self.gone:
            sizes = self.sizes()
            self.peak = [max(pair) for pair in zip(self.peak, sizes)]
            if sum(sizes) > self.memory / 1e6:
                self.killed = f"{sum(sizes):,.0f} MB"
                os.killpg(self.server.pid, signal.SIGKILL)
            await asyncio.sleep(0.05)

    def note(self, what):
        """Note that something has arrived. The part after a colon names the client."""
        name, waited_ms = what.partition(":")[0], 1e3 * (time.monotonic() - self.since[what])
        self.worst[name] = max(self.worst[name], round(waited_ms, 1))

    async def forever(self, what, ask):
        while True:
            self.since[what] = time.monotonic()
            try:
                problem = await ask(what)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                problem = type(error).__name__
            if problem:
                self.refused[f"{what}: {problem}"] += 1
            else:
                self.rounds[what] += 1
            self.since.pop(what, None)
            await asyncio.sleep(0.1 if problem else 0.02)

    async def poll(self, what):
        async with self.session.get(self.url + "/livez") as response:
            await response.read()
            self.note(what)
            return None if response.status == 200 else response.status

    async def stream(self, what, path=CHAT, **fields):
        body = HI | {"max_tokens": 24, "temperature": 0, "stream": True} | fields
        async with self.session.post(self.url + path, json=body) as response:
            if response.status != 200:
                return response.status
            gap = f"gap:{what}"
            self.since.pop(gap, None)
            async for line in response.content:
                if b'"token"' in line or b'"content": "' in line and b'"role"' not in line:
                    self.note(gap if gap in self.since else what)
                    self.since[gap] = time.monotonic()
                elif b'"error"' in line:
                    return "an error event"
            self.since.pop(gap, None)

    async def structured(self, what):
        return await self.stream(what, OPENAI, **json_schema(PERSON), seed=1)

    async def run(self):
        timeout = aiohttp.ClientTimeout(total=2 * SETTLE_S)
        async with aiohttp.ClientSession(timeout=timeout, headers=self.headers) as self.session:
            guard = asyncio.create_task(self.guard())
            while await self.line() == "begin":
                self.clear()
                kinds = ("livez", self.poll), ("first", self.stream), ("structured", self.structured)
                clients = [asyncio.create_task(self.forever(*kind)) for kind in kinds]
                await self.line()
                served = await self.two_rounds()
                for what in self.since:
                    self.note(what)
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
                rose = [round(peak - base, 1) for peak, base in zip(self.peak, self.base)]
                print(json.dumps({"served": served, "killed": self.killed, "refused": self.refused,
                                  "worst_ms": self.worst, "memory_mb": rose}), flush=True)
            guard.cancel()

    async def line(self):
        return (await asyncio.to_thread(sys.stdin.readline)).strip()

    async def two_rounds(self):
        """Wait until every client has finished two more requests: the first may have begun before."""
        before, deadline_s = Counter(self.rounds), time.monotonic() + SETTLE_S
        while any(self.rounds[what] < before[what] + 2 for what in ("livez", "first", "structured")):
            if self.gone or time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(0.01)
        return True


# the attacker


async def status_of(reader):
    """The status of the next response, "closed" if there is none."""
    try:
        return int((await reader.readuntil(b"\r\n\r\n"))[9:12])
    except (ConnectionError, asyncio.IncompleteReadError):
        return "closed"


class Attacker:
    """Raw connections, so that a request can be any bytes; `got` counts what came back."""

    def __init__(self, server, scale):
        self.server, self.scale, self.got, self.writers = server, scale, Counter(), []
        url = urllib.parse.urlsplit(server.url)
        self.address = url.hostname, url.port or 80

    def many(self, count):
        return max(2, int(count * self.scale))

    async def connect(self, reads=True):
        """A connection that stays open until the attack ends. If it does not read, the kernel buffers 2 KB
        for it."""
        connection, loop = socket.socket(), asyncio.get_running_loop()
        connection.setblocking(False)
        if not reads:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await loop.sock_connect(connection, self.address)
        reader, writer = await asyncio.open_connection(sock=connection)
        if not reads:
            writer.transport.pause_reading()
        self.writers.append(writer)
        return reader, writer

    def request(self, path, body=b"", method="POST", length=None, **headers):
        """The bytes of a request; `body` may be a value to encode as JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        key = {"Authorization": f"Bearer {self.server.key}"} if self.server.key else {}
        headers = {"Host": "%s:%d" % self.address, "Content-Length": length or len(body)} | key | headers
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body

    async def post(self, path, body, leave_after_s=None, method="POST", **headers):
        """Send a request and read the whole response, or what came within the time; returns the end of it."""
        reader, writer = await self.connect()
        status, answer = "no answer", b""

        async def exchange():
            nonlocal status, answer
            writer.write(self.request(path, body, method, Connection="close", **headers))
            with contextlib.suppress(ConnectionError):
                with contextlib.suppress(ConnectionError):      # the answer may have arrived anyway
                    await writer.drain()
                status = await status_of(reader)
                while data := await reader.read(MIB):
                    answer = (answer + data)[-4000:]
        try:
            await asyncio.wait_for(exchange(), leave_after_s)
        except asyncio.TimeoutError:
            status = "left"
        finally:
            self.got[str(status)] += 1
            writer.transport.abort()
        return answer

    async def posts(self, count, *request, **options):
        """Send the same request `count` times at once and wait for all."""
        await asyncio.gather(*(self.post(*request, **options) for _ in range(count)))

    def leave(self):
        for writer in self.writers:
            writer.transport.abort()


def json_schema(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def patterns(count):
    """Each pattern is harmless; the automaton for all of them has 2^count states."""
    texts = [f".*{chr(ord('a') + i % 26)}.*{i if i > 25 else ''}" for i in range(count)]
    text = {"type": "string", "allOf": [{"pattern": each} for each in texts]}
    return {"type": "object", "required": ["x"], "properties": {"x": text}}


async def patterns_in_format(count, attacker):
    await attacker.post(OPENAI, HI | json_schema(patterns(count)))


async def patterns_in_tools(count, attacker):
    tool = {"type": "function", "function": {"name": "x", "parameters": patterns(count)}}
    await attacker.post(OPENAI, HI | {"tools": [tool], "tool_choice": "required"})


async def slow_schema(attacker):
    """A schema that takes 0.1 s, for each of 128 answers, from a client that leaves soon and comes again."""
    time_text, address = ({"type": "string", "format": name} for name in ("date-time", "ipv6"))
    shapes = [{"type": "object", "properties": {f"p{i}": time_text, "k": address}, "required": [f"p{i}"]}
              for i in range(380)]
    body = HI | json_schema({"anyOf": shapes}) | {"n": 128, "max_tokens": 50, "stream": True}
    for _ in range(3):
        await attacker.posts(2, OPENAI, body, leave_after_s=1.0)


async def large_schemas(attacker):
    """64 KB each, whose automata take 550 MB. All are different, because compiled ones may be kept."""
    for number in range(attacker.many(16)):
        properties = {f"p{i}": {"type": "integer", "multipleOf": 997 + i} for i in range(900)}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        await attacker.post(OPENAI, HI | json_schema(schema | {"title": str(number)}))


HI_AND = json.dumps(HI)[:-1] + ', "x": '
RESPOND = '{"input": "Hi", "max_output_tokens": 8, "stream": true, '
LONG_STREAM = json.dumps(HI | {"stream": True, "max_tokens": 200, "ignore_eos": True})[:-1]
LARGE_BODIES = (    # route, name; a body in which * is repeated as often as fits, the separator, and the end
    (TOKENIZE, "7 M token ids", '{"content":[*]}', "1", ",", ""),
    (TOKENIZE, "7 M token ids with pieces", '{"with_pieces":true,"content":[*]}', "1", ",", ""),
    (TOKENIZE, "3 M texts", '{"content":[*]}', '"ab"', ",", ""),
    (TOKENIZE, "a text", '{"content":"*"}', "a b", "", ""),
    (DETOKENIZE, "7 M token ids", '{"tokens":[*]}', "1", ",", ""),
    (APPLY_TEMPLATE, "500,000 messages", '{"messages":[*]}', '{"role":"user","content":""}', ",", ""),
    (COMPLETIONS, "4 M prompts", '{"prompt":[*]}', '"a"', ",", ""),
    (COMPLETIONS, "4 M prompts of a token id", '{"prompt":[*]}', "[1]", ",", ""),
    (COMPLETIONS, "a prompt of 7 M token ids", '{"prompt":[*]}', "1", ",", ""),
    (COMPLETIONS, "a prompt", '{"prompt":"*"}', "a b", "", ""),
    (COMPLETIONS, "7 M stop tokens", '{"prompt":"a","stop_token_ids":[*]}', "1", ",", ""),
    (CHAT, "500,000 messages", '{"messages":[*]}', '{"role":"user","content":""}', ",", ""),
    (OPENAI, "500,000 messages", '{"messages":[*]}', '{"role":"user","content":""}', ",", ""),
    (OPENAI, "500,000 parts", '{"messages":[{"role":"user","content":[*]}]}', '{"type":"text"}', ",", ""),
    (OPENAI, "a message", '{"messages":[{"role":"user","content":"*"}]}', "a b", "", ""),
    (OPENAI, "a message of escapes", '{"messages":[{"role":"user","content":"*"}]}', "\\u20ac", "", ""),
    (OPENAI, "500,000 tools", HI_AND + '1, "tools":[*]}', '{"function":{"name":"a"}}', ",", ""),
    (OPENAI, "an earlier call", '{"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":'
     '[{"function":{"name":"a","arguments":"[*]"}}]}]}', "1", ",", ""),
    (OPENAI, "4 M stop strings", HI_AND + '1, "stop":[*]}', '"a"', ",", ""),
    (OPENAI, "7 M unknown numbers", HI_AND + "[*]}", "1", ",", ""),
    (OPENAI, "5 M unknown objects", HI_AND + "[*]}", "{}", ",", ""),
    (OPENAI, "lists within lists", HI_AND + "*}", "[", "", "]"),
    (OPENAI, "objects within objects", HI_AND + "*}", '{"a":', "", "1}"),
    (OPENAI, "an integer", HI_AND + "*}", "9", "", ""),
    (OPENAI, "a fraction", HI_AND + "0.*}", "9", "", ""),
    (OPENAI, "no JSON", "*", "{", "", ""),
    (OPENAI, "quotation marks", HI_AND + '"*"}', '\\"', "", ""),
    (OPENAI, "the word model", HI_AND + "[*]}", '"model"', ",", ""),
    (COMPARE, "a message", '{"variants":[{},{},{},{},{},{},{},{}],"messages":[{"role":"user","content":"*"}]}', "a b", "", ""),
    (COMPARE, "names of adapters", '{"messages":[{"role":"user","content":"a"}],"variants":[{},{"adapter":"*"}]}', "a", "", ""),
    (RESPONSES, "metadata of line ends", RESPOND + '"metadata": {"a": "*"}}', "\u2028", "", ""),
    (RESPONSES, "a user of line ends", RESPOND + '"user": "*"}', "\u2028", "", ""),
    (RESPONSES, "instructions of spaces", RESPOND + '"instructions": "*"}', " ", "", ""),
    (RESPONSES, "text with unknown members", RESPOND + '"text": {"x": [*]}}', "[]", ",", ""),
    (RESPONSES, "reasoning with unknown members", RESPOND + '"reasoning": {"x": [*]}}', "[]", ",", ""),
    (RESPONSES, "tools with unknown members",
     RESPOND + '"tools": [{"type": "function", "name": "a", "x": [*]}]}', "[]", ",", ""),
    (RESPONSES, "tools of 1 M other types", RESPOND + '"tools": [*]}', '{"type":"a"}', ",", ""),
    (SHOW, "7 M numbers", '{"model": "default", "x": [*]}', "1", ",", ""),
    (SHOW, "a name", '{"model": "*"}', "a", "", ""),
)
STAYING = {  # what a request could hold until its answer ends, of which * is repeated
    "unknown members of tools": LONG_STREAM + ', "tools": [{"function": {"name": "a", "x": [*]}}]}',
    "parameters of tools": LONG_STREAM + ', "tools": [{"function": {"name": "a", "parameters": {"x": [*]}}}]}',
    "options of the template": LONG_STREAM + ', "chat_template_kwargs": {"x": [*]}}',
    "metadata": LONG_STREAM + ', "metadata": {"x": [*]}}'}


def body_of(size, body, each, between, after):
    count = int(size / len((each + between + after).encode()))
    begin, end = body.split("*")
    return "".join((begin, (each + between) * (count - 1), each, after * count, end)).encode()


async def large_body(path, body, each, between, after, attacker):
    await attacker.post(path, body_of(15 * MIB * attacker.scale, body, each, between, after))


async def staying(body, attacker):
    """Eight streams of 15 MB each, and then 200 of 60 KB at once."""
    large = body_of(15 * MIB * attacker.scale, body, "[]", ",", "")
    await attacker.posts(8, OPENAI, large)
    await attacker.posts(attacker.many(200), OPENAI, body_of(60_000, body, "[]", ",", ""), leave_after_s=10)


async def shows(attacker):
    await attacker.posts(4, SHOW, body_of(15 * MIB * attacker.scale, '{"x": [*]}', "1", ",", ""))


async def many_keys(attacker):
    await attacker.post(OPENAI, HI | {"x": dict.fromkeys(map(str, range(attacker.many(1_200_000))), 0)})


async def pieces(attacker):
    """A text as long as /tokenize allows."""
    text = "a b" * attacker.many(LIMITS.tokenized_characters // 3)
    await attacker.post(TOKENIZE, {"content": text, "with_pieces": True})


def compressed(size):
    """So many bytes of a body that are spaces, in a thousandth of them."""
    stream, block = zlib.compressobj(9, wbits=31), b" " * MIB
    parts = [stream.compress(json.dumps(HI).encode()), *(stream.compress(block) for _ in range(size // MIB)), stream.flush()]
    return b"".join(parts)


async def bombs(attacker):
    """Gigabytes in megabytes, and bodies that inflate to just what one may have."""
    large, allowed = compressed(int((1 << 30) * attacker.scale)), compressed(15 * MIB)
    for path in (OPENAI, SHOW):
        await attacker.posts(8, path, large, Content_Encoding="gzip")
        await attacker.posts(8, path, allowed, Content_Encoding="gzip")
    await attacker.posts(attacker.many(200), OPENAI, large, leave_after_s=0.2, Content_Encoding="gzip")


async def comparisons(attacker):
    """Each answer's request could be read from the body anew, and by clients that leave."""
    body = {"messages": HI["messages"] * attacker.many(200_000), "variants": [{"seed": seed} for seed in range(8)]}
    await attacker.post(COMPARE, body)
    await attacker.posts(4, COMPARE, body, leave_after_s=1)
    await attacker.posts(attacker.many(50), COMPARE, body | {"messages": HI["messages"] * 1500})


async def biases(attacker):
    """The same ids spelt in many ways, for each of 128 answers."""
    names = [str(token).zfill(width) for width in range(5, 10) for token in range(attacker.many(49_000))]
    await attacker.post(OPENAI, HI | {"logit_bias": dict.fromkeys(names, 1), "n": 128, "max_tokens": 20})


async def stop_strings(attacker):
    """As many and as long as allowed, others each time, because the search for them may be kept."""
    for number in range(attacker.many(400)):
        letters = [f"{chr(0x4e00 + number)}{chr(0x100 + i)}{'a' * (LIMITS.stop_characters // LIMITS.more_stop_strings - 2)}"
                   for i in range(LIMITS.more_stop_strings)]
        await attacker.posts(8, MESSAGES, HI | {"stop_sequences": letters, "max_tokens": 200, "ignore_eos": True})


async def idle(attacker):
    for _ in range(attacker.many(3000)):
        await attacker.connect()
    await asyncio.sleep(2 * attacker.scale)


async def come_and_go(attacker):
    for _ in range(attacker.many(5000)):
        _, writer = await attacker.connect()
        writer.transport.abort()


async def unread(attacker):
    """Responses of every kind whose readers take only a few KB: are those dropped?"""
    file = max(page_files().items(), key=lambda item: len(item[1]))[0]
    get = functools.partial(attacker.request, method="GET")
    long = HI | {"max_tokens": 200, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    requests = 5 * [get(f"/static/{file}"), 20 * get("/openapi.json")]
    requests += [attacker.request(CHAT, long), attacker.request(OPENAI, long)]
    writers = [(await attacker.connect(reads=False))[1] for _ in range(attacker.many(200))]
    for number, writer in enumerate(writers):
        writer.write(requests[number % len(requests)])
    await asyncio.sleep(35 * attacker.scale)
    for _ in range(2):                  # the first is answered with a reset, which the second hits
        for writer in writers:
            writer.write(b"x")
        await asyncio.sleep(0.1)
    attacker.got["dropped"] = sum(writer.transport.is_closing() for writer in writers)


async def drip(begin, attacker):
    """1,000 requests that begin like this and then send one byte at a time."""
    writers = [(await attacker.connect())[1] for _ in range(attacker.many(1000))]
    for writer in writers:
        writer.write(begin(attacker))
    for _ in range(attacker.many(10)):
        await asyncio.sleep(0.2)
        for writer in writers:
            writer.write(b" ")


def half_a_header(attacker):
    return b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


def half_a_body(attacker):
    return attacker.request(CHAT, b'{"messages": [', length=1000)


async def unfinished_bodies(attacker):
    """Bodies of 16 MiB without their last byte."""
    size, piece = int(16 * MIB * attacker.scale), b" " * (1 << 16)

    async def send(writer):
        writer.write(attacker.request(CHAT, length=size))
        with contextlib.suppress(ConnectionError):
            for _ in range(size // len(piece) - 1):
                writer.write(piece)
                await writer.drain()
            writer.write(piece[1:])

    async def send_and_listen():
        reader, writer = await attacker.connect()
        sending, answer = asyncio.ensure_future(send(writer)), asyncio.ensure_future(status_of(reader))
        await asyncio.wait([sending, answer], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([answer], timeout=2)
        attacker.got[str(answer.result()) if answer.done() else "held"] += 1
        sending.cancel()
        answer.cancel()
    await asyncio.gather(*(send_and_listen() for _ in range(attacker.many(200))))


async def whole_logprobs(attacker):
    most = {"n": attacker.many(128), "max_tokens": attacker.many(4000)}
    body = HI | {"logprobs": True, "top_logprobs": 20, "ignore_eos": True} | most
    await attacker.posts(attacker.many(10), OPENAI, body)


async def echoed_logprobs(attacker):
    body = {"prompt": ["a " * 1000] * attacker.many(128), "echo": True, "logprobs": 20, "max_tokens": 0}
    await attacker.posts(attacker.many(10), COMPLETIONS, body)


async def kept_streams(attacker):
    """Does recording much push out what the holder of another key has recorded?"""
    other = f"Bearer {attacker.server.other_key}"
    await attacker.post(CHAT, HI | {"resumable": True}, Authorization=other, X_Request_Id="kept")
    long = {"n": 64, "max_tokens": 100, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    await attacker.posts(attacker.many(12), OPENAI, HI | long | {"stream": True, "resumable": True})
    await attacker.post("/v1/streams/kept", b"", method="GET", Authorization=other)


async def left_streams(attacker):
    """Answers that continue for a while without a reader."""
    body = HI | {"max_tokens": attacker.many(500), "ignore_eos": True, "resumable": True}
    await attacker.posts(attacker.many(200), CHAT, body, leave_after_s=0.3)


async def foreign_pages(attacker):
    """What a browser sends for a page of another origin to a plain http address."""
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        for path in (CHAT, OPENAI, TOKENIZE):
            body = HI | {"content": "a"}
            await attacker.posts(attacker.many(10), path, body, Origin=origin, Content_Type="text/plain")


async def prefix_probe(attacker):
    """Do cached tokens, or the time to an answer, reveal what the holder of another key asked?"""
    if attacker.server.key == attacker.server.other_key:
        return

    def ask(number):
        text = f"My account is {number:06d} and my doctor says that I have to rest for a while. " * 30
        return {"prompt": text, "max_tokens": 1, "temperature": 0}

    await attacker.post(COMPLETIONS, ask(1), Authorization=f"Bearer {attacker.server.other_key}")
    for name, number in (("asked by another key", 1), ("never asked", 2)):
        began_s = time.monotonic()
        answer = await attacker.post(COMPLETIONS, ask(number))
        ms, cached = 1e3 * (time.monotonic() - began_s), re.search(rb'"cached_tokens": (\d+)', answer)
        attacker.got[f"{name}: {cached[1].decode() if cached else '?'} cached, {ms:.0f} ms"] = 1


async def traps(attacker):
    """Messages for which the model's template loops, refuses, writes much, or never ends."""
    for content in HOSTILE:
        messages = [{"role": "user", "content": content}]
        await attacker.posts(attacker.many(10), CHAT, HI | {"messages": messages})


async def hostile_model(template, attacker):
    """A new server whose model has this template: does it serve, or end, within 15 s?"""
    if not attacker.server.process:
        return
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), attacker.server.memory, template)
        server.begin()
        with contextlib.suppress(servers.NotReady):
            await asyncio.to_thread(server.running.wait_until_ready, 15)
        serves, ended = server.running.ready_s is not None, server.process.poll()
        last = server.running.last_words().splitlines()[-1]
        how = "serves" if serves else f"ended with {ended}: {last[:100]}"
        attacker.got["neither up nor ended" if not serves and ended is None else how] = 1
        server.stop()


async def long_chats(attacker):
    """The load of ordinary users: all of them should be answered."""
    words = "All work and no play makes Jack a dull boy. "
    turns = [{"role": role, "content": words * 100} for _ in range(20) for role in ("user", "assistant")]
    answer = [HI["messages"][0], {"role": "assistant", "content": words * 250}]
    for messages in (turns, answer):
        await attacker.post(CHAT, HI | {"messages": messages + HI["messages"], "truncate": "oldest"})


async def noise(attacker):
    kinds = (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50,
             b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n")
    for number in range(attacker.many(2000)):
        _, writer = await attacker.connect()
        writer.write(kinds[number % len(kinds)])


async def tool_lists(attacker):
    """The list of all tools, some of whose servers list what nobody can use."""
    for _ in range(attacker.many(50)):
        await attacker.posts(2, "/v1/tools", b"", method="GET")


async def tool_calls(labels, attacker):
    """Calls of tool servers that write too much, or what nobody can read."""
    async def calls(label):
        for _ in range(attacker.many(4)):
            await attacker.post("/v1/tools/call", {"name": f"{label}__act", "arguments": {"x": 1}})

    await asyncio.gather(*map(calls, labels))


async def tool_arguments(attacker):
    body = b'{"name": "many-small__act", "arguments": {"x": [%s[]]}}' % (b"[]," * (MIB // 3 - 100))
    await attacker.posts(attacker.many(40), "/v1/tools/call", body, Content_Type="application/json")


async def nothing(attacker):
    await asyncio.sleep(3 * attacker.scale)


PATTERNS = (14, 18, 26, 64)
TOOL_ATTACKS = [*hostile_tools.NOISE, *hostile_tools.RESULTS, "stderr-flood", "heavy-pages", "heavy-schema",
                "many-small", "long-description", "deep-schema", "not-a-number", "infinite-ttl", "odd-schemas"]
URL_ATTACKS = ["blank-lines", "notifications", "trickle", "bomb", "breaks-off", "heavy-result", "heavy-pages"]
ATTACKS = {
    "nothing": nothing,
    **{f"{count} patterns in a format": functools.partial(patterns_in_format, count) for count in PATTERNS},
    **{f"{count} patterns in tools": functools.partial(patterns_in_tools, count) for count in PATTERNS},
    "a slow schema, n: 128, and leaving": slow_schema,
    "16 schemas of 550 MB": large_schemas,
    **{f"15 MB to {path}: {what}": functools.partial(large_body, path, *how)
       for path, what, *how in LARGE_BODIES},
    f"15 MB to {OPENAI}: an object of 1 M keys": many_keys,
    f"4 x 15 MB to {SHOW}": shows,
    **{f"streams that hold {name}": functools.partial(staying, body) for name, body in STAYING.items()},
    "500,000 characters to /tokenize, with pieces": pieces,
    "compressed bodies of 1 GiB": bombs,
    "200,000 messages to /v1/compare, 8 variants": comparisons,
    "245,000 spellings in logit_bias, n: 128": biases,
    "256 stop strings of 16 characters, others each time": stop_strings,
    "3,000 idle connections": idle,
    "5,000 connections that come and go": come_and_go,
    "200 responses that nobody reads": unread,
    "1,000 slow headers": functools.partial(drip, half_a_header),
    "1,000 slow bodies": functools.partial(drip, half_a_body),
    "2,000 connections that do not speak HTTP": noise,
    "200 bodies of 16 MiB but a byte": unfinished_bodies,
    "10 whole answers, n: 128, with logprobs": whole_logprobs,
    "10 x 128 prompts, echoed with logprobs": echoed_logprobs,
    "200 resumable streams, left": left_streams,
    "12 recordings of 13 MB": kept_streams,
    "pages of other origins": foreign_pages,
    "what another key has asked": prefix_probe,
    "messages that a template cannot take": traps,
    **{f"a model whose template has {name}": functools.partial(hostile_model, source + TEMPLATE)
       for name, source in HOSTILE.items()},
    "long chats": long_chats,
    "tool servers: lists": tool_lists,
    "tool servers: programs that flood": functools.partial(tool_calls, [*hostile_tools.NOISE, "stderr-flood"]),
    "tool servers: odd results": functools.partial(tool_calls, [*hostile_tools.RESULTS]),
    "tool servers: behind URLs": functools.partial(tool_calls, [f"url-{name}" for name in URL_ATTACKS]),
    "tool servers: 1 MiB of arguments": tool_arguments,
}


# the bench


async def look(server):
    """(restarts of workers, KV pages in use, responses of 5xx so far)."""
    headers = {"Authorization": f"Bearer {server.other_key}"} if server.other_key else {}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=10)) as session:
        async with session.get(server.url + "/stats") as response:
            workers = (await response.json())["workers"]
        async with session.get(server.url + "/metrics") as response:
            text = await response.text()
    failed = re.findall(r'responses_total{.*status="5\d\d"} (\S+)$', text, re.MULTILINE)
    total = lambda name: sum(worker[name] for worker in workers)        # noqa: E731
    return total("restarts"), total("kv_pages_used"), int(sum(map(float, failed)))


async def aftermath(server, attacker, before):
    """What shows only once all is quiet again."""
    deadline_s = time.monotonic() + SETTLE_S
    while (after := await look(server))[1] and time.monotonic() < deadline_s:
        await asyncio.sleep(0.05)
    mine = sum(count for status, count in attacker.got.items() if re.fullmatch(r"5\d\d", status))
    failed = max(0, after[2] - before[2] - mine)
    return {"restarts": after[0] - before[0], "leaked_pages": after[1], "failed": failed,
            "cpu_after": server.cpu_share(attacker.scale)}


async def attacked(name, server, others, options):
    """What one attack did, as a row."""
    attacker, before, log_bytes = Attacker(server, options.scale), await look(server), server.log_bytes
    if server.pause_s:
        server.pause_s[0] = 0.0
    others.stdin.write(b"begin\n")
    began_s = time.monotonic()
    with contextlib.suppress(asyncio.TimeoutError, OSError):
        await asyncio.wait_for(ATTACKS[name](attacker), options.seconds)
    attacker.leave()
    others.stdin.write(b"end\n")
    row = {"attack": name, "seconds": round(time.monotonic() - began_s, 1), "got": attacker.got}
    row |= json.loads(await others.stdout.readline())
    row |= {"pause_ms": 1e3 * server.pause_s[0] if server.pause_s else 0.0, "died": not server.alive}
    if row["served"]:
        row |= await aftermath(server, attacker, before)
    return row | {"log_bytes": server.log_bytes - log_bytes}


COLUMNS = ("attack", "it got", "loop pause inside / as seen, ms", "first token, gap, structured, ms",
           "memory front + its processes, MB", "log, bytes", "else")


def counted(counts):
    return ", ".join(f"{count:,} x {what}" if count > 1 else what for what, count in counts.items() if count)


def shown(row):
    """A line of the table."""
    worst, (front, workers) = Counter(row["worst_ms"]), row["memory_mb"]
    busy = row.get("cpu_after", 0)
    names = {"restarts": "restarted", "leaked_pages": "page leaked", "failed": "5xx"}
    rest = [f"killed at {row['killed']}" if row["killed"] else "died" if row["died"] else "",
            "" if row["served"] or row["died"] else f"not serving after {SETTLE_S:.0f} s",
            counted(row["refused"]), counted({words: row.get(name) for name, words in names.items()}),
            f"{busy:.0%} of a core afterwards" if busy > 0.2 else ""]
    cells = [row["attack"], counted(row["got"]), f"{row['pause_ms']:,.0f} / {worst['livez']:,.0f}",
             ", ".join(f"{worst[name]:,.0f}" for name in ("first", "gap", "structured")),
             f"{front:,.0f} + {workers:,.0f}", f"{row['log_bytes']:,}", "; ".join(filter(None, rest))]
    return "| " + " | ".join(cells) + " |"


@contextlib.asynccontextmanager
async def watching(server, options):
    """The process of the other clients."""
    pid = server.process.pid if server.process else 0
    words = [__file__, "others", server.url, server.other_key or "", str(pid), str(options.memory)]
    others = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield others
    finally:
        others.kill()
        await others.wait()


async def bench(options, server, attacks):
    """Run all attacks, on one server as long as it lives; returns the rows."""
    rows = []
    print(f"| {' | '.join(COLUMNS)} |\n|{len(COLUMNS) * '---|'}", flush=True)
    while len(rows) < len(attacks):
        server.start()
        try:
            async with watching(server, options) as others:
                served = True
                while served and len(rows) < len(attacks):
                    rows.append(await attacked(attacks[len(rows)], server, others, options))
                    print(shown(rows[-1]), flush=True)
                    served = rows[-1]["served"]
        finally:
            server.stop()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="attacks with one of these in their names")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--memory", type=config.size, default=4 << 30)
    parser.add_argument("--scale", type=float, default=1.0, help="of sizes and counts")
    parser.add_argument("--json", help="a file for the rows")
    parser.add_argument("--list", action="store_true")
    for name in ("url", "key", "other-key"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    attacks = [name for name in ATTACKS if any(word in name for word in options.only)]
    if options.list:
        return print("\n".join(attacks))
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with tempfile.TemporaryDirectory() as folder:
        has_tools = any(name.startswith("tool servers") for name in attacks)
        server = (Elsewhere(options) if options.url else
                  Server(Path(folder), options.memory, has_tools=has_tools))
        rows = asyncio.run(bench(options, server, attacks))
    if options.json:
        Path(options.json).write_text(json.dumps(rows))
    return int(not all(row["served"] and not row["restarts"] and not row["leaked_pages"] for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    elif sys.argv[1:2] == ["others"]:
        asyncio.run(Others(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])).run())
    else:
        sys.exit(main())
