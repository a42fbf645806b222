"""What files of each type lose: KL of their next-token distributions from the original's, with importance and without.

    python bench/quantize_kl.py [MODEL] [--types q4_0 iq4_xs q3_k_m q2_k] [--text FILE ...] [--held-out FILE ...] [--chunks 100]

MODEL (default: the default model) is written as F16, which is the original. Its importance is measured on `--text` (default: README.md
and what is below docs/), in chunks of 512 tokens. Then it is written as each type, twice, and both files read `--held-out`, which the
importance has not seen (default: the sample text of `check --against`, and two licences). Printed are the mean KL(original || file) in
nats over all positions but each text's first 8, the bits of a weight, and how often the likeliest token is the same.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.text.load import open_tokenizer    # noqa: E402
from chatlm.export.gguf.export import export_gguf    # noqa: E402
from chatlm.export.gguf.importance import write_importance    # noqa: E402
from chatlm.export.gguf.measure import measure_importance    # noqa: E402
from chatlm.worker.doctor.running import ready, step    # noqa: E402
from chatlm.worker.doctor.sample_text import TEXT    # noqa: E402
from chatlm.worker.weights.load import open_model    # noqa: E402

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LICENCES = [ROOT / "LICENSE", ROOT / "static/vendor/LICENSE.stix"]
CHUNK = 512         # tokens that see each other
STEP = 128          # tokens in a step
SKIPPED = 8         # the first tokens, which no context precedes
TYPES = ("q4_0", "iq4_xs", "q3_k_m", "q2_k")


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(1, keepdims=True))


def predictions(path, texts):
    """float32 (N, V): logprobs after all tokens but the first ones of each chunk of the texts."""
    settings = Settings(model=str(path), arithmetic="fine", drafts="none", max_batch=STEP, prefill_chunk=STEP)
    model = open_model(resolve_model(settings), settings)
    tokenizer = open_tokenizer(model.text)
    transformer = ready(model, settings, CHUNK)
    found = []
    for text in texts:
        ids = [*tokenizer.encode(text)]
        for first in range(0, len(ids), CHUNK):
            chunk = ids[first:first + CHUNK]
            for begin in range(0, len(chunk), STEP):
                end = min(begin + STEP, len(chunk))
                logits = transformer.arrays.numpy(step(transformer, chunk, begin, end, range(end - begin)))
                logprobs = log_softmax(logits.astype(numpy.float64)).astype(numpy.float32)
                found.append(logprobs[max(SKIPPED - begin, 0):])
    return numpy.concatenate(found)


def lost(original, measured):
    """(mean KL in nats, share of positions where both find the same token likeliest)."""
    divergence = 0.0
    same = 0
    for begin in range(0, len(original), STEP):
        p, q = (each[begin:begin + STEP].astype(numpy.float64) for each in (original, measured))
        divergence += (numpy.exp(p) * (p - q)).sum()
        same += (p.argmax(1) == q.argmax(1)).sum()
    return divergence / len(original), same / len(original)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--text", nargs="+", type=Path, default=DOCUMENTS)
    parser.add_argument("--held-out", nargs="+", type=Path)
    parser.add_argument("--chunks", type=int, default=100)
    given = parser.parse_args()
    texts = [path.read_text() for path in given.held_out or LICENCES]
    if not given.held_out:
        texts.append(TEXT)
    model = given.model or str(fetch_default_model())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export_gguf(resolve_model(Settings(model=model)), folder / "original.gguf", type="F16")
        source = resolve_model(Settings(model=str(folder / "original.gguf")))
        text = "\n\n".join(path.read_text() for path in given.text)
        measured = measure_importance(source, Settings(context_length=CHUNK), text, "text", chunks=given.chunks)
        write_importance(measured.importance, folder / "imatrix.gguf")
        print(f"importance of {measured.tokens:,} tokens in {measured.took_s:.0f} s")
        original = predictions(folder / "original.gguf", texts)
        print(f"{len(original):,} held-out positions\n\n| type | bits | without | with importance | same token | same, with |\n|{'---|' * 6}")
        for kind in given.types:
            cells = []
            for imatrix in (None, folder / "imatrix.gguf"):
                began = time.monotonic()
                written = export_gguf(source, folder / "file.gguf", type=kind, imatrix=imatrix, threads=2)
                print(f"{kind}: {time.monotonic() - began:.0f} s", file=sys.stderr)
                cells.append(lost(original, predictions(folder / "file.gguf", texts)))
                bits = 8 * written.n_bytes / written.weights
            (kl, same), (kl_with, same_with) = cells
            print(f"| `{kind}` | {bits:.2f} | {kl:.3f} | {kl_with:.3f} | {same:.1%} | {same_with:.1%} |", flush=True)


if __name__ == "__main__":
    main()
