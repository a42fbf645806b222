"""Everything goes wrong for ten minutes: workers are killed and hang, clients vanish, connections break.

    python bench/soak.py [--seconds 600] [--model FOLDER] [--clients 12] [--workers 2] [--seed 1]
    python bench/soak.py --changing [--seconds 600]        # many models whose files change: soak_changing.py

Runs the server as a user would, by default with a tiny nanochat model. Its clients read to the end, vanish,
cancel, or lose their connection and resume the stream. In the last fifth nothing is killed, so that pages
which only a kill would free show up as leaked. Prints memory over time, then lost answers, leaked pages and the
growth of the front, and whether /v1/usage has the very tokens that the clients who stayed were told or sent. An answer is lost if a client that stayed got an error, an early end, or, if /stats promises
equal texts, a text other than the undisturbed one. Workers check the integrity of their engines whenever they are
idle. Exits with 1 if an answer was lost, a page leaked, a check found a fault, no check ran, the account is wrong, or the front
grew by more than a tenth and 16 MB.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import psutil

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("/chat/completions", "/v1/chat/completions")
KINDS = ({"temperature": 0}, {"temperature": 1}, {"temperature": 0.8, "top_p": 0.9}, {"stop": ["ab", "e "]},
         {"temperature": 1.5, "top_k": 0}, {"temperature": 0.5}, {"priority": "low"}, {"min_p": 0.1})
QUESTIONS = [{"messages": [{"role": "user", "content": f"Question {number}: " + "why? " * (7 * number)}], "stream": True,
              "max_tokens": 40 + 15 * number, "seed": number, "ignore_eos": True, **kind} for number, kind in enumerate(KINDS)]


STAYS, LEAVES = ({"Authorization": f"Bearer soak-key-{name}"} for name in ("stays", "leaves"))  # whose accounts are compared
WHOLE = {"stream_options": {"include_usage": True}, "return_token_ids": True}


class Lost(Exception):
    """A client that stayed did not get its answer."""


class Soak:
    def __init__(self, options, url, session, front):
        self.options, self.url, self.session, self.front = options, url, session, front
        self.random, self.counts, self.expected, self.memory = random.Random(options.seed), Counter(), {}, []
        self.told, self.seen, self.prompts = 0, 0, {}  # tokens: of clients that stay, of those that leave at least; of each question
        self.began_s = time.monotonic()

    @property
    def share(self):
        """The share of the time that has passed."""
        return (time.monotonic() - self.began_s) / self.options.seconds

    async def get(self, path, headers=STAYS):
        async with self.session.get(self.url + path, headers=headers) as response:
            return await response.json()

    async def answer(self, path, body, leave_after=None, drop_after=None):
        """The text of a whole answer; None if the client left after a number of events. A dropped stream is
        resumed."""
        text, seen, last, headers = "", 0, -1, LEAVES if leave_after else STAYS
        post = self.session.post(self.url + path, json=body | (WHOLE if path.startswith("/v1") else {}), headers=headers)
        while True:
            async with post as response:
                if response.status in (429, 503):
                    return await self.refused(path, body, leave_after, drop_after)
                if response.status != 200:
                    raise Lost(f"status {response.status}: {await response.text()}")
                name = response.headers["X-Request-Id"]
                async for line in response.content:
                    if line.startswith(b"id: "):
                        last = int(line[4:])
                    if not line.startswith(b"data: "):
                        continue
                    piece, ended, tokens, used = read_event(line[6:])
                    text, seen = text + piece, seen + 1
                    self.seen += tokens if leave_after else 0
                    if used and not leave_after:
                        self.told += used["prompt_tokens"] + used["completion_tokens"]
                        self.prompts[len(body["messages"][0]["content"])] = used["prompt_tokens"]
                    if ended:
                        return text
                    if seen == leave_after:
                        response.close()
                        self.counts["vanished"] += 1
                        return None
                    if seen == drop_after:
                        break
                else:
                    raise Lost("the stream ended before the answer did")
                response.close()
            self.counts["resumed"] += 1
            post = self.session.get(f"{self.url}/v1/streams/{name}", headers=headers | {"Last-Event-ID": str(last)})

    async def cancel(self, body, after):
        """Cancel an answer after a number of events, and count all the tokens that come nevertheless."""
        count, seen = 0, 0
        async with self.session.post(self.url + PATHS[1], json=body | WHOLE, headers=STAYS) as response:
            if response.status != 200:
                return
            async for line in response.content:
                if line.startswith(b"data: "):
                    event, seen = json.loads(line[6:]) if line[6:].strip() != b"[DONE]" else {}, seen + 1
                    if "error" in event:  # as every cancelled answer ends
                        break
                    if used := event.get("usage"):  # it was too late
                        self.told += used["prompt_tokens"] + used["completion_tokens"]
                        count = 0
                        break
                    count += sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
                    if seen == after:
                        (await self.session.post(f"{self.url}/v1/cancel/{response.headers['X-Request-Id']}", headers=STAYS)).close()
        self.told += count + self.prompts[len(body["messages"][0]["content"])] * bool(count)
        self.counts["cancelled"] += 1

    async def refused(self, *request):
        self.counts["refused for a moment"] += 1
        await asyncio.sleep(0.2)
        return await self.answer(*request)

    async def client(self):
        while self.share < 1:
            number, path = self.random.randrange(len(QUESTIONS)), self.random.choice(PATHS)
            body, how = QUESTIONS[number], self.random.random()
            try:
                if how < 0.25:
                    after = self.random.choice((1, 1, 2, 5, 20))
                    await (self.cancel(body, after) if how < 0.08 else self.answer(path, body, leave_after=after))
                    continue
                if how < 0.35:
                    await self.vanish_at_once(path, body)
                    continue
                drop = self.random.choice((1, 3, 10)) if how < 0.45 else None
                text = await self.answer(path, body | {"resumable": bool(drop)}, drop_after=drop)
                if text != self.expected.get(number, text):
                    raise Lost(f"another text: {text[:60]!r} instead of {self.expected[number][:60]!r}")
                self.counts["answers"] += 1
            except (Lost, aiohttp.ClientError, asyncio.TimeoutError) as error:
                self.counts["lost"] += 1
                print(f"LOST after {time.monotonic() - self.began_s:.1f} s, question {number}: {error!r}", flush=True)

    async def vanish_at_once(self, path, body):
        """Queued or in prefill, streaming or not."""
        asked = asyncio.ensure_future(self.session.post(self.url + path, json=body | {"stream": self.random.random() < 0.5},
                                                         headers=LEAVES))
        await asyncio.sleep(self.random.random() / 20)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        self.counts["vanished"] += 1

    async def killer(self):
        """Every few seconds kill a ready worker, or in long runs suspend it."""
        while self.share < 0.8:
            await asyncio.sleep(self.random.uniform(1, 8))
            ready = [worker for worker in (await self.get("/stats"))["workers"] if worker["state"] == "ready"]
            if ready and self.share < 0.8:
                hang = self.options.seconds >= 300 and self.random.random() < 0.1
                self.counts["hung" if hang else "killed"] += 1
                os.kill(self.random.choice(ready)["pid"], signal.SIGSTOP if hang else signal.SIGKILL)

    async def watch(self):
        """The front's memory; prints a line now and then."""
        pause_s = max(0.5, self.options.seconds / 120)
        while self.share < 1:
            exit_on_faults(self.options.log)
            self.memory.append((self.share, self.front.memory_info().rss / 2**20))
            if len(self.memory) % 6 == 1:
                workers = sum(process.memory_info().rss for process in self.front.children()) / 2**20
                print(f"{time.monotonic() - self.began_s:6.0f} s  front {self.memory[-1][1]:6.1f} MB  workers {workers:7.1f} MB  "
                      f"{dict(self.counts)}", flush=True)
            await asyncio.sleep(pause_s)

    async def run(self):
        stats = await self.get("/stats")
        for number, question in enumerate(QUESTIONS):
            text = await self.answer(PATHS[1], question)
            if stats["row_invariant"]:
                self.expected[number] = text
        print("texts are " + ("compared" if self.expected else "not compared: these kernels do not promise them"), flush=True)
        self.began_s = time.monotonic()
        await asyncio.gather(self.killer(), self.watch(), *(self.client() for _ in range(self.options.clients)))
        return await self.judge()

    async def judge(self):
        """What is still in use when all is quiet."""
        deadline_s, leaked = time.monotonic() + 90, None
        while leaked != 0 and time.monotonic() < deadline_s:
            stats = await self.get("/stats")
            quiet = all(worker["state"] == "ready" and worker["running"] == worker["queued"] == 0 for worker in stats["workers"])
            leaked = sum(worker["kv_pages_used"] for worker in stats["workers"]) if quiet else None
            await asyncio.sleep(0.2)
        early, late = (statistics.median(mb for share, mb in self.memory if low <= share < high)
                       for low, high in ((0.2, 0.5), (0.8, 1.1)))
        checks = integrity_checks(self.options.log)
        kept, left = [(await self.get("/v1/usage", key))["total"] for key in (STAYS, LEAVES)]
        kept, left = (total["prompt_tokens"] + total["completion_tokens"] for total in (kept, left))
        failed = self.counts["lost"] or kept != self.told or left < self.seen or leaked != 0 or late - early > max(16, early / 10) or not checks["passed"] or checks["faults"]
        print(json.dumps({"lost": self.counts["lost"], "leaked_pages": leaked, "integrity_checks": checks,
                          "tokens_told_and_in_the_account": [self.told, kept], "seen_and_in_the_account_of_those_who_left": [self.seen, left], "front_mb": [round(early, 1), round(late, 1)],
                          **{name: count for name, count in self.counts.items() if name != "lost"},
                          "restarts": sum(worker["restarts"] for worker in stats["workers"]), "ok": not failed}), flush=True)
        return int(bool(failed))


ENVIRONMENT = os.environ | {"CHAT_SERVER_CHECK_INTEGRITY": "1"}


def integrity_checks(log):
    """How many checks passed and how many found faults, from the server's log; prints the faults."""
    lines = Path(log).read_text(errors="replace").splitlines()
    faults = [line for line in lines if "integrity.IntegrityError:" in line]
    print(*faults, sep="\n", end="\n" * bool(faults), flush=True)
    return {"passed": sum("integrity check: no faults" in line for line in lines), "faults": len(faults)}


def exit_on_faults(log):
    """Exit if a check found a fault: the worker would end at its next idle moment, again and again."""
    if integrity_checks(log)["faults"]:
        sys.exit("a worker's integrity check found faults")


def read_event(data):
    """(text, whether the answer has ended, tokens, its usage) of one event of either API; Lost for an error."""
    if data.strip() == b"[DONE]":
        return "", True, 0, None
    event = json.loads(data)
    if "error" in event:
        raise Lost(str(event["error"]))
    choices = event.get("choices")
    return (choices[0]["delta"].get("content") or "" if choices else event.get("token", ""), "done" in event,
            sum(len(choice.get("token_ids") or ()) for choice in choices or ()), event.get("usage"))


async def soak(options):
    command = [sys.executable, ROOT / "chat_server.py", options.model, "--port", "0", "--host", "127.0.0.1", "--dtype", "float32",
               "--num-workers", str(options.workers), "--max-batch", "4", "--kv-cache-memory", "512K",
               *(word for key in (STAYS, LEAVES) for word in ("--api-key", key["Authorization"][7:]))]
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=open(options.log, "w"), env=ENVIRONMENT)
    try:
        while not (found := re.search(rb"http://127\.0\.0\.1:\d+", line := await server.stdout.readline())):
            if not line:
                raise SystemExit("the server did not start")
        timeout = aiohttp.ClientTimeout(total=None, sock_read=240)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            return await Soak(options, found[0].decode(), session, psutil.Process(server.pid)).run()
    finally:
        server.kill()
        await server.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--model", default=ROOT / "tests/fixtures/nanochat/gen5")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", help="the server's log goes into this file")
    parser.add_argument("--changing", action="store_true", help="models and adapters that come, change and go, and the server is restarted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.log = options.log or Path(folder) / "log"
        if options.changing:
            from soak_changing import soak_changing
            sys.exit(asyncio.run(soak_changing(options, Path(folder))))
        sys.exit(asyncio.run(soak(options)))
