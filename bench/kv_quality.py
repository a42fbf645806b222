"""The quality cost of 8-bit KV pages, compared with their cost in llama-server.

    python bench/kv_quality.py [MODEL.gguf] [--llama-server PATH] [--tokens 4096] [--judged 64] [--text FILE ...]

At the last positions of a long text: mean KL(float32 KV || measured) of the next-token distributions, each program compared with
itself with a float32 KV cache, over the tokens among the likeliest 2,000 of either. llama-server reads each position's prompt from
its cache, with flash attention; ours computes the text in chunks of 256 tokens, which changes no bit.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import DOCUMENTS, build_engine, fetch_default_model, our_logits    # noqa: E402
from servers import started    # noqa: E402

KEPT = 2000


def ours(model, kind, ids, judged):
    """Logprobs (judged, V) with this --kv-cache-dtype."""
    engine = build_engine(model, ["--kv-cache-dtype", kind, "--context-length", str(len(ids) + 16), "--max-batch", "256", "--no-drafts"])
    return torch.log_softmax(our_logits(engine.transformer, ids, 256)[-judged:].double(), 1)


def theirs(program, model, kind, ids, judged, vocabulary):
    """Logprobs (judged, V) of llama-server with this type of KV cache; -inf for all but the likeliest."""
    command = [program, "-m", model, "-c", len(ids) + 16, "-np", "1", "-ctk", kind, "-ctv", kind, "-fa", "on"]
    with started(command, "llama-server") as server:
        found = torch.full((judged, vocabulary), -math.inf, dtype=torch.float64)
        for row, end in enumerate(range(len(ids) - judged + 1, len(ids) + 1)):
            answer = server.post("/completion", {
                "prompt": ids[:end], "n_predict": 1, "n_probs": KEPT, "temperature": 0, "cache_prompt": True})
            for token in answer["completion_probabilities"][0]["top_logprobs"]:
                found[row, token["id"]] = token["logprob"]
        return found


def divergence(p, q):
    """KL(p || q) of each row in nats, from logprobs (N, V), over the tokens that are among the likeliest of both."""
    kept = (p >= p.topk(KEPT).values[:, -1:]) & (q >= q.topk(KEPT).values[:, -1:]) & p.isfinite() & q.isfinite()
    p, q = p.masked_fill(~kept, 0), q.masked_fill(~kept, 0)
    return (p.exp() * (p - q) - p.exp() + q.exp()).sum(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file (default: the server's default model)")
    parser.add_argument("--llama-server", help="the binary to compare with")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--judged", type=int, default=64)
    parser.add_argument("--text", nargs="+", type=Path, default=DOCUMENTS)
    arguments = parser.parse_args()
    model = arguments.model or str(fetch_default_model())
    tokenizer = build_engine(model, ["--kv-cache-memory", "16M"]).tokenizer
    ids = tokenizer.encode("\n\n".join(path.read_text() for path in arguments.text))[:arguments.tokens]
    judge = ours(model, "float32", ids, arguments.judged)
    rows = {f"ours, {kind}": divergence(judge, ours(model, kind, ids, arguments.judged)) for kind in ("auto", "bfloat16", "q8_0")}
    if arguments.llama_server:
        args = arguments.judged, judge.shape[1]
        judge = theirs(arguments.llama_server, model, "f32", ids, *args)
        for kind in ("f16", "q8_0"):
            rows[f"llama-server, {kind}"] = divergence(judge, theirs(arguments.llama_server, model, kind, ids, *args))
    print("| KV cache | mean KL | standard error | largest KL |\n|---|---|---|---|")
    for name, kl in rows.items():
        print(f"| {name} | {kl.mean():.2e} | {statistics.stdev(kl.tolist()) / math.sqrt(len(kl)):.0e} | {kl.max():.2e} |")


if __name__ == "__main__":
    main()
