#!/usr/bin/env python3
"""What a chat loses while texts are embedded: the time from token to token, alone and beside them, in turns on one server.

    python bench/text_beside_chat.py [--shape minilm|bge-m3|none] [--texts 10000] [--tokens 32] [--rounds 3] [--seconds 10]

One server has the default chat model and an embedder of random weights in Q8_0, in the shape of all-MiniLM-L6 or bge-m3; with `none` the chat
model makes the embeddings too. One client chats, answer after answer without a break. In every second turn another client has `--texts` texts
embedded, 8 in a request and 32 requests at a time; what is left of them goes on in the next such turn. In the end the rest is embedded alone.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests" / "support")]

import aiohttp          # noqa: E402

from load import Server, percentile, prompt, read_answer      # noqa: E402
from servers import our_server      # noqa: E402

TOGETHER, AT_ONCE, ANSWER_TOKENS = 8, 32, 200


def models_of(shape, folder):
    """The chat model and the embedder."""
    from chatlm.common.hub.default_model import fetch_default_model
    models = [str(fetch_default_model())]
    if shape != "none":
        import encoders
        from text_encoders import SHAPES
        name, sizes = SHAPES[shape]
        encoders.save_gguf(Path(folder) / "embedder.gguf", name, encoders.make_encoder(name, **sizes), "Q8_0")
        models.append(str(Path(folder) / "embedder.gguf"))
    return models


async def embed_all(session, url, model, bodies, done):
    """Embed bodies as they come, until none is left; `done` counts texts."""
    async def one():
        for body in bodies:
            try:
                async with session.post(f"{url}/v1/embeddings", json={"model": model, "input": body, "encoding_format": "base64"}) as response:
                    text = await response.read()
                    assert response.status == 200, text[:300]
                    assert text.count(b'"embedding": ') == len(body), text[:300]
                    done[0] += len(body)
            except asyncio.CancelledError:
                bodies.again(body)
                raise
    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


class Bodies:
    """An iterator of lists of texts, to which those that were not embedded return."""

    def __init__(self, count, tokens):
        words = ["the cat", "a dog", "12 mice", "x y z"]
        texts = (" ".join(itertools.islice(itertools.cycle(words), i % 4, i % 4 + tokens // 2)) for i in range(count))
        self.left = []
        while body := [*itertools.islice(texts, TOGETHER)]:
            self.left.append(body)

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop()

    def again(self, body):
        self.left.append(body)


async def chat(server, seconds, seeds):
    gaps, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        answer = read_answer(await server.ask(prompt(64, next(seeds)), 0.0, time.perf_counter))
        assert not answer.error, answer.error
        gaps += answer.gaps_s
    return gaps


def line(name, gaps):
    return f"{name:28} " + "".join(f"{1000 * percentile(gaps, share):9.2f}" for share in (0.5, 0.9, 0.99)) + f"{1000 * max(gaps):9.2f}{len(gaps):8}"


async def main(args, url):
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session:
        async with session.get(f"{url}/v1/models") as response:
            models = [one["id"] for one in (await response.json())["data"]]
        embedder = models[0] if args.shape == "none" else next(model for model in models if "embedder" in model)
        model = next(model for model in models if "embedder" not in model)
        server = Server("chat_server", url, model, session, ANSWER_TOKENS, {"ignore_eos": True})
        bodies, done, seeds = Bodies(args.texts, args.tokens), [0], itertools.count()
        await embed_all(session, url, embedder, iter([["warm"] * 8]), [0])
        await chat(server, 3, seeds)
        alone, beside, slowly = [], [], 0
        for _ in range(args.rounds):
            alone += await chat(server, args.seconds, seeds)
            task = asyncio.create_task(embed_all(session, url, embedder, bodies, done))
            await asyncio.sleep(1)
            await chat(server, 1, seeds)    # the layers under way end
            before = done[0]
            beside += await chat(server, args.seconds, seeds)
            slowly += done[0] - before
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        print(f"{args.shape}, {args.texts:,} texts of {args.tokens} tokens; ms from token to token:   p50      p90      p99      max  tokens")
        print(line("chat alone", alone))
        print(line("chat beside texts", beside))
        print(f"p99 grows by {100 * (percentile(beside, 0.99) / percentile(alone, 0.99) - 1):.1f} %; meanwhile {slowly / (args.rounds * args.seconds):.2f} texts/s")
        begin, before = time.perf_counter(), done[0]
        await embed_all(session, url, embedder, bodies, done)
        rest = done[0] - before
        print(f"the other {rest:,} alone: {rest / (time.perf_counter() - begin):,.0f} texts/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["minilm", "bge-m3", "none"], default="minilm")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        with our_server(*models_of(arguments.shape, scratch)) as ours:
            asyncio.run(main(arguments, ours.url))
