"""A random llama of 1.1 billion parameters as GGUF files, and our server compared with llama-server on each of them.

    python bench/large_model.py FOLDER --llama-quantize PATH [--types Q4_K_M,Q6_K,...]
    python bench/large_model.py FOLDER --compare --llama-server PATH [--ik-llama-server PATH] [--types ...] [flags of bench/compare.py]
    python bench/large_model.py FOLDER --quality --types q4_k,q6_k,...
    python bench/large_model.py FOLDER --products

The first command writes FOLDER/large-F16.gguf and from it one file per type; those that need an importance matrix get one that
finds all columns equal. --compare runs bench/compare.py on each.
--quality prints the KL from float32 to our arithmetic, both on the weights that `--quantize TYPE` makes from the F16
file. --products times every type's product alone on one thread, by the CPU time of that thread, which other
programs disturb less than wall-clock time.

16 layers, width 2048, 32 query and 8 key heads, feed-forward 8192, the default model's tokenizer (49,152
tokens, head tied). At this size one stream is limited by the bytes of the weights. Weights are normal, scaled so
that logits have a deviation of more than 2: errors of quantized arithmetic show as in a trained model.
Text is meaningless to it, so speeds are without drafts.
"""

import argparse
import ctypes
import subprocess
import sys
import time
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402

LAYERS, WIDTH, HEADS, KV_HEADS, FFN = 16, 2048, 32, 8, 8192
TYPES = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS"]


def copy_metadata(reader, writer, prefix, changes=None):
    """Copy one GGUF file's metadata under a prefix into another, with some values changed -> its number of tokens."""
    for name, field in reader.fields.items():
        if name.startswith(prefix) and not name.startswith(("GGUF.", "general.architecture")):     # which the writer writes itself
            kinds = field.types
            writer.add_key_value(name, (changes or {}).get(name, field.contents()), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    return len(reader.fields["tokenizer.ggml.tokens"].data)


def write_f16(path):
    """Write the file that all others are made from."""
    import gguf
    writer, dice = gguf.GGUFWriter(path, "llama"), numpy.random.default_rng(1)
    vocab = copy_metadata(gguf.GGUFReader(fetch_default_model()), writer, "tokenizer.")
    writer.add_name("random llama 1.1B")
    numbers = {"block_count": LAYERS, "context_length": 4096, "embedding_length": WIDTH, "feed_forward_length": FFN,
               "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
               "rope.dimension_count": WIDTH // HEADS}
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_uint32("general.file_type", 1)

    def add(name, rows, columns, scale):
        values = dice.standard_normal((rows, columns), numpy.float32) * numpy.float32(scale)
        writer.add_tensor(name, values.astype(numpy.float16))

    ones = numpy.ones(WIDTH, numpy.float32)
    add("token_embd.weight", vocab, WIDTH, 2.5 / WIDTH**0.5)    # channels of x with norm 1: the logits' deviation is 2.5
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(LAYERS):
        key = KV_HEADS * WIDTH // HEADS
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, rows, columns, scale in [
                ("attn_q", WIDTH, WIDTH, 1.4), ("attn_k", key, WIDTH, 1.4), ("attn_v", key, WIDTH, 1.0),
                ("attn_output", WIDTH, WIDTH, 0.5), ("ffn_gate", FFN, WIDTH, 1.0), ("ffn_up", FFN, WIDTH, 1.0),
                ("ffn_down", WIDTH, FFN, 0.5)]:
            add(f"blk.{layer}.{name}.weight", rows, columns, scale / columns**0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def path_of(folder, kind):
    return folder / f"large-{kind}.gguf"


def write_even_importance(model, path):
    """An importance matrix for llama-quantize in which every column of every matrix counts the same."""
    import gguf
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for tensor in gguf.GGUFReader(model).tensors:
        if len(tensor.shape) > 1:
            matrices = int(numpy.prod(tensor.shape[2:]))
            writer.add_tensor(f"{tensor.name}.in_sum2", numpy.ones((matrices, int(tensor.shape[0])), numpy.float32))
            writer.add_tensor(f"{tensor.name}.counts", numpy.ones((matrices, 1), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(folder, kinds, llama_quantize):
    folder.mkdir(parents=True, exist_ok=True)
    base = path_of(folder, "F16")
    if not base.exists():
        write_f16(base)
    importance = folder / "importance.gguf"
    if any(kind.startswith("IQ") for kind in kinds) and not importance.exists():
        write_even_importance(base, importance)
    for kind in kinds:
        if not path_of(folder, kind).exists():
            options = ["--imatrix", importance] if kind.startswith(("IQ1", "IQ2", "IQ3")) else []
            subprocess.run([llama_quantize, *options, base, path_of(folder, kind), kind, "2"], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"{path_of(folder, kind)}: {path_of(folder, kind).stat().st_size / 1e6:,.0f} MB", flush=True)


def compare(folder, kinds, more):
    for kind in kinds:
        print(f"\n## {kind}", flush=True)
        subprocess.run([sys.executable, ROOT / "bench" / "compare.py", "--model", path_of(folder, kind),
                        "--server-args=--no-drafts --context-length 2048", *more], check=True)


def quality(folder, kinds, chunks):
    import quality as measured
    import torch
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in measured.DOCUMENTS)
    for kind in kinds:
        with torch.inference_mode():
            ours = measured.Ours(str(path_of(folder, "F16")), ["--quantize", kind], 32)
            pieces = measured.cut(ours.engine.tokenizer, text, chunks)
            judge = measured.on_own_weights(ours.engine.transformer)
            spread = judge.logprobs(0, pieces[0]).std(1).mean()
            _, figures = measured.compare([judge], [ours], pieces)
        print(f"{kind}: mean KL {figures['mean KL']:.2e} +- {figures['mean KL error']:.0e}, "
              f"99 % {figures['KL 99 %']:.2e}, largest {figures['max KL']:.2e}, "
              f"top-1 {figures['top-1']:.2%}; logits deviate by {spread:.2f}", flush=True)
        del ours, judge


def products(rows=6144, columns=2048, counts=(1, 4, 8, 64), memory=64 << 20):
    """GB/s of weights and G multiply-adds/s of one thread, by type and rows of x; weights come from memory."""
    from chatlm.worker.kernels import compiled
    from chatlm.worker.kernels.tiles import COLUMNS, FROM_FILES
    compiled.set_threads(1)
    dice = numpy.random.default_rng(0)
    weights, x = (dice.standard_normal((count, columns), numpy.float32) for count in (rows, max(counts)))
    x[:, :columns // 64] *= 20          # outlier channels, as models have them
    print(f"{compiled.info()['isa']}, ({rows}, {columns}); GB/s and G multiply-adds/s by rows of x: "
          f"{', '.join(map(str, counts))}")
    for kind in COLUMNS:
        arena = compiled.Arena(1 << 20)
        first = compiled.Matrix(arena, kind, rows, columns)
        matrices = [first]
        matrices += [compiled.Matrix(arena, kind, rows, columns) for _ in range(memory // first.nbytes)]
        if kind in FROM_FILES:
            blocks = dice.integers(0, 32, (rows, compiled._core.row_bytes(compiled.tiles.KINDS[kind], columns)), numpy.uint8)
            first.fill(blocks, kind)            # small scales wherever they lie
        else:
            first.fill(weights, "f32")
        for other in matrices[1:]:
            ctypes.memmove(other.tiles.address, first.tiles.address, first.nbytes)
        line = []
        for count in counts:
            out, best = numpy.empty((count, rows), numpy.float32), float("inf")
            for _ in range(7):
                begin = time.thread_time()
                for matrix in matrices:
                    compiled.multiply(x[:count], matrix, out=out)
                best = min(best, (time.thread_time() - begin) / len(matrices))
            line.append(f"{first.nbytes / best / 1e9:.1f} {rows * columns * count / best / 1e9:.0f}")
        print(f"{kind:7} {' | '.join(line)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", type=lambda text: text.split(","), default=TYPES)
    parser.add_argument("--llama-quantize", default="llama-quantize")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--chunks", type=int, default=2)
    arguments, more = parser.parse_known_args()
    if arguments.products:
        products()
    elif arguments.compare:
        compare(arguments.folder, arguments.types, more)
    elif arguments.quality:
        quality(arguments.folder, arguments.types, arguments.chunks)
    else:
        write(arguments.folder, arguments.types, arguments.llama_quantize)


if __name__ == "__main__":
    main()
