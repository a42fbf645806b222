"""What work in the background costs who chats, and what it loses to nobody: the default model, over HTTP.

    python bench/background.py [--rounds 4] [--seconds 15] [--lines 48]

One server. In turns: a client that chats alone; the same chats while a queue of low-priority requests never ends; then the same lines sent with
and without low priority while nobody chats. Goals: the time between tokens of a chat at most 5 % longer, its first token at most one step
of the background later (p99), and at least 90 % of the throughput. Other load on the machine meets all of them alike.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
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


async def behind(session, together, seeds):
    """A queue of low-priority requests that never ends."""
    async def again():
        while True:
            await answer(session, next(seeds), 96, True)
    tasks = [asyncio.create_task(again()) for _ in range(together)]
    try:
        await asyncio.Event().wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def chat(session, seconds, seeds):
    """[(ms between tokens), ..] of each answer, and ms to each first token. Pauses, in which the background runs, are of random length."""
    gaps, firsts, end, dice = [], [], time.monotonic() + seconds, random.Random(5)
    while time.monotonic() < end:
        times = await answer(session, next(seeds), 64, False, words=40)
        firsts.append(1e3 * times[0])
        gaps.append(1e3 * (times[-1] - times[8]) / (len(times) - 9))
        await asyncio.sleep(dice.uniform(0.05, 0.4))
    return gaps, firsts


async def lines(session, count, seeds, low, steps):
    """Tokens a second of lines, of which 32 are under way; ms between the pieces of each, which are its steps, go to `steps`."""
    room, began = asyncio.Semaphore(32), time.monotonic()

    async def one():
        async with room:
            times = await answer(session, next(seeds), 96, low)
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
    every = {"alone": ([], []), "beside": ([], [])}
    rates, steps = {True: [], False: []}, {True: [], False: []}
    longest = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=longest, connector=aiohttp.TCPConnector(limit=0)) as session:
        await lines(session, 16, seeds, False, [])
        for number in range(options.rounds):
            print(f"round {number + 1}", flush=True)
            for name in ("alone", "beside") if number % 2 == 0 else ("beside", "alone"):
                task = asyncio.create_task(behind(session, 16, seeds)) if name == "beside" else None
                await asyncio.sleep(2)
                gaps, firsts = await chat(session, options.seconds, seeds)
                if task:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    await asyncio.sleep(0.5)
                show(name, gaps, firsts)
                every[name][0].extend(gaps), every[name][1].extend(firsts)
            for low in (True, False) if number % 2 == 0 else (False, True):
                rates[low].append(await lines(session, options.lines, seeds, low, steps[low]))
                print(f"  {'low' if low else 'normal'} priority, nobody chats: {rates[low][-1]:.0f} tok/s", flush=True)
    print("all rounds")
    for name, (gaps, firsts) in every.items():
        show(name, gaps, firsts)
    (alone, first), (beside, later) = every["alone"], every["beside"]
    print(f"  between tokens, beside to alone: {statistics.median(beside) / statistics.median(alone):.3f} (goal 1.05)\n"
          f"  first token, beside minus alone: median {statistics.median(later) - statistics.median(first):+.1f} ms, "
          f"p99 {at(later, 0.99) - at(first, 0.99):+.1f} ms (goal: a step of the background, here median {statistics.median(steps[True]):.1f} ms, "
          f"p99 {at(steps[True], 0.99):.1f})\n"
          f"  throughput, low to normal: {statistics.median(rates[True]) / statistics.median(rates[False]):.3f} (goal 0.9)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 4), ("seconds", 15.0), ("lines", 48)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--url", help="of a server that is running")
    parser.add_argument("--model", default=str(Path.home() / ".cache" / "chat_server" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    options = parser.parse_args()
    if options.url:
        return asyncio.run(measure(options.url, options))
    from real_server import server
    with server(options.model, "--max-queue", "256") as (_, url):
        asyncio.run(measure(url, options))


if __name__ == "__main__":
    main()
