"""Everything goes wrong for ten minutes: workers are killed and hang, clients vanish, connections break.

    python bench/soak.py [--seconds 600] [--model FOLDER] [--clients 12] [--workers 2] [--seed 1]
    python bench/soak.py --changing [--seconds 600]        # many models whose files change: soak_changing.py

Runs the server as a user would, by default with a tiny nanochat model. Its clients read to the end, as a stream or
whole, vanish, cancel, or lose their connection and resume the stream. In the last fifth nothing is killed, so that
pages which only a kill would free show up as leaked. Prints memory over time, then lost answers, leaked pages, the
growth of the front, and what clients got beside what /v1/usage has. An answer is lost if a client that stayed got an
error, an early end, or, if /stats promises equal texts, a text other than the undisturbed one. No answer meets three
kills without a token in between: the server would give it up, as docs/deployment.md says.

The account of the clients that stay must be what they got, to the token: the usage of answers that ended, of cancelled
and failed ones the prompt and the tokens that came. It is known but for an error in the native API, which has no
token ids, and a connection that broke: those count as bounds. The account of the clients that leave lies between the
tokens that they saw and those of their whole answers. Workers check the integrity of their engines whenever they are
idle. Exits with 1 if an answer was lost, a page leaked, a check found a fault, no check ran, the account is wrong, or
the front grew by more than a tenth and 16 MB.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from servers import our_server

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


class Got:
    """What a client got of one answer."""

    def __init__(self, body, path, kills):
        self.question, self.most, self.counted = question_of(body), body["max_tokens"], path.startswith("/v1")
        self.pieces = self.tokens = 0  # tokens: where they are counted
        self.used = None               # tokens, as `usage` says
        self.over = False              # has the server said that nothing more comes?
        self.kills = kills             # of workers since its last token, at most

    def bounds(self, prompt):
        """How many tokens the server may have sent, at least and at most. prompt: how many its prompt has."""
        if self.used is not None:
            return self.used, self.used
        seen = self.tokens if self.counted else self.pieces
        least = prompt + seen if seen else 0
        return least, least if self.over and (self.counted or not seen) else prompt + self.most


class Account:
    """The bounds of what clients got, all together."""

    def __init__(self):
        self.least = self.most = 0

    def add(self, bounds):
        self.least, self.most = self.least + bounds[0], self.most + bounds[1]

    def compared(self, total):
        """(whether what /v1/usage has lies between the bounds, all three)"""
        have = total["prompt_tokens"] + total["completion_tokens"]
        return self.least <= have <= self.most, {"least": self.least, "account": have, "most": self.most}


class Soak:
    def __init__(self, options, url, session, front):
        self.options, self.url, self.session, self.front = options, url, session, front
        self.random, self.counts, self.expected, self.memory = random.Random(options.seed), Counter(), {}, []
        self.stayed, self.left, self.prompts = Account(), Account(), {}  # prompts: tokens of each question's
        self.open, self.suspended = set(), set()  # answers of clients that stay, process ids of workers
        self.began_s = time.monotonic()

    @property
    def share(self):
        """The share of the time that has passed."""
        return (time.monotonic() - self.began_s) / self.options.seconds

    async def get(self, path, headers=STAYS):
        async with self.session.get(self.url + path, headers=headers) as response:
            return await response.json()

    @contextmanager
    def getting(self, body, path, leaves=False):
        """What a client gets within the block goes into its account."""
        got = Got(body, path, len(self.suspended))
        if not leaves:
            self.open.add(got)
        try:
            yield got
        finally:
            self.open.discard(got)
            (self.left if leaves else self.stayed).add(got.bounds(self.prompts.get(got.question, 0)))

    async def answer(self, path, body, leave_after=None, drop_after=None, cancel_after=None):
        """The text of a whole answer; None if the client left or cancelled it after a number of events. A
        dropped stream is resumed."""
        options = (leave_after, drop_after, cancel_after)
        with self.getting(body, path, bool(leave_after)) as got:
            if (text := await self.read(path, body, got, *options)) is not Soak.REFUSED:
                return text
        self.counts["refused for a moment"] += 1
        await asyncio.sleep(0.2)
        return await self.answer(path, body, *options)

    REFUSED = object()

    async def read(self, path, body, got, leave_after, drop_after, cancel_after):
        text, seen, last, headers = "", 0, -1, LEAVES if leave_after else STAYS
        post = self.session.post(self.url + path, json=body | (WHOLE if got.counted else {}), headers=headers)
        while True:
            async with post as response:
                if response.status in (429, 503):
                    got.over = not seen
                    return Soak.REFUSED
                if response.status != 200:
                    got.over = not seen
                    raise Lost(f"status {response.status}: {await response.text()}")
                name = response.headers["X-Request-Id"]
                async for line in response.content:
                    if line.startswith(b"id: "):
                        last = int(line[4:])
                    if not line.startswith(b"data: "):
                        continue
                    piece, seen = self.take(got, line[6:], cancel_after is not None and seen >= cancel_after), seen + 1
                    text += piece
                    if got.over:
                        return text if cancel_after is None else None
                    if seen == leave_after:
                        response.close()
                        self.counts["vanished"] += 1
                        return None
                    if seen == drop_after:
                        break
                    if seen == cancel_after:
                        self.counts["cancelled"] += 1
                        (await self.session.post(f"{self.url}/v1/cancel/{name}", headers=STAYS)).close()
                else:
                    raise Lost("the stream ended before the answer did")
                response.close()
            self.counts["resumed"] += 1
            post = self.session.get(f"{self.url}/v1/streams/{name}", headers=headers | {"Last-Event-ID": str(last)})

    def take(self, got, data, cancelled):
        """The text of one event of either API. Lost for an error, unless the answer was cancelled."""
        event = {} if data.strip() == b"[DONE]" else json.loads(data)
        got.over = not event or "done" in event or "error" in event
        if "error" in event and not cancelled:
            raise Lost(str(event["error"]))
        choices = event.get("choices") or ()
        text = choices[0]["delta"].get("content") or "" if choices else event.get("token", "")
        tokens = sum(len(choice.get("token_ids") or ()) for choice in choices)
        got.tokens, got.pieces = got.tokens + tokens, got.pieces + bool(text)
        if tokens or text:
            got.kills = len(self.suspended)
        if used := event.get("usage"):
            self.note_usage(got, used)
        return text

    def note_usage(self, got, used):
        self.prompts[got.question] = used["prompt_tokens"]
        got.used = used["prompt_tokens"] + used["completion_tokens"]

    async def whole(self, body):
        """The text of an answer that is not streamed."""
        with self.getting(body, PATHS[1]) as got:
            async with self.session.post(self.url + PATHS[1], json=body | {"stream": False}, headers=STAYS) as response:
                found, got.over = await response.json(), True
            if response.status == 200:
                self.note_usage(got, found["usage"])
                return found["choices"][0]["message"]["content"]
        if response.status not in (429, 503):
            raise Lost(f"status {response.status}: {found}")
        self.counts["refused for a moment"] += 1
        await asyncio.sleep(0.2)
        return await self.whole(body)

    async def client(self):
        while self.share < 1:
            number, path = self.random.randrange(len(QUESTIONS)), self.random.choice(PATHS)
            body, how = QUESTIONS[number], self.random.random()
            try:
                if how < 0.25:
                    after = self.random.choice((1, 1, 2, 5, 20))
                    await (self.answer(PATHS[1], body, cancel_after=after) if how < 0.08 else self.answer(path, body, leave_after=after))
                    continue
                if how < 0.35:
                    await self.vanish_at_once(path, body)
                    continue
                drop = self.random.choice((1, 3, 10)) if how < 0.45 else None
                text = await (self.whole(body) if how > 0.9 else self.answer(path, body | {"resumable": bool(drop)}, drop_after=drop))
                if text != self.expected.get(number, text):
                    raise Lost(f"another text: {text[:60]!r} instead of {self.expected[number][:60]!r}")
                self.counts["answers"] += 1
            except (Lost, aiohttp.ClientError, asyncio.TimeoutError) as error:
                self.counts["lost"] += 1
                print(f"LOST after {time.monotonic() - self.began_s:.1f} s, question {number}: {error!r}", flush=True)

    async def vanish_at_once(self, path, body):
        """Queued or in prefill, streaming or not."""
        with self.getting(body, path, leaves=True):
            asked = asyncio.ensure_future(self.session.post(self.url + path, json=body | {"stream": self.random.random() < 0.5},
                                                             headers=LEAVES))
            await asyncio.sleep(self.random.random() / 20)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        self.counts["vanished"] += 1

    async def killer(self):
        """Every few seconds kill a ready worker, or in long runs suspend it, but never the third one under an
        answer without a token in between."""
        pause_s = self.random.uniform(1, 8)
        while self.share < 0.8:
            await asyncio.sleep(pause_s)
            workers, pause_s = (await self.get("/stats"))["workers"], 0.1
            self.suspended &= {worker["pid"] for worker in workers}
            ready = [worker["pid"] for worker in workers if worker["state"] == "ready"]
            if ready and self.share < 0.8 and all(got.kills < 2 for got in self.open):
                hang, victim, pause_s = self.options.seconds >= 300 and self.random.random() < 0.1, self.random.choice(ready), self.random.uniform(1, 8)
                self.counts["hung" if hang else "killed"] += 1
                self.suspended |= {victim} if hang else set()
                for got in self.open:
                    got.kills += 1
                os.kill(victim, signal.SIGSTOP if hang else signal.SIGKILL)

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
        totals = [(await self.get("/v1/usage", key))["total"] for key in (STAYS, LEAVES)]
        (right, stayed), (possible, left) = (account.compared(total) for account, total in zip((self.stayed, self.left), totals))
        failed = (self.counts["lost"] or not right or not possible or leaked != 0 or late - early > max(16, early / 10)
                  or not checks["passed"] or checks["faults"])
        print(json.dumps({"lost": self.counts["lost"], "leaked_pages": leaked, "integrity_checks": checks, "tokens_of_those_who_stayed": stayed,
                          "tokens_of_those_who_left": left, "front_mb": [round(early, 1), round(late, 1)],
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


def question_of(body):
    return len(body["messages"][0]["content"])


async def soak(options):
    command = [options.model, "--dtype", "float32",
               "--num-workers", str(options.workers), "--max-batch", "4", "--kv-cache-memory", "512K",
               *(word for key in (STAYS, LEAVES) for word in ("--api-key", key["Authorization"][7:]))]
    with our_server(*command, env=ENVIRONMENT, log=options.log, stop_limit_s=0) as server:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=240)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            return await Soak(options, server.url, session, server.front).run()


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
        Path(options.log).unlink(missing_ok=True)       # what another run wrote
        if options.changing:
            from soak_changing import soak_changing
            sys.exit(asyncio.run(soak_changing(options, Path(folder))))
        sys.exit(asyncio.run(soak(options)))
