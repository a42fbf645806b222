#!/usr/bin/env python3
"""Processor seconds and time for embedding sentences: chat_server beside other servers and libraries, in turns, on the same files.

    python bench/embedding_servers.py FOLDER [--infinity PYTHON] [--sentence-transformers PYTHON] [--fastembed PYTHON]
                                      [--shape bge-large] [--rounds 5] [--threads 2] [--encoding float] [--load many|single]

FOLDER is a model as sentence-transformers writes it, for instance all-MiniLM-L6-v2. With --shape it lends its tokenizer to random
weights in that shape. PYTHON is the interpreter of an environment with that rival:

  infinity                infinity_emb serves the folder, with torch in float32; its own batching
  sentence-transformers   a process with the library, in float32: no HTTP
  fastembed               a process with the library and the model as ONNX in float32, which `--onnx PYTHON` (torch and onnx) makes: no HTTP

Loads: `many` is one request with 512 sentences; `single` is 16 requests with one sentence each, sent at once (a library gets them one
by one). A contestant's figures are the medians of its rounds: milliseconds, and processor seconds of all its processes. The sentences
are those of docs/. Vectors are compared: the least cosine with ours is printed.
"""

import argparse
import base64
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from servers import ROOT, our_server, started

SHAPES = {"bge-large": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)}
SILENT = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "TOKENIZERS_PARALLELISM": "true"}

# a library in a process of its own: a line with texts in, a line with the first numbers of each vector out
LIBRARY = """
import json, sys
kind, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
if kind == "fastembed":
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType
    TextEmbedding.add_custom_model(model="local/model", pooling=PoolingType.MEAN, normalization=True, sources=ModelSource(hf="local/model"),
                                   dim=json.load(open(folder + "/config.json"))["hidden_size"], model_file="model.onnx")
    model = TextEmbedding("local/model", specific_model_path=folder, threads=threads)
    embed = lambda texts: list(model.embed(texts))
else:
    import torch
    torch.set_num_threads(threads)
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(folder, device="cpu")
    embed = lambda texts: model.encode(texts, normalize_embeddings=True)
print("ready", flush=True)
for line in sys.stdin:
    found = [vector.tolist() for texts in json.loads(line) for vector in embed(texts)]
    print(json.dumps(found), flush=True)
"""

ONNX = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], attn_implementation="eager").eval()

class Hidden(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state

ones = torch.ones(2, 9, dtype=torch.int64)
axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask", "token_type_ids", "last_hidden_state")}
torch.onnx.export(Hidden(), (ones, ones, ones * 0), sys.argv[2], input_names=["input_ids", "attention_mask", "token_type_ids"],
                  output_names=["last_hidden_state"], dynamic_axes=axes, opset_version=17, dynamo=False)
"""


def sentences(count):
    """Sentences of 20 to 200 characters, of the documentation."""
    text = " ".join(path.read_text() for path in sorted(ROOT.glob("docs/*.md")))
    plain = re.sub(r"[`*|#>\[\]]|\(http[^)]*\)", " ", text)
    found = [" ".join(each.split()) for each in re.split(r"(?<=[.!?])\s+", plain)]
    found = [each for each in found if 20 <= len(each) <= 200]
    return [found[index % len(found)] for index in range(count)]


class HttpServer:
    """A server with OpenAI's route for embeddings."""

    def __init__(self, name, server, path, model, encoding):
        self.name = name
        self.server = server
        self.path = path
        self.more = {"model": model, "encoding_format": encoding}

    def processor_s(self):
        return self.server.processor_s()

    def embed(self, requests):
        found = [None] * len(requests)

        def ask(index):
            with self.server.open(self.path, {"input": requests[index], **self.more}) as response:
                found[index] = response.read()

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def vectors(self, found):
        return [vector_of(row["embedding"]) for body in found for row in sorted(json.loads(body)["data"], key=lambda row: row["index"])]


class LibraryProcess:
    """A process that has a library embed texts."""

    def __init__(self, name, process):
        self.name = name
        self.process = process

    def processor_s(self):
        return sum(psutil.Process(self.process.pid).cpu_times()[:4])

    def embed(self, requests):
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def vectors(self, found):
        return json.loads(found)


def vector_of(embedding):
    if isinstance(embedding, str):
        data = base64.b64decode(embedding)
        return struct.unpack(f"<{len(data) // 4}f", data)
    return embedding


@contextmanager
def library(kind, python, folder, threads):
    process = subprocess.Popen([python, "-c", LIBRARY, kind, folder, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=os.environ | SILENT | {"OMP_NUM_THREADS": str(threads)})
    try:
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{kind} did not start")
        yield LibraryProcess(kind, process)
    finally:
        process.kill()
        process.wait()


def random_model(folder, shape, place):
    """A folder with random weights in this shape, and the tokenizer and modules of another."""
    import torch
    from transformers import AutoConfig, AutoModel
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.onnx", "onnx", "openvino"))
    config = AutoConfig.from_pretrained(folder, **SHAPES[shape])
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(place)
    pooling = Path(place, "1_Pooling", "config.json")
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"word_embedding_dimension": config.hidden_size}))
    return place


def cosine(one, other):
    return sum(a * b for a, b in zip(one, other)) / (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5


def measure(contestants, loads, rounds, repeats):
    expected = {}
    for name, requests in loads.items():
        times = repeats if name == "single" else 1
        found = {each.name: [] for each in contestants}
        for number in range(rounds + 1):
            for each in contestants:
                before_s, began_s = each.processor_s(), time.perf_counter()
                for _ in range(times):
                    answer = each.embed(requests)
                spent = (time.perf_counter() - began_s) / times, (each.processor_s() - before_s) / times
                if number:
                    found[each.name].append(spent)
                    continue
                vectors = each.vectors(answer)          # the first round warms up
                ours = expected.setdefault(name, vectors)
                print(f"{name}: {each.name}: least cosine with ours {min(map(cosine, ours, vectors)):.6f}", flush=True)
        medians = {each: [statistics.median(column) for column in zip(*rows)] for each, rows in found.items()}
        wall, cpu = medians[contestants[0].name]
        for each, (wall_s, cpu_s) in medians.items():
            spread = ", ".join(f"{row[1]:.2f}" for row in found[each])
            print(f"{name}: {each:22} {wall_s * 1e3:9.1f} ms ({wall_s / wall:.2f})  {cpu_s:7.3f} CPU s ({cpu_s / cpu:.2f})  [{spread}]", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    for name in ("infinity", "sentence-transformers", "fastembed", "onnx"):
        parser.add_argument(f"--{name}", metavar="PYTHON")
    parser.add_argument("--shape", choices=[*SHAPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--encoding", choices=("float", "base64"), default="float")
    parser.add_argument("--load", choices=("many", "single"))
    parser.add_argument("--repeats", type=int, default=8, help="how often a round sends the single requests")
    parser.add_argument("--other", metavar="CHECKOUT", help="another checkout of chat_server, to compare with")
    args = parser.parse_args()
    texts = sentences(args.texts)
    loads = {"many": [texts], "single": [[text] for text in texts[:16]]}
    loads = {name: requests for name, requests in loads.items() if args.load in (None, name)}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = random_model(args.folder, args.shape, f"{scratch}/model") if args.shape else args.folder
        flags = [folder, "--served-model-name", "model"]
        ours = stack.enter_context(our_server(*flags))
        contestants = [HttpServer("chat_server", ours, "/v1/embeddings", "model", args.encoding)]
        if args.other:
            other = stack.enter_context(started([sys.executable, f"{args.other}/chat_server.py", *flags], "other"))
            contestants.append(HttpServer("other checkout", other, "/v1/embeddings", "model", args.encoding))
        if args.infinity:
            command = [args.infinity, "-m", "infinity_emb.cli", "v2", "--model-id", folder, "--served-model-name", "model", "--engine", "torch", "--device", "cpu",
                       "--dtype", "float32", "--no-model-warmup"]
            server = stack.enter_context(started(command, "infinity", env=os.environ | SILENT))
            contestants.append(HttpServer("infinity-emb", server, "/embeddings", "model", args.encoding))
        if args.sentence_transformers:
            contestants.append(stack.enter_context(library("sentence-transformers", args.sentence_transformers, folder, args.threads)))
        if args.fastembed:
            onnx = Path(scratch, "onnx")
            shutil.copytree(folder, onnx, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
            subprocess.run([args.onnx or sys.executable, "-c", ONNX, folder, onnx / "model.onnx"], check=True, env=os.environ | SILENT)
            contestants.append(stack.enter_context(library("fastembed", args.fastembed, onnx, args.threads)))
        measure(contestants, loads, args.rounds, args.repeats)


if __name__ == "__main__":
    main()
