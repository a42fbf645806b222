"""What quantized arithmetic costs in quality: chat_server and llama.cpp against float32 on the dequantized
weights.

    python bench/quality.py [MODEL] [--llama-perplexity PATH] [--text FILE ...] [--chunks 8] [--own-weights]
                            [--server-args "..."]

Real text (by default README.md and what is below docs/) is cut into chunks of 512 tokens. At the positions of
each chunk's second half the next-token distributions are compared: top-1 agreement and mean KL(float32 ||
measured) with their standard errors, largest KL, perplexity. For a GGUF file the judge is transformers in
float32 on the dequantized weights; for a nanochat checkpoint it is our reference ops in float32.
`--own-weights` adds a second judge: the reference ops in float32 on the weights that the server holds,
rounded to bfloat16 or by `--server-args "--quantize q8_0"`. The KL from the first judge to the second is the
cost of rounding the weights; the KL from the second to our server is the cost of the arithmetic.

llama.cpp's logits come from `llama-perplexity --save-all-logits`, since llama-server returns no prompt
logprobs. It saves them in 65,536 steps over the 16 below the largest: the error is at most 1.2e-4, which adds
2e-9 to a KL. Tokens more than 16 below the largest are left out for every contestant. `--ubatch 1` makes it
use its one-row (decode) kernels instead of its prefill. Our rows do not depend on the batch; `--rows 1` shows
it.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
sys.path.insert(0, str(ROOT))
from chatlm import cli    # noqa: E402
from chatlm.commands import COMMANDS    # noqa: E402
from chatlm.common.config import PAGE_SIZE    # noqa: E402
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.processes.start import threads_per_worker    # noqa: E402
from chatlm.worker import build    # noqa: E402
from chatlm.worker.arrays.kinds import floats    # noqa: E402
from chatlm.worker.kernels.choosing import load_kernels    # noqa: E402
from chatlm.worker.model.batch import Batch    # noqa: E402
from chatlm.worker.model.transformer import Transformer    # noqa: E402
from chatlm.worker.weights.load import open_model    # noqa: E402

CHUNK = 512                         # tokens; positions FIRST .. CHUNK - 2 are judged, as in llama-perplexity
FIRST = CHUNK // 2
SPAN = 16.0                         # llama-perplexity keeps logits within this of the largest


# 1. contestants: each gives the logprobs (CHUNK - 1 - FIRST, V), float64, of a chunk's judged positions -------------------


def build_engine(model, flags):
    """The engine that `chat_server.py MODEL flags` would run on the CPU, in this process."""
    settings = cli.parse_command_line(["serve", *([model] if model else []), *flags], os.environ, COMMANDS)
    source = resolve_model(settings)
    torch.set_num_threads(threads_per_worker(1))
    return build.build_engine(source, settings, torch.device("cpu"))[1]


def our_logits(transformer, ids, rows):
    """Logits (N, V) after each of the N ids, `rows` of them in a step."""
    pages = list(range(-(-len(ids) // PAGE_SIZE) * len(transformer.groups.windows)))
    found = []
    for start in range(0, len(ids), rows):
        end = min(start + rows, len(ids))
        batch = Batch(ids[start:end], [ids[i - 1] if i else -1 for i in range(start, end)], starts=[0, end - start],
                      lengths=[end], tables=[pages], logit_rows=list(range(end - start)))
        found.append(torch.from_numpy(transformer.arrays.numpy(transformer.forward(batch)).copy()))
    return torch.cat(found)


class Ours:
    def __init__(self, model, flags, rows):
        self.name, self.engine, self.rows = " ".join(["ours", *flags]), build_engine(model, flags), rows

    def logprobs(self, index, ids):
        return torch.log_softmax(our_logits(self.engine.transformer, ids[:-1], self.rows)[FIRST:].double(), 1)


class ReferenceOps:
    """The reference ops in float32 on `tensors`, named and shaped as `model.tensors()` says."""

    def __init__(self, name, model, tensors):
        kernels = load_kernels("cpu")           # without a model: the references
        self.name, self.transformer = name, Transformer(
            model, tensors, kernels, num_pages=CHUNK // PAGE_SIZE, max_tokens=CHUNK, dtype="float32")

    def logprobs(self, index, ids):
        return torch.log_softmax(our_logits(self.transformer, ids[:-1], CHUNK)[FIRST:].double(), 1)


def on_checkpoint(model, flags):
    """The judge for the nanochat checkpoint that these flags choose: its weights as stored in the file."""
    settings = replace(cli.parse_command_line(["serve", model, *flags], os.environ, COMMANDS), dtype="float32")
    loaded = open_model(resolve_model(settings), settings)
    return ReferenceOps("float32", loaded.architecture, loaded.tensors)


def on_own_weights(transformer):
    """The judge whose weights are those that `transformer` holds, in decode_core's tiles or outside them."""
    def held(name, weight):
        if isinstance(weight, numpy.ndarray):
            return torch.from_numpy(floats(weight))
        rows = torch.from_numpy(weight.dequantize())
        if name.endswith("gate_up"):            # tiles of gate and up, 16 rows each, alternate
            rows = rows.view(-1, 2, 16, rows.shape[1]).transpose(0, 1).reshape(rows.shape)
        return rows

    tensors = {name: held(name, weight) for name, weight in transformer.weights.items()}
    return ReferenceOps("float32 on its weights", transformer.model, tensors)


class Transformers:
    """Hugging Face transformers in float32 on a GGUF file's dequantized weights."""

    name = "transformers, float32"

    def __init__(self, path):
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def logprobs(self, index, ids):
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([ids[:-1]])).logits[0, FIRST:].double(), 1)


class LlamaCpp:
    """The logprobs that llama-perplexity saved; `ids` are the text's tokens from its own tokenizer.

    The file: "_logits_", context, vocabulary and chunks (int32 each), the tokens (int32), and for each judged position
    float32 scale and least logprob, then a uint16 for each token; logprob = least + scale * value.
    """

    def __init__(self, program, path, text, chunks, ubatch, folder):
        self.name = f"llama.cpp, ubatch {ubatch}"
        saved, source = folder / f"logits-{ubatch}", folder / "text"
        source.write_text(text)
        done = subprocess.run([program, "-m", str(path), "-f", str(source), "--save-all-logits", str(saved), "-c", str(CHUNK),
                               "-b", str(CHUNK), "-ub", str(ubatch), "--chunks", str(chunks), "-t", str(os.cpu_count())],
                              capture_output=True, text=True, errors="replace", timeout=1800)
        if done.returncode or not saved.exists():
            raise SystemExit(f"llama-perplexity failed:\n{done.stderr[-2000:]}")
        magic, (context, vocabulary, chunks) = saved.read_bytes()[:8], numpy.fromfile(saved, "<i4", 3, offset=8)
        assert magic == b"_logits_" and context == CHUNK
        self.ids = numpy.fromfile(saved, "<i4", chunks * CHUNK, offset=20).reshape(chunks, CHUNK).tolist()
        width = 4 + 2 * ((vocabulary + 1) // 2)
        rows = numpy.memmap(saved, "<u2", "r", offset=20 + 4 * chunks * CHUNK)
        self.rows, self.vocabulary = rows.reshape(chunks, CHUNK - 1 - FIRST, width), vocabulary

    def logprobs(self, index, ids):
        rows = self.rows[index]
        scale, least = numpy.ascontiguousarray(rows[:, :4]).view("<f4").astype("<f8").T[..., None]
        return torch.from_numpy(least + scale * rows[:, 4:4 + self.vocabulary])


# 2. the comparison -----------------------------------------------------------------------------------------------


def divergence(p, q):
    """KL(p || q) of each row in nats, from logprobs (N, V), over the tokens that llama-perplexity would have kept of q.

    Each token adds p log(p / q) - p + q, which sums to the KL and is never negative, so that what is left out
    (below 1e-6) and the rounding of saved logprobs have only a second-order effect.
    """
    kept = q > q.amax(1, keepdim=True) - SPAN * (1 - 1e-4)
    return torch.where(kept, p.exp() * (p - q) - p.exp() + q.exp(), 0).sum(1)


class Score:
    """One contestant against one judge, at all judged positions."""

    def __init__(self, judge, name):
        self.judge, self.name, self.equal, self.kl, self.surprise = judge, name, [], [], []

    def add(self, judge, measured, following):
        """Logprobs (N, V) of both, and the N tokens that follow in the text."""
        self.equal += (judge.argmax(1) == measured.argmax(1)).tolist()
        self.kl += divergence(judge, measured).tolist()
        self.surprise += (-measured.gather(1, following[:, None])[:, 0]).tolist()

    def figures(self):
        n, agreement = len(self.equal), statistics.mean(self.equal)
        return {"judge": self.judge, "contestant": self.name, "positions": n, "top-1": agreement,
                "top-1 error": math.sqrt(agreement * (1 - agreement) / n), "mean KL": statistics.mean(self.kl),
                "mean KL error": statistics.stdev(self.kl) / math.sqrt(n), "KL 99 %": sorted(self.kl)[int(0.99 * n)],
                "max KL": max(self.kl), "perplexity": math.exp(statistics.mean(self.surprise))}


def compare(judges, contestants, chunks):
    """Figures of every judge and contestant against the first judge, then of the contestants against the other judges."""
    pairs = [(judges[0], measured) for measured in judges + contestants]
    pairs += [(judge, measured) for judge in judges[1:] for measured in contestants]
    scores = [Score(judge.name, measured.name) for judge, measured in pairs]
    for index, ids in enumerate(chunks):
        print(f"  chunk {index + 1} of {len(chunks)}", file=sys.stderr, flush=True)
        found, following = {each: each.logprobs(index, ids) for each in judges + contestants}, torch.tensor(ids[FIRST + 1:])
        for score, (judge, measured) in zip(scores, pairs):
            score.add(found[judge], found[measured], following)
    return [score.figures() for score in scores]


def table(rows):
    lines = ["| judge | contestant | top-1 equal | mean KL | KL, 99 % | largest KL | perplexity |", "|---" * 7 + "|"]
    for row in rows:
        equal, kl = f"{row['top-1']:.2%} +- {row['top-1 error']:.2%}", f"{row['mean KL']:.2e} +- {row['mean KL error']:.0e}"
        lines.append(f"| {row['judge']} | {row['contestant']} | {equal} | {kl} | {row['KL 99 %']:.2e} | {row['max KL']:.2e} | "
                     f"{row['perplexity']:.3f} |")
    return "\n".join(lines)


# 3. command line -------------------------------------------------------------------------------------------------


def parse_command_line():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file or a nanochat folder (default: the server's default model)")
    parser.add_argument("--llama-perplexity", help="the binary to compare with (GGUF files only)")
    parser.add_argument("--text", nargs="+", type=Path, default=DOCUMENTS)
    parser.add_argument("--chunks", type=int, default=8, help="of 512 tokens each")
    parser.add_argument("--rows", type=int, default=32, help="tokens in one step of ours; at most --max-batch")
    parser.add_argument("--ubatch", type=int, default=512, help="tokens in one step of llama.cpp")
    parser.add_argument("--server-args", type=shlex.split, default=[], help="more flags for ours, in one string")
    parser.add_argument("--own-weights", action="store_true", help="judge by float32 on the weights as ours holds them, too")
    parser.add_argument("--json", type=Path, help="store the figures in this file")
    return parser.parse_args()


def cut(tokenizer, text, chunks):
    ids = tokenizer.encode(text)
    return [ids[start:start + CHUNK] for start in range(0, len(ids) - CHUNK + 1, CHUNK)][:chunks]


def main(arguments):
    text = "\n\n".join(path.read_text() for path in arguments.text)
    model = arguments.model or str(fetch_default_model())
    ours = Ours(model, arguments.server_args, arguments.rows)
    judges = [Transformers(Path(model)) if Path(model).suffix == ".gguf" else on_checkpoint(model, arguments.server_args)]
    judges += [on_own_weights(ours.engine.transformer)] if arguments.own_weights else []
    peers, chunks = [], cut(ours.engine.tokenizer, text, arguments.chunks)
    if arguments.llama_perplexity:
        with tempfile.TemporaryDirectory() as folder:
            peers = [LlamaCpp(arguments.llama_perplexity, model, text, arguments.chunks, arguments.ubatch, Path(folder))]
        if peers[0].ids != chunks:
            print("the two tokenize the text differently: llama.cpp's tokens are judged", file=sys.stderr)
            chunks = peers[0].ids
    rows = compare(judges, [ours, *peers], chunks)
    print(table(rows))
    if arguments.json:
        found = {"model": Path(model).name, "text": [path.name for path in arguments.text], "figures": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_command_line())
