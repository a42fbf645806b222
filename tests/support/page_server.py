"""A stand-in for chat_server.py that answers from a script, for what a real model cannot be made to do.

`StandIn(prefix)` serves static/ like the real server, with <base> and the content security policy. The last
user message picks the script, see `SCRIPTS`. A held script continues when the test calls `release()`, so no
test sleeps. Run it by hand with `python tests/support/page_server.py [PORT]`.
"""
import asyncio
import functools
import json
import sys
import threading
from pathlib import Path

from aiohttp import web

from chatlm.front.server.responses import SECURITY_HEADERS

STATIC = Path(__file__).resolve().parents[2] / "static"
POLICY = SECURITY_HEADERS["Content-Security-Policy"].replace("connect-src *", "connect-src 'self'")
TIMINGS = {"queue_ms": 0.2, "ttft_ms": 81.4, "tokens_per_second": 212.3}
MODEL = {"id": "stand-in-135m", "context_length": 8192, "owned_by": "chat_server", "capabilities": {}, "defaults": {}}
MARKDOWN = """# Sorting

A **stable** sort keeps *equal* items in order, see [the page](https://example.org/sort).

1. Compare neighbours
2. Swap them
   - until nothing moves

```python
def swap(pair: tuple) -> tuple:
    a, b = pair  # both at once
    return b, a
```

| name | cost |
|------|------|
| bubble | $n^2$ |
| merge | \\(n \\log n\\) |

$$\\sum_{i=1}^{n} i = \\frac{n(n+1)}{2}$$

> It costs $5 to $9, which is no formula.

```
an open fence, never closed"""
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

[click](javascript:window.hacked=3) <a href="javascript:window.hacked=4" onclick="window.hacked=5">this</a>

![remote](https://example.org/pixel.png) <svg onload="window.hacked=6"></svg> <iframe src="//example.org"></iframe>

$\\href{javascript:window.hacked=7}{x}$

```"><img src=x onerror=window.hacked=8>
</code></pre><script>window.hacked = 9</script>
```

| <style>body { display: none }</style> | b |
|---|---|
| <div id="message" style="position:fixed">over</div> | the end |
"""
BLOCKS = """Setext
======
text
---

- loose

  second paragraph

      code in it

- next
lazy line

* other list
1) one

5. five

| a | b
|--|:-:
| `x|y` | 2
no pipe

<details>
<summary>s</summary>

inside

</details>

````md
```py
nested
```
````

    indented

    still

\\[
x = y
\\]

a $x$ b \\(y\\) c $$z$$ d $ 5 and $6

See [first] and [second][2], footnote[^1].

[first]: https://example.org/1
[2]: https://example.org/2 "title"

Line one
line two  \r\nline three\r\n\r\n# End #
***
**unclosed and `open"""


def frame(event: dict) -> bytes:
    """One event as the server writes it."""
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


def done(count: int, reason: str = "stop", **more) -> dict:
    """The last event of an answer of `count` tokens."""
    usage = {"prompt_tokens": 12, "completion_tokens": count, "cached_tokens": 4}
    return {"done": True, "finish_reason": reason, "usage": usage, "timings": TIMINGS | more}


def native(event: dict) -> bytes:
    return frame(event)


def openai(event: dict) -> bytes:
    """A native event as chunks of /v1/chat/completions."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "stand-in-135m", "seed": 7}
    choice = {"index": 0, "delta": {}, "finish_reason": None}
    if event.get("done"):
        reasons = {name: event[name] for name in ("finish_reason", "stop_reason") if name in event}
        ending = head | {"choices": [choice | reasons], "timings": event["timings"]}
        return frame(ending) + frame(head | {"choices": [], "usage": event["usage"]}) + b"data: [DONE]\n\n"
    if "token" in event or "reasoning" in event:
        names = {"token": "content", "reasoning": "reasoning_content"}
        return frame(head | {"choices": [choice | {"delta": {names[name]: event[name] for name in names if name in event}}]})
    return frame(event)


class StandIn:
    """The server in its own thread: `url`, `bodies` (posted), `loading` (None = ready), `cancelled` (an Event).

    `model` is what /v1/models says of it; None makes it a server that has only nanochat's route.
    """

    def __init__(self, prefix: str = "", port: int = 0):
        self.prefix = prefix
        self.loop = asyncio.new_event_loop()
        self._begin()
        started = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(started, port), daemon=True)
        self.thread.start()
        started.wait()

    def _begin(self):
        self.bodies, self.loading, self.refusals = [], None, 0
        self.several = []           # what /v1/models lists instead
        self.restarts = 0           # of its worker,
        self.worker = {}            # and what /stats has of it besides
        self.status = "loading"     # what it is doing while `loading` is set
        self.admits = False         # pages of other origins
        self.busy = False           # every question is refused
        self.model = MODEL | {"capabilities": {}, "defaults": {}}
        self.cancelled = threading.Event()
        self.hurried = []           # the answers that were to stop thinking, which ends the hold
        self.held, self.holds = None, threading.Event()     # what answers wait for; whether any does

    def forget(self):
        """Be as new: end what still runs, and forget what was said."""
        async def end():
            for connection in [*self.runner.server.connections]:
                if connection.transport:
                    connection.transport.abort()        # which cancels what answers it
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
            self._begin()
        asyncio.run_coroutine_threadsafe(end(), self.loop).result(30)

    def release(self):
        """Let the held answer continue, as soon as there is one: the page may not have sent its question yet."""
        assert self.holds.wait(30)
        self.holds.clear()
        self.loop.call_soon_threadsafe(self.held.set)

    async def hold(self):
        """Wait until the test calls `release`, together with other answers that wait."""
        if self.held is None or self.held.is_set():
            self.held = asyncio.Event()
        self.holds.set()
        try:
            await self.held.wait()
        except asyncio.CancelledError:
            self.holds.clear()
            raise

    def close(self):
        """End the server and its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def _serve(self, started, port):
        asyncio.set_event_loop(self.loop)
        app = web.Application(client_max_size=64 << 20, middlewares=[web.middleware(functools.partial(self._admit))])
        app.on_response_prepare.append(self._set_headers)
        app.router.add_get(f"{self.prefix}/", self._page)
        app.router.add_get(f"{self.prefix}/health", self._health)
        app.router.add_get(f"{self.prefix}/v1/models", self._models)
        app.router.add_get(f"{self.prefix}/stats", self._stats)
        app.router.add_post(f"{self.prefix}/chat/completions", self._answer)
        app.router.add_post(f"{self.prefix}/v1/chat/completions", self._answer)
        app.router.add_post(f"{self.prefix}/v1/cancel/{{id}}", self._cancel)
        app.router.add_post(f"{self.prefix}/tokenize", self._tokenize)
        app.router.add_post(f"{self.prefix}/apply-template", self._template)
        app.router.add_static(f"{self.prefix}/static/", STATIC)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        self.loop.run_until_complete(self.runner.setup())
        site = web.TCPSite(self.runner, "127.0.0.1", port)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}{self.prefix}/"
        started.set()
        self.loop.run_forever()
        for task in asyncio.all_tasks(self.loop):             # answers still held
            task.cancel()
        self.loop.run_until_complete(self.runner.cleanup())
        self.loop.close()

    async def _admit(self, request, handler):
        return web.Response() if request.method == "OPTIONS" else await handler(request)

    async def _set_headers(self, request, response):
        if self.admits:
            response.headers.update({"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "*, Authorization"})

    async def _page(self, request):
        page = (STATIC / "index.html").read_text().replace("<head>", '<head>\n<base href="static/">', 1)
        return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": POLICY})

    async def _health(self, request):
        if self.loading:
            return web.json_response({"status": self.status, "ready": False, "loading": self.loading}, status=503)
        return web.json_response({"status": "ok", "ready": True, "num_gpus": 0, "available_workers": 1})

    async def _models(self, request):
        if self.model is None:
            raise web.HTTPNotFound
        return web.json_response({"object": "list", "data": self.several or [self.model]})

    async def _cancel(self, request):
        if request.query.get("reasoning") != "true":
            raise web.HTTPNotFound
        self.hurried.append(request.match_info["id"])
        if len(self.hurried) == 1:              # the first comes too early
            raise web.HTTPConflict
        self.held.set()
        return web.json_response({})

    async def _tokenize(self, request):
        return web.json_response({"tokens": list(range(len((await request.json())["content"].split())))})

    async def _template(self, request):
        said = "".join(f"<|{message['role']}|>{message['content']}" for message in (await request.json())["messages"])
        return web.json_response({"prompt": f"<|system|>Be a stand-in.{said}"})

    async def _stats(self, request):
        return web.json_response({"workers": [{"device": "cpu", "restarts": self.restarts} | self.worker], "model": "stand-in-135m"})

    async def _answer(self, request):
        if "v1" in request.path and self.model is None:
            raise web.HTTPNotFound
        body = await request.json()
        self.bodies.append(body)
        question = body["messages"][-1]["content"]
        if isinstance(question, list):
            question = " ".join(part.get("text", "") for part in question).strip() or "(image)"
        if refusal := self._refusal(question):
            return refusal
        if body.get("stream") is not True and "v1" in request.path:
            return web.json_response({"choices": [{"message": {"role": "assistant", "content": 'Title: "Colours of **apples**."'}}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        encode = openai if "v1" in request.path else native
        try:
            script = story if "very long story" in question else SCRIPTS.get(question, echo)
            async for event in script(self, question):
                await response.write(event if isinstance(event, bytes) else encode(event))
        except (asyncio.CancelledError, ConnectionResetError):
            self.cancelled.set()
            raise
        return response

    def _refusal(self, question):
        if question.startswith("refuse"):
            return web.json_response({"error": {"message": "Message 1 has 8,001 characters; the limit is 8,000"}}, status=400)
        if self.busy or question == "overload" and not self.refusals:
            self.refusals += 1
            error = {"error": {"message": "The queue is full"}}
            return web.json_response(error, status=429, headers={"Retry-After": "1"})
        return web.json_response({"error": {"message": "The server is stopping"}}, status=503) if self.loading else None


async def echo(server, question):
    """Answers with the question, so that tests can tell which one was answered, and how often."""
    words = ["The capital of Japan is", " Tokyo", "."] if "Japan" in question else \
        ["You", " said", ": ", question, f" (answer {len(server.bodies)})"]
    for word in words:
        yield {"token": word, "gpu": 0}
    yield done(len(words))


async def story(server, question):
    """An answer without an end, for Stop."""
    while True:
        yield {"token": "and then ", "gpu": 0}
        await asyncio.sleep(0.02)


async def markdown(server, question):
    """A bit of everything, in pieces of 7 characters."""
    for i in range(0, len(MARKDOWN), 7):
        yield {"token": MARKDOWN[i:i + 7], "gpu": 0}
    yield done(99)


async def held_markdown(server, question):
    """Held in the middle of a code block."""
    cut = MARKDOWN.index("both at")
    yield {"token": MARKDOWN[:cut], "gpu": 0}
    await server.hold()
    yield {"token": MARKDOWN[cut:], "gpu": 0}
    yield done(99)


async def paragraphs(server, question):
    """More than a screen, held, then more again."""
    for i in range(40):
        yield {"token": f"Paragraph {i}.\n\n", "gpu": 0}
    await server.hold()
    for i in range(40, 80):
        yield {"token": f"Paragraph {i}.\n\n", "gpu": 0}
    yield done(80)


async def silence(server, question):
    """Held before the first token, with pings."""
    yield b": ping\n\n"
    await server.hold()
    yield b": ping\r\n\r\n" + openai({"token": "Here I am."}).replace(b"\n", b"\r\n")
    yield done(1)


async def world(server, question):
    """Emoji and CJK, cut at the length limit."""
    yield {"token": "日本の首都は東京です。👩‍🚀 κόσμε", "gpu": 0}
    yield done(1, "length")


async def hostile(server, question):
    """An answer that attacks the page, in small pieces."""
    for i in range(0, len(HOSTILE), 5):
        yield {"token": HOSTILE[i:i + 5], "gpu": 0}
    yield done(99)


async def broken(server, question):
    """Fails after the first piece."""
    yield {"token": "Half an answer", "gpu": 0}
    yield {"error": {"message": "The worker died", "type": "server_error", "code": "engine_failure"}}


async def cut_off(server, question):
    """Ends without a done event."""
    yield {"token": "Half an answer", "gpu": 0}


async def thoughts(server, question):
    """Thinks, is held, then answers."""
    for word in ("Let me ", "think about **it**", ", slowly."):
        yield {"reasoning": word, "gpu": 0}
    await server.hold()
    yield {"token": "It is 42.", "gpu": 0}
    yield done(9)


async def progress(server, question):
    """Waits in the queue, then the prompt is computed; held after each."""
    for event in ({"queue_position": 3}, {"queue_position": 0, "prompt_tokens": 2000, "prompt_tokens_done": 860}):
        yield {"progress": event}
        await server.hold()
    yield {"token": "Done.", "gpu": 1}
    yield done(1, gpu=1)


async def drafts(server, question):
    """Five events of three tokens each, held before the end."""
    for i in range(5):
        yield frame({"choices": [{"index": 0, "delta": {"content": "one two three "}, "token_ids": [3 * i, 3 * i + 1, 3 * i + 2]}]})
        await asyncio.sleep(0.01)
    await server.hold()
    yield done(15)


async def nothing(server, question):
    """An answer without a word."""
    yield done(1)


async def only_thoughts(server, question):
    """Thinks, and then says nothing."""
    yield {"reasoning": "Hm."}
    yield done(2)


async def tags(server, question):
    """Leaves its thoughts in the text, as servers do that know nothing of them; the tags come in pieces."""
    for piece in ("<th", "ink>\n", "Let me **see**", ".\n</", "think>\n", "\nIt is ", "x < 5."):
        yield {"token": piece, "gpu": 0}
    yield done(9)


async def closing_tag(server, question):
    """The same where the template has opened the thoughts; held before they end."""
    yield {"token": "Let me see", "gpu": 0}
    await server.hold()
    for piece in (".\n</thi", "nk>", "\n\nIt is `</think>`", "."):
        yield {"token": piece, "gpu": 0}
    yield done(9)


async def repeats(server, question):
    """An answer that the server ends because it repeats itself."""
    yield {"token": "again again", "gpu": 0}
    yield done(2) | {"stop_reason": "repetition"}


async def half(server, question):
    """An answer that ends at the length limit."""
    yield {"token": "Once upon a time", "gpu": 0}
    yield done(4, "length")


async def half_a_thought(server, question):
    """An answer that ends at the length limit while it still thinks."""
    yield {"reasoning": "Let me see"}
    yield done(4, "length")


async def call(server, question):
    """Calls two functions, one in pieces."""
    def delta(**fields):
        return frame({"choices": [{"index": 0, "delta": {"tool_calls": [fields]}, "finish_reason": None}]})
    yield delta(index=0, id="call_1", type="function", function={"name": "calculator", "arguments": '{"expression": '})
    yield delta(index=0, function={"arguments": '"6 * 7"}'})
    yield delta(index=1, id="call_2", type="function", function={"name": "look_up", "arguments": "{}"})
    yield done(9, "tool_calls")


async def held_call(server, question):
    """Reads the prompt, then writes a call; held in it."""
    yield {"progress": {"queue_position": 0, "prompt_tokens": 2000, "prompt_tokens_done": 860}}
    await server.hold()
    pieces = [piece async for piece in call(server, question)]
    yield pieces[0]
    await server.hold()
    for piece in pieces[1:]:
        yield piece


SCRIPTS = {"call": call, "held call": held_call, "drafts": drafts, "nothing": nothing, "only thoughts": only_thoughts, "tags": tags, "closing tag": closing_tag,
           "half a thought": half_a_thought, "thoughts": thoughts, "progress": progress, "half": half, "repeats": repeats, "story": story, "markdown": markdown, "held markdown": held_markdown, "paragraphs": paragraphs,
           "silence": silence, "world": world, "hostile": hostile, "broken": broken, "cut off": cut_off}


if __name__ == "__main__":
    stand_in = StandIn(port=int(sys.argv[1]) if len(sys.argv) > 1 else 8001)
    print(f"{stand_in.url} with the scripts: {', '.join(SCRIPTS)}")
    stand_in.thread.join()
