"""How many everyday answers end by themselves: the default model's sampling, measured.

    python bench/endings.py [--url http://127.0.0.1:8000] [--seeds 3] [--tokens 600] [--set NAME=VALUE ...] [--facts]

Asks 40 everyday questions with each of the seeds, without a system prompt, and counts how the answers end: by
themselves ("ended"), because the server noticed that they repeat themselves ("repetition"), or at the limit of
tokens. `--set temperature=0.7` (several with commas) is one contestant; several `--set` are asked in turns.
Without one the server's own defaults are measured. Facts are counted too: of five questions with one right
answer, how often the answer has it.
"""

import argparse
import asyncio
import json
import statistics
import sys

import aiohttp

FACTS = {"What is the capital of Japan?": "Tokyo", "What is the capital of France?": "Paris",
         "What is the largest planet in our solar system?": "Jupiter", "How many days are there in a week?": "7|seven",
         "Which animal says meow?": "cat"}
QUESTIONS = [
    *FACTS, "Hi!", "Who are you?", "Tell me a joke.", "Tell me a story about a dog.", "Write a poem about the sea.",
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


def parsed(text: str) -> dict:
    pairs = (pair.partition("=") for pair in text.split(","))
    return {name: json.loads(value) for name, _, value in pairs}


async def ask(session, url, question, seed, settings, most, gate):
    body = {"messages": [{"role": "user", "content": question}], "seed": seed, "max_tokens": most} | settings
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
    facts = [any(word in answer[4].lower() for word in FACTS[answer[0]].lower().split("|"))
             for answer in answers if answer[0] in FACTS]
    print(f"{name:44} " + "  ".join(f"{end} {share:6.1%}" for end, share in shares.items())
          + f"  facts {sum(facts)}/{len(facts)}  tokens {statistics.median(answer[3] for answer in answers):.0f} median",
          flush=True)


async def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--set", action="append", type=parsed, default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--facts", action="store_true", help="ask only the five questions about facts")
    parser.add_argument("--show", action="store_true", help="print answers that do not end by themselves")
    arguments = parser.parse_args()
    gate = asyncio.Semaphore(8)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session:
        for settings in arguments.set or [{}]:
            answers = await asyncio.gather(*(
                ask(session, arguments.url, question, seed, settings, arguments.tokens, gate)
                for question in (FACTS if arguments.facts else QUESTIONS) for seed in range(arguments.seeds)))
            report(json.dumps(settings) if settings else "the server's defaults", answers)
            for question, seed, end, count, text in answers if arguments.show else ():
                if end != "ended":
                    print(f"--- {question} (seed {seed}, {end}, {count} tokens)\n{text[-300:]}")


asyncio.run(main())
