#!/usr/bin/env python3
"""Texts per second of encoders of random weights, in the shapes of all-MiniLM-L6 and bge-m3, beside torch's and llama-server's.

    python bench/text_encoders.py [--shape minilm] [--llama-server PATH] [--threads 2] [--seconds 2] [--rounds 2]

Each contestant embeds texts of 32, 128 and 512 tokens, as many at once as it likes, on the same weights: ours in float32 and Q8_0, by an
engine in this process; sentence-transformers' model by torch in float32, texts of one length at a time, so without any padding;
llama-server --embedding with the same Q8_0 and F16 files, 32 texts (--together) in a request. They take turns, --rounds times, and each has its best rate.
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np      # noqa: E402
import torch            # noqa: E402

import encoders         # noqa: E402  of the tests
from servers import started     # noqa: E402

SHAPES = {
    "minilm": ("bert", dict(vocab_size=320, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)),
    "bge-m3": ("xlm-roberta", dict(vocab_size=320, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16))}
LENGTHS = (32, 128, 512)


def rate(run, seconds, together):
    """Texts per second: `run` embeds so many texts; repeated for about this long."""
    run()
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        run()
        count += together
    return count / spent


class Ours:
    def __init__(self, path):
        _, self.engine = encoders.engine_of(path, None)
        self.name = f"chat_server {self.engine.transformer.matrix_types[0]}"

    def embed(self, ids):
        encoders.vectors(self.engine, ids, pooling="mean")


class Torch:
    def __init__(self, model, threads):
        torch.set_num_threads(threads)
        self.model, self.name = model, "torch float32"

    @torch.inference_mode()
    def embed(self, ids):
        self.model(input_ids=torch.tensor(ids)).last_hidden_state.mean(1)


class Llama:
    """A llama-server that runs."""

    def __init__(self, server):
        self.server, self.name = server, server.name
        self.embed([[5, 6, 7]])

    def embed(self, ids):
        with self.server.open("/v1/embeddings", {"input": ids}) as response:
            return response.read()


def llama_server(binary, path, threads):
    command = [binary, "-m", path, "--embedding", "-t", threads, "-b", "2048", "-ub", "2048", "-c", "4096"]
    return started(command, f"llama-server {path.stem}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="minilm")
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--together", type=int, default=32, help="texts that a contestant gets at once")
    args = parser.parse_args()
    (name, sizes), dice = SHAPES[args.shape], np.random.default_rng(0)
    model = encoders.make_encoder(name, **sizes)
    texts = [dice.integers(5, 70, (args.together, length - length // 256)).tolist() for length in LENGTHS]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = [folder / f"{kind}.gguf" for kind in ("Q8_0", "F16")]
        for path in files:
            encoders.save_gguf(path, name, model, path.stem)
        (folder / "float32").mkdir()
        encoders.save_folder(folder / "float32", name, model)
        contestants = [*map(Ours, (*files, folder / "float32")), Torch(model, args.threads)]
        with ExitStack() as stack:
            for path in files if args.llama_server else ():
                contestants.append(Llama(stack.enter_context(llama_server(args.llama_server, path, args.threads))))
            best = {each.name: [0.0] * len(LENGTHS) for each in contestants}
            for _ in range(args.rounds):
                for i, ids in enumerate(texts):
                    for each in contestants:
                        best[each.name][i] = max(best[each.name][i], rate(lambda: each.embed(ids), args.seconds, args.together))
    print(f"{args.shape}, texts/s of {', '.join(map(str, LENGTHS))} tokens, {args.threads} threads")
    for contestant, rates in best.items():
        print(f"{contestant:24}" + "".join(f"{each:10.1f}" for each in rates))


if __name__ == "__main__":
    main()
