"""Answers of several keys equal bit for bit what they are alone: texts, tokens and log-probabilities, whatever others do beside them.

Beside them clients cancel and vanish, ask for drafts, adapters, pictures and grammars, use up budgets, fill the cache and send what is refused,
and workers are killed. By day a share of the answers is asked for, at night 10,000; ISOLATED_ANSWERS=100000 asks for more, which takes hours.
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import signal
import time
from collections import Counter

import aiohttp
import pytest

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
from chatlm.common.core import decode_core    # noqa: E402
from draft_heads import Head, save_with_head    # noqa: E402
from families import make_model    # noqa: E402
from lora import random_adapter    # noqa: E402
from nightly import by_day    # noqa: E402
from real_server import server    # noqa: E402
from tiny_sight import make_smolvlm, save_sight    # noqa: E402

pytestmark = pytest.mark.skipif(decode_core() is None, reason="the promise is decode_core's")
PATH = "/v1/chat/completions"
HONEST = tuple(f"honest-key-{number}" for number in range(4))
HOSTILE = "hostile-key-0", "hostile-key-1"
POOR = {"poor-key-0": "refuse", "poor-key-1": "background"}      # their budgets are soon used up
DAY_TOKENS = 2_000          # of a poor key
EACH = 3                    # clients of an honest key that ask at the same time
KILL_S = 1.0, 4.0           # between two kills
KILLS_OF_ONE = 2            # the third without a token in between rightly fails an answer
REFUSED = 429, 503          # at this moment: ask again
BY_DAY = 240                # answers of each model
AT_NIGHT = int(os.environ.get("ISOLATED_ANSWERS", 10_000)) // 2
MEMORY = {"sees": "512K", "states": "1M"}       # of pages: some long answers fill it
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["river", "mountain"]},
                                           "tags": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}}, "required": ["name", "kind", "tags"],
          "additionalProperties": False}


def picture_url(size, seed):
    target = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(target, "PNG")
    return f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"


def question(text, **fields):
    """A body whose answer has all that is compared."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0, "seed": 5, "logprobs": True, "top_logprobs": 2,
            "return_token_ids": True, "ignore_eos": True} | fields


def seeing(text, size, seed, **fields):
    parts = [{"type": "image_url", "image_url": {"url": picture_url(size, seed)}}, {"type": "text", "text": text}]
    return question("", messages=[{"role": "user", "content": parts}], **fields)


def questions_of(key, sees):
    """What a key asks: of each kind of work one. Only what must not be shared begins alike, so that each is computed whole when it is asked alone."""
    number = HONEST.index(key)
    words = " ".join(f"{key} {place * (number + 3)}" for place in range(25))
    asked = [
        question(f"{number} plain: where does {words[:90]} lead?"),
        question(f"{number} drawn: tell of {words[:60]}", temperature=1.0, seed=number),
        question(f"{number} drawn from few: tell of {words[:50]}", temperature=0.7, top_p=0.8, top_k=20, seed=40 + number),
        question(f"{number} long: {words}", max_tokens=12),
        question(f"{number} longer still: {words}", max_tokens=60, logprobs=False, top_logprobs=None),
        question(f"{number} twice", n=2, temperature=1.0, max_tokens=16),
        question(f"{number} again and again: " + "the cat sat on the mat. " * 6, max_tokens=70, logprobs=False, top_logprobs=None),
        question(f"{number} stops", stop=["e", "1"], temperature=1.0, max_tokens=40),
        question(f"{number} behind", priority="low"),
        question(f"{number} as JSON", ignore_eos=False, max_tokens=80, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
        question(f"{number} goes on", messages=[{"role": "user", "content": f"{number} turns {words[:70]}"}, {"role": "assistant", "content": "So it is."},
                                                {"role": "user", "content": "And then?"}])]
    if sees:
        asked += [asked[0] | {"model": name} for name in ("one", "two")]    # whose pages are not those of the same text without an adapter
        asked += [seeing(f"{number}: what is this?", (70, 50), seed, max_tokens=14) for seed in (number, 10 + number)]
    return [{name: value for name, value in body.items() if value is not None} for body in asked]


def hostile_body(random, sees):
    """Something that takes what others need."""
    kind = random.randrange(9 if sees else 6)
    noise = "".join(random.choice("abcdefgh ") for _ in range(random.randrange(300, 700)))
    longest = {"max_tokens": random.choice((20, 60, 200))}
    if kind == 0:
        return question(noise, **longest)
    if kind == 1:
        return question("one two three four " * random.randrange(5, 25), max_tokens=200)
    if kind == 2:
        schema = {"type": "object", "properties": {f"p{random.randrange(30)}": {"type": "string", "pattern": "^[a-z]{3,9}$"}}, "required": [], "minProperties": 1}
        return question(noise[:40], response_format={"type": "json_schema", "json_schema": {"name": "h", "schema": schema}}, ignore_eos=False, **longest)
    if kind == 3:
        return question(noise[:60], n=4, temperature=1.5, **longest)
    if kind == 4:
        return random.choice((question(noise, max_tokens=-1), question(noise * 9), question("x", response_format={"type": "json_schema", "json_schema": {"name": "h", "schema": {"type": "no"}}}),
                              question("x", model="nobody"), {"messages": "nothing"}))
    if kind == 5:
        return question(random.choice(HONEST) + noise, priority="low", **longest)
    if kind < 8:
        return question(noise[:90], model=random.choice(("one", "two")), **longest)
    return seeing(noise[:20], (random.randrange(20, 150), random.randrange(20, 150)), random.random(), **longest)


class Failed(Exception):
    """An answer was refused, or ended with an error of the server's."""

    def __init__(self, status, error):
        super().__init__(f"{status}: {error}")
        self.status = status


class Answer:
    """All of an answer that depends on the model, by choice, put together from a body or from the events of a stream."""

    def __init__(self):
        self.texts, self.ids, self.logprobs, self.ends = {}, {}, {}, {}
        self.kills = 0      # of workers since its last token, at most

    def add(self, choice):
        index, said = choice["index"], choice.get("delta") or choice.get("message") or {}
        self.texts[index] = self.texts.get(index, "") + (said.get("content") or "")
        self.ids[index] = self.ids.get(index, []) + (choice.get("token_ids") or [])
        scored = (choice.get("logprobs") or {}).get("content") or ()
        self.logprobs[index] = self.logprobs.get(index, []) + [{name: value for name, value in token.items() if name != "drafted"} for token in scored]
        if choice.get("finish_reason"):
            self.ends[index] = choice["finish_reason"], choice["stop_reason"]
        if choice.get("token_ids"):
            self.kills = 0

    @property
    def parts(self):
        return {"texts": self.texts, "tokens": self.ids, "log-probabilities": self.logprobs, "ends": self.ends}


def difference(found, expected, body):
    """Where an answer first differs from what it is alone."""
    for part, choices in expected.items():
        for index, wanted in choices.items():
            had = found[part].get(index, ())
            if had != wanted:
                at = next((place for place, (one, other) in enumerate(zip(had, wanted)) if one != other), min(len(had), len(wanted)))
                return f"{part} of choice {index} from {at} on: {had[at:at + 1]}, alone {wanted[at:at + 1]}, of {len(had)} and {len(wanted)}; asked: {json.dumps(body)[:600]}"
    return f"more choices than {expected}"


class Asking:
    """Clients of one server, and who kills its workers."""

    def __init__(self, url, session, seed=0):
        self.url, self.session, self.random = url, session, random.Random(seed)
        self.counts, self.open, self.over = Counter(), set(), False
        self.last = {}      # what each process of a worker said of itself last

    def post(self, key, path, body):
        return self.session.post(self.url + path, json=body, headers={"Authorization": f"Bearer {key}"})

    async def get(self, path, read="json"):
        async with self.session.get(self.url + path, headers={"Authorization": f"Bearer {HONEST[0]}"}) as response:
            assert response.status == 200, path
            return await getattr(response, read)()

    async def workers(self):
        workers = (await self.get("/stats"))["workers"]
        self.last |= {worker["pid"]: worker for worker in workers if worker["state"] == "ready"}
        return workers

    def total(self, name):
        """Of all processes, at least."""
        return sum(worker[name] for worker in self.last.values())

    async def choices(self, key, body):
        """(id of the answer, what came of one of its choices) as it comes."""
        async with self.post(key, PATH, body) as response:
            if response.status != 200:
                raise Failed(response.status, await response.text())
            if not body.get("stream"):
                said = await response.json()
                for choice in said["choices"]:
                    yield response.headers["X-Request-Id"], choice
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise Failed(response.status, event["error"])
                    for choice in event["choices"]:
                        yield response.headers["X-Request-Id"], choice

    async def answer(self, key, body):
        """All that depends on the model; what is refused for a moment is asked again."""
        while True:
            answer = Answer()
            self.open.add(answer)
            try:
                async for _, choice in self.choices(key, body):
                    answer.add(choice)
                return answer.parts
            except Failed as failed:
                if failed.status not in REFUSED:
                    raise
                self.counts["refused for a moment"] += 1
                await asyncio.sleep(0.05)
            finally:
                self.open.discard(answer)

    async def honest(self, key, bodies, expected, count):
        """Ask for so many answers, each of which must be what it is alone."""
        for _ in range(count):
            number = self.random.randrange(len(bodies))
            found = await self.answer(key, bodies[number] | {"stream": self.random.random() < 0.5})
            assert found == expected[number], difference(found, expected[number], bodies[number])
            self.counts["equal"] += 1

    async def hostile(self, key, sees):
        """Take what others need, and end answers in all ways."""
        while not self.over:
            body, leave = hostile_body(self.random, sees) | {"stream": True}, self.random.choice((0, 1, 2, 5, 20, 1000))
            try:
                if leave == 0:
                    await self.vanish_at_once(key, body)
                    continue
                count = 0
                async with contextlib.aclosing(self.choices(key, body)) as choices:
                    async for name, choice in choices:
                        count += 1
                        if count == leave and self.random.random() < 0.5:
                            self.counts["vanished"] += 1
                            break
                        if count == leave:
                            self.counts["cancelled"] += 1
                            (await self.post(key, f"/v1/cancel/{name}", {})).close()
                self.counts["hostile answers"] += 1
            except Failed as failed:        # 200: its stream ended with an error, most often that it was cancelled
                self.counts[f"hostile {failed.status}"] += 1
                await asyncio.sleep(0.01)

    async def vanish_at_once(self, key, body):
        """Queued, in a sandbox or in the prompt."""
        asked = asyncio.ensure_future(self.post(key, PATH, body).__aenter__())
        await asyncio.wait([asked], timeout=self.random.random() / 30)
        if not asked.cancel() and not asked.exception():
            asked.result().close()
        await asyncio.gather(asked, return_exceptions=True)
        self.counts["vanished"] += 1

    async def kill(self):
        """Kill a ready worker now and then, but never a third one under an answer without a token in between."""
        while not self.over:
            await asyncio.sleep(self.random.uniform(*KILL_S))
            ready = [worker["pid"] for worker in await self.workers() if worker["state"] == "ready"]
            if ready and all(answer.kills < KILLS_OF_ONE for answer in self.open):
                for answer in self.open:
                    answer.kills += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(ready), signal.SIGKILL)
                    self.counts["killed"] += 1

    async def until_over(self, honest):
        """Run the honest clients; the others then come to their end."""
        await all_or_none(*map(asyncio.ensure_future, honest))
        self.over = True

    async def quiet(self):
        """Wait until all workers do nothing, and have checked what they count since the last answer."""
        before, number = None, 0
        while True:
            workers = await self.workers()
            if before is None and all(worker["state"] == "ready" and not worker["running"] + worker["queued"] for worker in workers):
                before = [worker["integrity_checks"] for worker in workers]
            if before and all(worker["integrity_checks"] > checks for worker, checks in zip(workers, before)):
                return
            number += 1         # a worker checks itself if it has done something: so many answers are for both of them
            await self.answer(HONEST[0], question(f"{number} at the end", n=8, max_tokens=1))
            await asyncio.sleep(0.2)


async def all_or_none(*tasks):
    """Wait for all; if one fails, cancel the others."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that sees and has adapters, and one whose layers keep states and that drafts with a head of its own."""
    root = tmp_path_factory.mktemp("isolation")
    sees, states = root / "sees", root / "states"
    save_sight(sees, "smolvlm", make_smolvlm())
    shapes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96), "mlp.up_proj": (96, 64)}
    for seed, name in enumerate(("one", "two")):
        random_adapter(root / name, 2, shapes, seed, size=0.3)
    save_with_head(make_model("qwen3.5"), Head("qwen3.5"), states)
    return {"sees": (sees, *(f"--adapter={name}={root / name}" for name in ("one", "two"))), "states": (states,)}


@contextlib.asynccontextmanager
async def asking(flags, *more):
    with server(*flags, "--dtype", "float32", *more) as (process, url):
        timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            yield process, Asking(url, session)


async def answers_alone(flags, asked):
    """What each key's questions are answered with by a server that does one thing at a time, without drafts."""
    keys = [f"--api-key={key}" for key in HONEST]
    async with asking(flags, "--drafts", "none", "--max-batch", "1", *keys) as (_, alone):
        return {key: [await alone.answer(key, body) for body in bodies] for key, bodies in asked.items()}


@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("model, count", by_day([(model, count) for model in MEMORY for count in (BY_DAY, AT_NIGHT)], *((model, BY_DAY) for model in MEMORY)))
async def test_answers_equal_those_alone_whatever_others_do(model, count, folders, tmp_path):
    flags, sees = folders[model], model == "sees"
    asked, share = {key: questions_of(key, sees) for key in HONEST}, -(-count // len(HONEST) // EACH)
    expected = await answers_alone(flags, asked)
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{key}: {key}\n" for key in (*HONEST, *HOSTILE))
                    + "".join(f"{key}: {key} tokens-per-day={DAY_TOKENS} over-budget={over}\n" for key, over in POOR.items()))
    keys.chmod(0o600)
    began_s = time.monotonic()
    async with asking(flags, "--num-workers", "2", "--max-batch", "4", "--kv-cache-memory", MEMORY[model], "--api-key-file", keys) as (process, clients):
        ask = [clients.honest(key, asked[key], expected[key], share) for key in HONEST for _ in range(EACH)]
        others = [clients.hostile(key, sees) for key in (*HOSTILE, *HOSTILE, *POOR)]
        await all_or_none(asyncio.ensure_future(clients.until_over(ask)), *map(asyncio.ensure_future, [*others, clients.kill()]))
        took_s = time.monotonic() - began_s
        await asyncio.wait_for(clients.quiet(), 120)
        metrics = await clients.get("/metrics", "text")
    totals = {name: clients.total(name) for name in ("preemptions", "accepted_lookup", "accepted_forced", *([] if sees else ["drafted_mtp"]))}
    print(f"{model}: {took_s:.0f} s, {dict(clients.counts)}, {totals}")
    log = "".join(process.stdout)
    assert "broken invariant" not in log
    shown = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("chat_server_"))}
    broken = {name: value for name, value in shown.items() if name.startswith("chat_server_broken_invariants_total")}
    assert broken and not any(broken.values()), broken
    assert shown["chat_server_invariant_checks_total"] >= 4
    assert shown["chat_server_kv_pages_used"] == 0
    assert clients.counts["equal"] == share * EACH * len(HONEST) >= count
    assert min(clients.counts[what] for what in ("cancelled", "vanished", "killed", "hostile answers", "hostile 400", "hostile 429")) > 0, clients.counts
    assert min(totals.values()) > 0, totals
