"""The scenario of `bench/soak.py --changing`: everything below --models changes while it is queried, compared, killed and restarted.

Five tiny models share memory for three, with a prefix store: two that stay, one whose file is replaced by another version and back, one
that appears and disappears, and an adapter with two versions. Clients ask each of them, read, vanish, and compare two at a time. Workers
are killed, and the whole server is stopped and started again. Each text that a client reads must be, from its first character to its
last, what one version of that model answers undisturbed. An answer may end with an error only if its model was replaced or removed.
No request may take longer than 120 s. Idle workers check their integrity, as in soak.py.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil

import servers
from servers import free_port
from soak import ENVIRONMENT, exit_on_faults, integrity_checks

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
MOST_S = 120.0                              # the longest that a request may take
CHANGING = ("changing", "guest", "ad")      # whose files change
NAMES = ("steady", "other", *CHANGING)
QUESTIONS = [{"messages": [{"role": "user", "content": f"Question {number}: " + "why? " * (9 * number)}], "max_tokens": 24 + 12 * number,
              "seed": number, "ignore_eos": True, "temperature": number % 2} for number in range(4)]
EXCUSES = r"changed|gone|replaced|does not exist|no longer|not there|cannot be served"


class Lost(Exception):
    """A client that stayed did not get its answer."""


class Folder:
    """The models below --models, and the versions that replace each other."""

    def __init__(self, path):
        from families import as_gguf, make_model, save
        from lora import random_adapter
        from tiny_gguf import small_gguf_metadata
        words = small_gguf_metadata("gpt-2", **{"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
        self.models, self.kept = path / "models", path / "kept"
        self.models.mkdir()
        self.kept.mkdir()
        steady = make_model("llama3.1", seed=1)
        save(steady, self.models / "steady")
        config = steady.config
        shapes = {"mlp.down_proj": (config.hidden_size, config.intermediate_size), "mlp.up_proj": (config.intermediate_size, config.hidden_size)}
        for version in "ab":
            as_gguf(self.kept / f"changing-{version}", make_model("llama3.1", seed=2 + ord(version)), metadata=words)
            random_adapter(self.kept / f"ad-{version}", config.num_hidden_layers, shapes, ord(version), size=0.3, base_model_name_or_path="steady")
        as_gguf(self.kept / "guest-a", make_model("llama3.1", seed=3), metadata=words)
        as_gguf(self.models / "other.gguf", make_model("llama3.1", seed=4), metadata=words)
        shutil.copytree(self.kept / "ad-a", self.models / "ad")
        self.put("changing", "a")
        self.put("guest", "a")

    def put(self, name, version):
        """Make a version the one that is served, by one rename, as a trainer would."""
        inside = "adapter_model.safetensors" if name == "ad" else ""
        source = self.kept / f"{name}-{version}" / inside
        target = self.models / "ad" / inside if inside else self.models / f"{name}.gguf"
        shutil.copyfile(source, part := target.with_name("written.part"))
        os.utime(part)
        os.replace(part, target)

    def remove(self, name):
        (self.models / f"{name}.gguf").unlink()


class Server:
    """The server's process; after a restart it is a new one at the same address."""

    def __init__(self, options, folder):
        self.log, self.port = options.log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, ROOT / "chat_server.py", "--models", folder / "models", "--prefix-store", f"{folder / 'store'}:64M",
                        "--models-memory", "760M", "--prefix-memory", "16M", "--dtype", "float32", "--max-batch", "4", "--kv-cache-memory", "512K",
                        "--host", "127.0.0.1", "--port", self.port]
        self.running = None
        self.life = 0       # counts each end and each restart: odd while it runs

    async def start(self):
        self.running = servers.Server(self.command, "chat_server", port=self.port, log=self.log, env=ENVIRONMENT)
        await asyncio.to_thread(self.running.wait_until_ready)
        self.front = self.running.front
        self.life += 1

    async def restart(self):
        """End the front alone: its workers must notice that."""
        self.life += 1
        self.running.process.send_signal(random.choice((signal.SIGTERM, signal.SIGKILL)))
        await asyncio.to_thread(self.running.process.wait)
        await self.end()
        await self.start()

    async def end(self):
        if self.running:
            await asyncio.to_thread(self.running.stop, 0)


class ChangingSoak:
    def __init__(self, options, server, folder, session):
        self.options, self.server, self.folder, self.session = options, server, folder, session
        self.random, self.counts, self.oldest_s = random.Random(options.seed), Counter(), 0.0
        self.texts = {name: [set() for _ in QUESTIONS] for name in NAMES}    # the texts that an answer may have
        self.fronts = []     # (life, memory of the front in MB, its open files) over time
        self.began_s = time.monotonic()

    @property
    def share(self):
        return (time.monotonic() - self.began_s) / self.options.seconds

    async def get(self, path):
        async with self.session.get(self.server.url + path) as response:
            return await response.json()

    async def post(self, path, body, read):
        """What `read` makes of a response with status 200; asks again if the server was restarted meanwhile or replies with 503. None
        for a 404. Lost for everything else."""
        began_s = time.monotonic()
        while True:
            life, asked_s = self.server.life, time.monotonic()
            try:
                async with self.session.post(self.server.url + path, json=body) as response:
                    if response.status == 404:
                        return None
                    if response.status not in (429, 503):
                        if response.status != 200:
                            raise Lost(f"status {response.status}: {await response.text()}")
                        return await read(response)
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                if life % 2 and self.server.life == life:
                    raise Lost(f"{error!r} without a restart") from error
                self.counts["asked again after a restart"] += 1
            finally:
                self.oldest_s = max(self.oldest_s, time.monotonic() - asked_s)
            if time.monotonic() - began_s > 2 * MOST_S:
                raise Lost(f"refused for {time.monotonic() - began_s:.0f} s")
            await asyncio.sleep(0.3)

    async def events(self, response):
        async for line in response.content:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])

    async def answer(self, name, number, leave_after=None):
        """The text of an answer; None if the client left or the model does not exist."""
        async def read(response):
            text, seen = "", 0
            async for event in self.events(response):
                if "error" in event:
                    return self.excused(name, str(event["error"]))
                text += (event.get("choices") or [{"delta": {}}])[0]["delta"].get("content") or ""
                seen += 1
                if seen == leave_after:
                    self.counts["vanished"] += 1
                    return response.close()
                if (event.get("choices") or [{}])[0].get("finish_reason"):
                    return text
            raise aiohttp.ClientPayloadError("the stream ended before the answer did")

        return await self.post("/v1/chat/completions", {**QUESTIONS[number], "model": name, "stream": True}, read)

    def excused(self, name, error):
        """For an answer that ended with an error: Lost, unless its model's files change."""
        if name not in CHANGING or not re.search(EXCUSES, error):
            raise Lost(f"{name}: {error}")
        self.counts["ended because files changed"] += 1

    async def compare(self, names, number):
        async def read(response):
            texts, done = ["" for _ in names], False
            async for event in self.events(response):
                if "index" in event:
                    texts[event["index"]] += event.get("token") or ""
                if "error" in event and "index" in event:
                    self.excused(names[event["index"]], str(event["error"]))
                    texts[event["index"]] = None
                done = done or bool(event.get("done"))
                if "error" in event and "index" not in event:
                    raise Lost(f"comparing {names}: {event['error']}")
            if not done:
                raise aiohttp.ClientPayloadError("the stream ended before the answers did")
            for name, text in zip(names, texts):
                self.check(name, number, text)
            return True

        if await self.post("/v1/compare", {**QUESTIONS[number], "models": names}, read):
            self.counts["comparisons"] += 1

    def check(self, name, number, text):
        if text is not None and text not in self.texts[name][number]:
            raise Lost(f"another text of {name}, question {number}: {text[:60]!r}")

    async def client(self):
        while self.share < 1:
            name, number, how = self.random.choice(NAMES), self.random.randrange(len(QUESTIONS)), self.random.random()
            try:
                if how < 0.15:
                    await self.compare(self.random.sample(NAMES, 2), number)
                elif how < 0.3:
                    await self.answer(name, number, leave_after=self.random.choice((1, 2, 9)))
                else:
                    text = await self.answer(name, number)
                    self.check(name, number, text)
                    self.counts["answers" if text is not None else "not there"] += 1
            except Lost as error:
                self.counts["lost"] += 1
                print(f"LOST after {time.monotonic() - self.began_s:.1f} s: {error}", flush=True)

    async def learn(self):
        """Record what each version of each model answers undisturbed."""
        for name in NAMES:
            await self.learn_version(name)
        for name in ("changing", "ad"):
            self.folder.put(name, "b")
            if name == "changing":
                await self.unload(name)
            while not await self.differs(name):
                await asyncio.sleep(0.5)
            await self.learn_version(name)

    async def differs(self, name):
        with suppress(Lost):
            text = await self.answer(name, 0)
            return text is not None and text not in self.texts[name][0]
        return False

    async def unload(self, name):
        """Replace a loaded model by the new version from its next request on; until then the old one answers."""
        async with self.session.post(self.server.url + "/models/unload", json={"model": name}):
            pass

    async def learn_version(self, name):
        for number, texts in enumerate(self.texts[name]):
            texts.add(await self.answer(name, number))
        assert None not in set().union(*self.texts[name]), f"{name} did not answer"

    async def change(self):
        """Add, change and remove files."""
        version, there = {"changing": "b", "ad": "b"}, True
        while self.share < 0.8:
            await asyncio.sleep(self.random.uniform(2, 12))
            name = self.random.choice(CHANGING)
            if name != "guest":
                version[name] = "ab"[version[name] == "a"]
                self.folder.put(name, version[name])
                if name == "changing" and self.random.random() < 0.5:
                    with suppress(aiohttp.ClientError):
                        await self.unload(name)
            else:
                self.folder.remove("guest") if there else self.folder.put("guest", "a")
                there = not there
            self.counts["changes of files"] += 1

    async def kill(self):
        while self.share < 0.8:
            await asyncio.sleep(self.random.uniform(2, 15))
            with suppress(aiohttp.ClientError, asyncio.TimeoutError):
                ready = [worker for worker in (await self.get("/stats"))["workers"] if worker["state"] == "ready"]
                if ready:
                    with suppress(ProcessLookupError):
                        os.kill(self.random.choice(ready)["pid"], signal.SIGKILL)
                    self.counts["killed"] += 1

    async def restart(self):
        """Restart the whole server twice: after a quarter and after half of the time."""
        for share in (0.25, 0.5):
            await asyncio.sleep(max(0.0, (share - self.share) * self.options.seconds))
            await self.server.restart()
            self.counts["restarts of the server"] += 1

    async def watch(self):
        while self.share < 1:
            await asyncio.sleep(max(0.5, self.options.seconds / 120))
            exit_on_faults(self.options.log)
            with suppress(psutil.Error):
                front = self.server.front
                self.fronts.append((self.server.life, front.memory_info().rss / 2**20, front.num_fds()))
                if len(self.fronts) % 6 == 1:
                    print(f"{time.monotonic() - self.began_s:6.0f} s  front {self.fronts[-1][1]:6.1f} MB, {self.fronts[-1][2]} files, "
                          f"oldest request {self.oldest_s:.0f} s  {dict(self.counts)}", flush=True)

    async def run(self):
        await self.learn()
        self.began_s, self.oldest_s = time.monotonic(), 0.0
        print("each version's texts are known", flush=True)
        await asyncio.gather(self.change(), self.kill(), self.restart(), self.watch(), *(self.client() for _ in range(self.options.clients)))
        return await self.judge()

    async def judge(self):
        """What is still in use when all is quiet."""
        deadline_s, leaked = time.monotonic() + 90, None
        while leaked != 0 and time.monotonic() < deadline_s:
            stats = await self.get("/stats")
            loaded = [worker for worker in stats["workers"] if worker["state"] != "unloaded"]
            quiet = all(worker["state"] == "ready" and worker["running"] == worker["queued"] == 0 for worker in loaded)
            leaked = sum(worker["kv_pages_used"] for worker in loaded) if quiet else None
            await asyncio.sleep(0.2)
        last = [(mb, files) for life, mb, files in self.fronts if life == self.server.life]
        third = max(1, len(last) // 3)
        early, late = (max(rows) for rows in (last[:third], last[-third:]))
        grown = late[0] - early[0] > max(16, early[0] / 10) or late[1] > early[1] + 8
        late_ones, checks = self.oldest_s > MOST_S, integrity_checks(self.options.log)
        failed = self.counts["lost"] or leaked != 0 or grown or late_ones or not checks["passed"] or checks["faults"]
        print(json.dumps({"lost": self.counts["lost"], "leaked_pages": leaked, "integrity_checks": checks, "front_mb": [round(early[0], 1), round(late[0], 1)],
                          "front_files": [early[1], late[1]], "oldest_request_s": round(self.oldest_s, 1),
                          **{name: count for name, count in self.counts.items() if name != "lost"}, "ok": not failed}), flush=True)
        return int(bool(failed))


async def soak_changing(options, path):
    """path: an empty folder for models and store."""
    folder = Folder(path)
    server = Server(options, path)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=2 * MOST_S)
    try:
        await server.start()
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            return await ChangingSoak(options, server, folder, session).run()
    finally:
        await server.end()
