"""What work in the background costs who chats, and what it loses to nobody: the default model, over HTTP.

    python bench/background.py [--rounds 12] [--seconds 4] [--lines 96]

One server. In turns: a client that chats alone; the same chats while a batch is worked on; then the same lines as a batch and as
requests while nobody chats. Goals: the time between tokens of a chat at most 5 % longer, its first token at most one step of the
background later (p99), and at least 90 % of the throughput. Turns are short, and what is compared was measured one after the other:
the speed of a machine may drift by half within minutes. A step is what a stream of low priority waits for its next piece.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from servers import our_server

WORDS = "river stone light copper garden winter music letter window story engine harbour".split()


def prompt(seed, words=120):
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) for _ in range(words))


async def answer(session, seed, tokens, low, words=120):
    """Times at which the tokens of an answer arrived, after it was asked for."""
    body = {"prompt": prompt(seed, words), "stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "seed": seed,
            "return_token_ids": True, "priority": "low" if low else "normal"}
    began, times = time.monotonic(), []
    async with session.post("/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    times += [time.monotonic() - began] * len(choice.get("token_ids") or ())
    return times


async def begin_batch(session, count, seeds):
    """The id of a new batch of so many lines."""
    lines = [{"custom_id": str(number), "method": "POST", "url": "/v1/completions",
              "body": {"prompt": prompt(next(seeds)), "max_tokens": 96, "ignore_eos": True, "temperature": 0.8}} for number in range(count)]
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", "".join(json.dumps(line) + "\n" for line in lines), filename="lines.jsonl")
    async with session.post("/v1/files", data=form) as response:
        file = await response.json()
    async with session.post("/v1/batches", json={"input_file_id": file["id"], "endpoint": "/v1/completions"}) as response:
        return (await response.json())["id"]


async def end_of(session, batch, cancel=False):
    """The batch once it has ended."""
    if cancel:
        await (await session.post(f"/v1/batches/{batch}/cancel")).read()
    while True:
        async with session.get(f"/v1/batches/{batch}") as response:
            if (found := await response.json())["status"] in ("completed", "cancelled"):
                return found
        await asyncio.sleep(0.05)


async def chat(session, seconds, seeds):
    """[(ms between tokens), ..] of each answer, and ms to each first token. Pauses, in which the background runs, are of random length."""
    gaps, firsts, end, dice = [], [], time.monotonic() + seconds, random.Random(5)
    while time.monotonic() < end:
        times = await answer(session, next(seeds), 64, False, words=40)
        firsts.append(1e3 * times[0])
        gaps.append(1e3 * (times[-1] - times[8]) / (len(times) - 9))
        await asyncio.sleep(dice.uniform(0.05, 0.4))
    return gaps, firsts


async def as_batch(session, count, seeds):
    """Tokens a second of a batch."""
    began = time.monotonic()
    found = await end_of(session, await begin_batch(session, count, seeds))
    assert found["request_counts"]["completed"] == count, found
    return 96 * count / (time.monotonic() - began)


async def as_requests(session, count, seeds, low=False, steps=None):
    """Tokens a second of the same lines, of which as many are under way; ms between the pieces of each go to `steps`."""
    room, began = asyncio.Semaphore(72), time.monotonic()

    async def one():
        async with room:
            times = await answer(session, next(seeds), 96, low)
        if steps is not None:
            steps.extend(1e3 * (later - sooner) for sooner, later in zip(times, times[1:]) if later > sooner)
        return len(times)
    total = sum(await asyncio.gather(*(one() for _ in range(count))))
    return total / (time.monotonic() - began)


def at(values, share):
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def show(name, gaps, firsts):
    print(f"  {name}: {len(gaps)} answers, between tokens median {statistics.median(gaps):.2f} ms, p90 {at(gaps, 0.9):.2f}; "
          f"first token median {statistics.median(firsts):.1f} ms, p99 {at(firsts, 0.99):.1f}", flush=True)


async def measure(url, options):
    seeds = iter(range(1, 10**9))
    every, ratios, steps = {"alone": ([], []), "beside": ([], [])}, [], []
    rates = {as_batch: [], as_requests: []}
    longest = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=longest, connector=aiohttp.TCPConnector(limit=0)) as session:
        await as_requests(session, 16, seeds)
        for number in range(options.rounds):
            print(f"round {number + 1}", flush=True)
            medians = {}
            for name in ("alone", "beside") if number % 2 == 0 else ("beside", "alone"):
                batch = await begin_batch(session, 500, seeds) if name == "beside" else None
                await asyncio.sleep(0.5)
                gaps, firsts = await chat(session, options.seconds, seeds)
                if batch:
                    await end_of(session, batch, cancel=True)
                show(name, gaps, firsts)
                medians[name] = statistics.median(gaps)
                every[name][0].extend(gaps), every[name][1].extend(firsts)
            ratios.append(medians["beside"] / medians["alone"])
            if number % 2 == 0:
                for how in (as_batch, as_requests) if number % 4 == 0 else (as_requests, as_batch):
                    rates[how].append(await how(session, options.lines, seeds))
                    print(f"  nobody chats, {how.__name__}: {rates[how][-1]:.0f} tok/s", flush=True)
                if number % 4 == 0:
                    await as_requests(session, 72, seeds, True, steps)
    print("all rounds")
    for name, (gaps, firsts) in every.items():
        show(name, gaps, firsts)
    (alone, first), (beside, later) = every["alone"], every["beside"]
    shares = [batch / requests for batch, requests in zip(rates[as_batch], rates[as_requests])]
    print(f"  between tokens, beside to alone: {statistics.median(beside) / statistics.median(alone):.3f}, of rounds {listed(ratios)} (goal 1.05)\n"
          f"  first token, beside minus alone: median {statistics.median(later) - statistics.median(first):+.1f} ms, "
          f"p99 {at(later, 0.99) - at(first, 0.99):+.1f} ms (goal: a step of the background, here median {statistics.median(steps):.1f} ms, "
          f"p99 {at(steps, 0.99):.1f})\n"
          f"  throughput, batch to requests: {listed(shares)} (goal 0.9)")


def listed(values):
    return f"median {statistics.median(values):.3f} of {', '.join(f'{value:.2f}' for value in sorted(values))}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 12), ("seconds", 4.0), ("lines", 96)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--url", help="of a server that is running, with --database")
    parser.add_argument("--model", default=str(Path.home() / ".cache" / "chat_server" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    options = parser.parse_args()
    if options.url:
        return asyncio.run(measure(options.url, options))
    with tempfile.TemporaryDirectory() as folder, our_server(options.model, "--max-queue", "256", f"--database={folder}/store.db") as server:
        asyncio.run(measure(server.url, options))


if __name__ == "__main__":
    main()
