"""Speed of a running server on this machine, beside transformers on the same GGUF file in the same run.

    python bench/serving.py [--rounds 5] [--tokens 128] [--skip-transformers]

Starts `chat_server.py` as a user would, alternates the contestants, and prints medians and ratios: page and
start-up times, time to the first token, single stream, 16 clients, prefill, memory. Our figures are measured
over HTTP with the client on the same cores; transformers is called in this process.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import psutil

# as the server sets it for its workers; before torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import chat_server      # noqa: E402

WORDS = "the river carried small boats past gardens and markets where people talked about weather bread and music".split()


def words(count, seed):
    """`count` words whose beginning depends on the seed, so that the prefix cache cannot help."""
    return " ".join([f"Number {seed}."] + [WORDS[(i * 7 + seed * 3 + i * i) % len(WORDS)] for i in range(count - 2)])


class Server:
    """`python chat_server.py` on a free port; times are seconds since the command."""

    def __init__(self, *flags):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command_s = time.monotonic()
        self.process = subprocess.Popen([sys.executable, str(ROOT / "chat_server.py"), "--port", str(port), "--host", "127.0.0.1",
                                         *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def first_byte_and_ready(self, session):
        while True:
            try:
                async with session.get(self.url + "/") as response:
                    await response.content.readany()
                break
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.005)
        first_byte_s = time.monotonic() - self.command_s
        while True:
            async with session.get(self.url + "/health") as response:
                if response.status == 200:
                    return first_byte_s, time.monotonic() - self.command_s
            await asyncio.sleep(0.01)

    def memory(self):
        """Sum of the proportional set sizes (bytes) of the front and its workers."""
        front = psutil.Process(self.process.pid)
        return {role: sum(p.memory_full_info().pss for p in processes)
                for role, processes in (("front", [front]), ("workers", front.children(recursive=True)))}

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


async def ask(session, url, text, tokens):
    """(seconds to the first token, seconds to the last, tokens, the final event) of one streamed answer."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    started, first, done = time.perf_counter(), None, None
    async with session.post(url + "/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: "):
                first = first or time.perf_counter() - started
                event = json.loads(line[6:])
                done = event if event.get("done") else done
    return first, time.perf_counter() - started, done["usage"]["completion_tokens"], done


async def many(session, url, clients, tokens, seed):
    started = time.perf_counter()
    answers = await asyncio.gather(*(ask(session, url, words(30, seed + i), tokens) for i in range(clients)))
    return sum(count for _, _, count, _ in answers) / (time.perf_counter() - started)


class Transformers:
    """Hugging Face transformers in bfloat16 on the same file."""

    def __init__(self, path):
        import torch
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch = torch
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)

    def generate(self, rows, tokens, seed):
        """Tokens per second of `rows` prompts of 30 words, counted like ours: prefill included."""
        ids = self.tokenizer([words(30, seed + 100 + i) for i in range(rows)], return_tensors="pt", padding=True)
        started = time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(**ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        return rows * tokens / (time.perf_counter() - started)

    def prefill(self, text):
        ids = self.tokenizer([text], return_tensors="pt")
        started = time.perf_counter()
        with self.torch.inference_mode():
            self.model(**ids, logits_to_keep=1)
        return ids["input_ids"].shape[1] / (time.perf_counter() - started)


def prefill_seconds(engine, text):
    """The engine alone, from a queued 40-token prompt to its first token: prefill and sampling, no other
    process."""
    ids = tuple(engine.tokenizer.encode(text)[:40])
    engine.add(chat_server.Assignment("prefill", ids, chat_server.AnswerParams(sampling=chat_server.SamplingParams(temperature=0.0)), 1))
    started = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - started


def forty_tokens(tokenizer, seed):
    """A message whose rendered prompt has 40 tokens."""
    text = words(40, seed)
    while len(tokenizer.render([chat_server.Message("user", text)])) > 40:
        text = text.rsplit(" ", 1)[0]
    return text


def line(name, values, unit, against=None):
    median = statistics.median(values)
    text = f"{name:<44}{median:>10.1f} {unit:<6} ({min(values):.1f} .. {max(values):.1f})"
    print(text + (f"   ratio {median / statistics.median(against):.2f}" if against else ""), flush=True)


async def first_token(session, server, engine, rounds):
    """The first token of a 40-token prompt through HTTP against the engine alone, alternating."""
    alone, through = [], []
    for i in range(rounds * 4):
        alone.append(1e3 * prefill_seconds(engine, words(60, 5000 + i)))
        through.append(1e3 * (await ask(session, server.url, forty_tokens(engine.tokenizer, 9000 + i), 1))[0])
    line("prefill of 40 tokens, engine alone", alone, "ms")
    line("first token of a 40-token prompt, HTTP", through, "ms")
    print(f"{'difference of the medians (goal: below 5 ms)':<44}{statistics.median(through) - statistics.median(alone):>10.1f} ms")


def bench_engine(path):
    """The same engine as the server's worker, in this process."""
    import torch
    torch.set_num_threads(chat_server.threads_per_worker(1))
    settings = chat_server.Settings(model=str(path), kv_cache_memory=256 << 20)
    _, engine = chat_server.build_engine(chat_server.resolve_model(settings), settings, torch.device("cpu"))
    engine.warm_up(lambda fraction: None)
    return engine


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--skip-transformers", action="store_true")
    arguments = parser.parse_args()
    path = chat_server.fetch_default_model(lambda *at: None)
    print(f"{os.cpu_count()} cores, {subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()}, "
          f"{path.name}, rounds {arguments.rounds}")

    first_bytes, readies = [], []
    async with aiohttp.ClientSession() as session:
        for i in range(arguments.rounds):
            server = Server()
            first_byte_s, ready_s = await server.first_byte_and_ready(session)
            first_bytes.append(1e3 * first_byte_s)
            readies.append(1e3 * ready_s)
            if i < arguments.rounds - 1:
                server.stop()
        line("page's first byte after the command", first_bytes, "ms")
        line("default model ready after the command", readies, "ms")
        try:
            await speeds(session, server, path, arguments)
        finally:
            server.stop()


async def speeds(session, server, path, arguments):
    engine = bench_engine(path)
    await first_token(session, server, engine, arguments.rounds)
    del engine
    peer = None if arguments.skip_transformers else Transformers(path)
    figures = {name: ([], []) for name in ("single stream", "16 clients", "prefill of 1,500 words")}
    for i in range(arguments.rounds):
        seed = 10_000 + 100 * i
        for name, ours, theirs in (
                ("single stream", lambda: many(session, server.url, 1, arguments.tokens, seed),
                 lambda: peer.generate(1, arguments.tokens, seed)),
                ("16 clients", lambda: many(session, server.url, 16, arguments.tokens, seed + 1),
                 lambda: peer.generate(16, arguments.tokens, seed + 1)),
                ("prefill of 1,500 words", lambda: prefill_speed(session, server, seed + 50),
                 lambda: peer.prefill(words(1500, seed + 51)))):
            figures[name][0].append(await ours())
            if peer:
                figures[name][1].append(theirs())
    for name, (ours, theirs) in figures.items():
        if peer:
            line(f"{name}: transformers bfloat16", theirs, "tok/s")
        line(f"{name}: ours through HTTP", ours, "tok/s", theirs)
    memory = server.memory()
    print(f"memory (PSS): front {memory['front'] / 2**20:.0f} MiB, worker {memory['workers'] / 2**20:.0f} MiB")


async def prefill_speed(session, server, seed):
    first_s, _, _, done = await ask(session, server.url, words(1500, seed)[:7990], 1)
    return done["usage"]["prompt_tokens"] / first_s


if __name__ == "__main__":
    asyncio.run(main())
