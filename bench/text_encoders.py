#!/usr/bin/env python3
"""Texts per second of encoders of random weights, in the shapes of all-MiniLM-L6 and bge-m3, beside torch's and llama-server's.

    python bench/text_encoders.py [--shape minilm] [--llama-server PATH] [--threads 2] [--seconds 4]

Each contestant embeds texts of 32, 128 and 512 tokens, as many at once as it likes, on the same weights: ours in float32 and Q8_0, by an
engine in this process; sentence-transformers' model by torch in float32, 32 texts of one length at a time, so without any padding;
llama-server --embedding with the Q8_0 file, 32 texts in a request. All run one after the other, so nothing else may run meanwhile.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np      # noqa: E402
import torch            # noqa: E402

import encoders         # noqa: E402  of the tests

SHAPES = {
    "minilm": ("bert", dict(vocab_size=320, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)),
    "bge-m3": ("xlm-roberta", dict(vocab_size=320, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16))}
LENGTHS, TOGETHER = (32, 128, 512), 32


def rate(run, seconds):
    """Texts per second: `run` embeds TOGETHER texts; repeated for about this long."""
    run()
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        run()
        count += TOGETHER
    return count / spent


def of_engine(path, texts, seconds, **settings):
    _, engine = encoders.engine_of(path, None, **settings)
    name = f"chat_server {engine.transformer.matrix_types[0]}"
    return name, [rate(lambda: encoders.vectors(engine, ids, pooling="mean"), seconds) for ids in texts]


def of_torch(model, texts, seconds, threads):
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return "torch float32", [rate(lambda: model(input_ids=torch.tensor(ids)).last_hidden_state.mean(1), seconds) for ids in texts]


def of_llama(binary, path, texts, seconds, threads):
    port = 8609
    command = [binary, "-m", str(path), "--embedding", "--port", str(port), "-t", str(threads), "-b", "2048", "-ub", "2048", "-c", "4096"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def post(ids):
        body = json.dumps({"input": ids}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=300).read()

    try:
        while process.poll() is None:
            try:
                post(texts[0][:1])
                break
            except OSError:
                time.sleep(0.1)
        return "llama-server q8_0", [rate(lambda: post(ids), seconds) for ids in texts]
    finally:
        process.kill()
        process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="minilm")
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    (name, sizes), dice = SHAPES[args.shape], np.random.default_rng(0)
    model = encoders.make_encoder(name, **sizes)
    texts = [dice.integers(5, 70, (TOGETHER, length - length // 256)).tolist() for length in LENGTHS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "q8_0.gguf"
        encoders.save_gguf(path, name, model, "Q8_0")
        (Path(folder) / "float32").mkdir()
        encoders.save_folder(Path(folder) / "float32", name, model)
        found = [of_engine(path, texts, args.seconds), of_engine(Path(folder) / "float32", texts, args.seconds),
                 of_torch(model, texts, args.seconds, args.threads)]
        if args.llama_server:
            found.append(of_llama(args.llama_server, path, texts, args.seconds, args.threads))
    print(f"{args.shape}, texts/s of {', '.join(map(str, LENGTHS))} tokens, {args.threads} threads")
    for contestant, rates in found:
        print(f"{contestant:24}" + "".join(f"{each:10.1f}" for each in rates))


if __name__ == "__main__":
    main()
