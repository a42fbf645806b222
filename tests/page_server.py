"""A stand-in for chat_server.py that speaks the native API from a script, for what a real model cannot be made to do.

`StandIn(prefix)` serves static/ as the real server does (with <base>, with the content security policy). The last user
message picks the script: see `SCRIPTS`. Held scripts go on when the test calls `release()`, so that no test sleeps.
Run it by hand with `python tests/page_server.py [PORT]`.
"""
import asyncio
import json
import sys
import threading
from pathlib import Path

from aiohttp import web

STATIC = Path(__file__).resolve().parent.parent / "static"
POLICY = ("default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
          "object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'")
TIMINGS = {"queue_ms": 0.2, "ttft_ms": 81.4, "tokens_per_second": 212.3}
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


def frame(event: dict, line_end: str = "\n") -> bytes:
    """One event as the server writes it."""
    return f"data: {json.dumps(event, ensure_ascii=False)}{line_end}{line_end}".encode()


def done(count: int, reason: str = "stop") -> bytes:
    """The last event of an answer of `count` tokens."""
    usage = {"prompt_tokens": 12, "completion_tokens": count, "cached_tokens": 4}
    return frame({"done": True, "finish_reason": reason, "usage": usage, "timings": TIMINGS})


class StandIn:
    """The server in its own thread: `url`, `bodies` (posted), `loading` (None = ready), `cancelled` (an Event)."""

    def __init__(self, prefix: str = "", port: int = 0):
        self.prefix, self.bodies, self.loading, self.refusals = prefix, [], None, 0
        self.cancelled = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.held = None
        started = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(started, port), daemon=True)
        self.thread.start()
        started.wait()

    def release(self):
        """Lets the held answer go on."""
        self.loop.call_soon_threadsafe(lambda: self.held.set())

    def close(self):
        """Ends the server and its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def _serve(self, started, port):
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.router.add_get(f"{self.prefix}/", self._page)
        app.router.add_get(f"{self.prefix}/health", self._health)
        app.router.add_get(f"{self.prefix}/v1/models", self._models)
        app.router.add_get(f"{self.prefix}/stats", self._stats)
        app.router.add_post(f"{self.prefix}/chat/completions", self._answer)
        app.router.add_static(f"{self.prefix}/static/", STATIC)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", port)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}{self.prefix}/"
        started.set()
        self.loop.run_forever()
        for task in asyncio.all_tasks(self.loop):             # answers still held
            task.cancel()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    async def _page(self, request):
        page = (STATIC / "index.html").read_text().replace("<head>", '<head>\n<base href="static/">', 1)
        return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": POLICY})

    async def _health(self, request):
        if self.loading:
            return web.json_response({"status": "loading", "ready": False, "loading": self.loading}, status=503)
        return web.json_response({"status": "ok", "ready": True, "num_gpus": 0, "available_workers": 1})

    async def _models(self, request):
        return web.json_response({"object": "list", "data": [{"id": "stand-in-135m", "context_length": 8192}]})

    async def _stats(self, request):
        return web.json_response({"workers": [{"device": "cpu"}], "model": "stand-in-135m"})

    async def _answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.held = asyncio.Event()
        question = body["messages"][-1]["content"]
        if question == "refuse":
            return web.json_response({"detail": "Message 1 has 8,001 characters; the limit is 8,000"}, status=400)
        if question == "overload" and not self.refusals:
            self.refusals += 1
            error = {"error": {"message": "The queue is full"}}
            return web.json_response(error, status=429, headers={"Retry-After": "1"})
        if self.loading:
            return web.json_response({"error": {"message": "The server is stopping"}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            script = story if "very long story" in question else SCRIPTS.get(question, echo)
            async for chunk in script(self, question):
                await response.write(chunk)
        except (asyncio.CancelledError, ConnectionResetError):
            self.cancelled.set()
            raise
        return response


async def echo(server, question):
    """Answers from the question, so that tests can tell which one was answered, and how often."""
    words = ["The capital of Japan is", " Tokyo", "."] if "Japan" in question else \
        ["You", " said", ": ", question, f" (answer {len(server.bodies)})"]
    for word in words:
        yield frame({"token": word, "gpu": 0})
    yield done(len(words))


async def story(server, question):
    """An answer without an end, for Stop."""
    while True:
        yield frame({"token": "and then ", "gpu": 0})
        await asyncio.sleep(0.02)


async def markdown(server, question):
    """A bit of everything, in pieces of 7 characters."""
    for i in range(0, len(MARKDOWN), 7):
        yield frame({"token": MARKDOWN[i:i + 7], "gpu": 0})
    yield done(99)


async def held_markdown(server, question):
    """Held in the middle of a code block."""
    cut = MARKDOWN.index("both at")
    yield frame({"token": MARKDOWN[:cut], "gpu": 0})
    await server.held.wait()
    yield frame({"token": MARKDOWN[cut:], "gpu": 0}) + done(99)


async def paragraphs(server, question):
    """More than a screen, held, then more again."""
    for i in range(40):
        yield frame({"token": f"Paragraph {i}.\n\n", "gpu": 0})
    await server.held.wait()
    for i in range(40, 80):
        yield frame({"token": f"Paragraph {i}.\n\n", "gpu": 0})
    yield done(80)


async def silence(server, question):
    """Held before the first token, with pings."""
    yield b": ping\n\n"
    await server.held.wait()
    yield b": ping\r\n\r\n" + frame({"token": "Here I am.", "gpu": 0}, "\r\n") + done(1)


async def world(server, question):
    """Emoji and CJK, cut at the length limit."""
    yield frame({"token": "日本の首都は東京です。👩‍🚀 κόσμε", "gpu": 0})
    yield done(1, "length")


async def hostile(server, question):
    """An answer that attacks the page, in small pieces."""
    for i in range(0, len(HOSTILE), 5):
        yield frame({"token": HOSTILE[i:i + 5], "gpu": 0})
    yield done(99)


async def broken(server, question):
    """Fails after the first piece."""
    yield frame({"token": "Half an answer", "gpu": 0})
    yield frame({"error": {"message": "The worker died", "type": "server_error", "code": "engine_failure"}})


async def cut_off(server, question):
    """Ends without a done event."""
    yield frame({"token": "Half an answer", "gpu": 0})


SCRIPTS = {"story": story, "markdown": markdown, "held markdown": held_markdown, "paragraphs": paragraphs,
           "silence": silence, "world": world, "hostile": hostile, "broken": broken, "cut off": cut_off}


if __name__ == "__main__":
    stand_in = StandIn(port=int(sys.argv[1]) if len(sys.argv) > 1 else 8001)
    print(f"{stand_in.url} with the scripts: {', '.join(SCRIPTS)}")
    stand_in.thread.join()
