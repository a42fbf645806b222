"""How good the default model's everyday answers are: what its sampling and its system prompt are chosen by.

    python bench/endings.py [--url http://127.0.0.1:8000] [--seeds 3] [--set NAME=VALUE ...] [--system TEXT ...]

Asks 40 everyday questions with each of the seeds, and counts how the answers end: by themselves ("ended"), because
the server noticed that they repeat themselves ("repetition"), or at the limit of tokens. Then a hundred facts, 80
tokens each, with the seeds and greedily: how many answers are right, of the half that chooses and of the half
that judges. `--set temperature=0.7` (several with commas) is one contestant, and so is each `--system`; all
pairs of them are asked in turns. Without them the server's own defaults are measured; a system prompt of "-" is
none at all.
"""

import argparse
import asyncio
import itertools
import json
import re
import statistics
import sys

import aiohttp

from everyday_facts import FACTS

QUESTIONS = [
    *itertools.islice(FACTS, 5), "Hi!", "Who are you?", "Tell me a joke.", "Tell me a story about a dog.", "Write a poem about the sea.",
    "Write a short story about a robot who learns to paint.", "What should I cook tonight?",
    "Give me a recipe for pancakes.", "How do I learn to play the guitar?", "Explain gravity to a child.",
    "What is a neural network?", "Why is the sky blue?", "How does a vaccine work?", "Give me five names for a cat.",
    "List ten countries in Europe.", "Write an email to my boss that I am ill today.",
    "Write a birthday card for my grandmother.", "Translate 'good morning' into French.",
    "What is the difference between a crocodile and an alligator?", "Write a Python function that adds two numbers.",
    "Write a Python program that prints the first 20 prime numbers.", "What does `git rebase` do?",
    "How do I boil an egg?", "Plan a weekend in Paris.", "What are the benefits of exercise?",
    "Summarize the story of Romeo and Juliet.", "Who was Albert Einstein?", "What is 12 times 12?",
    "How can I sleep better?", "Give me three tips for a job interview.", "What is photosynthesis?",
    "Describe a sunset.", "Write a haiku about winter.", "What can I do on a rainy day?",
    "Continue: Once upon a time, there was a"]


FACT_TOKENS = 80


def parsed(text: str) -> dict:
    pairs = (pair.partition("=") for pair in text.split(","))
    return {name: json.loads(value) for name, _, value in pairs}


async def ask(session, url, question, seed, settings, system, most, gate):
    messages = [{"role": "user", "content": question}]
    if system != "-":
        messages.insert(0, {"role": "system", "content": system})
    body = {"messages": messages, "seed": seed, "max_tokens": most} | settings
    async with gate, session.post(f"{url}/v1/chat/completions", json=body) as response:
        reply = await response.json()
    if "choices" not in reply:
        sys.exit(f"{url} answers {json.dumps(reply)[:300]}")
    choice = reply["choices"][0]
    end = "limit" if choice["finish_reason"] == "length" else (
        "repetition" if choice["stop_reason"] == "repetition" else "ended")
    return question, seed, end, reply["usage"]["completion_tokens"], choice["message"]["content"]


def report(name, answers):
    count = len(answers)
    shares = {end: sum(answer[2] == end for answer in answers) / count for end in ("ended", "repetition", "limit")}
    print(f"{name}: " + "  ".join(f"{end} {share:6.1%}" for end, share in shares.items())
          + f"  tokens {statistics.median(answer[3] for answer in answers):.0f} median", flush=True)


def is_right(question, text):
    return re.search(rf"(?i)(?<!\w)({FACTS[question]})(?!\w)", text) is not None


def report_facts(name, answers):
    places = {question: place for place, question in enumerate(FACTS)}
    for half, words in enumerate(("choosing", "judging")):
        own = [answer for answer in answers if places[answer[0]] % 2 == half]
        right = sum(is_right(answer[0], answer[4]) for answer in own)
        print(f"{name}: {words} half {right}/{len(own)} facts right", flush=True)


async def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--set", action="append", type=parsed, default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--system", action="append", default=[], metavar="TEXT")
    parser.add_argument("--facts", action="store_true", help="ask only the facts")
    parser.add_argument("--show", action="store_true", help="print answers that do not end by themselves, and wrong facts")
    arguments = parser.parse_args()
    gate = asyncio.Semaphore(8)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session:
        async def asked(questions, seeds, settings, system, most):
            return await asyncio.gather(*(ask(session, arguments.url, question, seed, settings, system, most, gate)
                                          for question in questions for seed in seeds))
        for settings, system in itertools.product(arguments.set or [{}], arguments.system or ["-"]):
            name = f"{json.dumps(settings) if settings else 'the defaults'}, system {system!r}"
            seeds = range(arguments.seeds)
            answers = [] if arguments.facts else await asked(QUESTIONS, seeds, settings, system, arguments.tokens)
            if answers:
                report(name, answers)
            drawn = await asked(FACTS, seeds, settings, system, FACT_TOKENS)
            greedy = await asked(FACTS, [0], settings | {"temperature": 0}, system, FACT_TOKENS)
            report_facts(name, drawn)
            report_facts(f"{name}, greedy", greedy)
            for question, seed, end, count, text in answers if arguments.show else ():
                if end != "ended":
                    print(f"--- {question} (seed {seed}, {end}, {count} tokens)\n{text[-300:]}")
            for question, seed, _, _, text in drawn if arguments.show else ():
                if not is_right(question, text):
                    print(f"--- {question} (seed {seed}) is not {FACTS[question]}: {text[:200]}")


asyncio.run(main())
