"""Random models with gpt-oss-20b's and Qwen3-30B-A3B's shapes at 4 layers, and our server compared with llama-server on them.

    python bench/experts_model.py FOLDER                        # writes gpt-oss.gguf and qwen3moe.gguf there
    python bench/experts_model.py FOLDER --compare --llama-server PATH [--only single,16,prefill-600] [flags of compare.py]
    python bench/experts_model.py --sizes                       # bytes of the whole models, from their tensors' shapes

gpt-oss has its experts in MXFP4 and the rest in Q8_0; Qwen3-MoE is Q4_K, with Q6_K where llama.cpp's Q4_K_M uses it.
Blocks are random bits with scales that give each matrix sensible values, so the files are written in seconds and
experts are chosen about evenly. Text is meaningless to such a model, so speeds are without drafts.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402

LAYERS = 4
SHAPES = {                  # name -> architecture's numbers; layers of the whole model
    "gpt-oss": dict(arch="gpt-oss", width=2880, heads=64, kv_heads=8, head_size=64, ffn=2880, experts=32, chosen=4, vocab=201088,
                    window=128, layers=24),
    "gpt-oss-120b": dict(arch="gpt-oss", width=2880, heads=64, kv_heads=8, head_size=64, ffn=2880, experts=128, chosen=4, vocab=201088,
                         window=128, layers=36),
    "qwen3moe": dict(arch="qwen3moe", width=2048, heads=32, kv_heads=4, head_size=128, ffn=768, experts=128, chosen=8, vocab=151936,
                     window=0, layers=48)}
FLOATS = ("norm", "sinks", "bias", "gate_inp")          # in names of what stays float32


def shapes(model, layers=LAYERS):
    """{name of a GGUF tensor: its shape} of a model."""
    m = SHAPES[model]
    C, F, E, V, query, key = m["width"], m["ffn"], m["experts"], m["vocab"], m["heads"] * m["head_size"], m["kv_heads"] * m["head_size"]
    each = {"attn_norm.weight": (C,), "attn_q.weight": (query, C), "attn_k.weight": (key, C), "attn_v.weight": (key, C),
            "attn_output.weight": (C, query), "ffn_gate_inp.weight": (E, C), "ffn_gate_exps.weight": (E, F, C),
            "ffn_up_exps.weight": (E, F, C), "ffn_down_exps.weight": (E, C, F)}
    if m["arch"] == "gpt-oss":
        each |= {"post_attention_norm.weight": (C,), "attn_sinks.weight": (m["heads"],), "attn_q.bias": (query,), "attn_k.bias": (key,),
                 "attn_v.bias": (key,), "attn_output.bias": (C,), "ffn_gate_inp.bias": (E,), "ffn_gate_exps.bias": (E, F),
                 "ffn_up_exps.bias": (E, F), "ffn_down_exps.bias": (E, C)}
    else:
        each |= {"ffn_norm.weight": (C,), "attn_q_norm.weight": (m["head_size"],), "attn_k_norm.weight": (m["head_size"],)}
    return {"token_embd.weight": (V, C), "output.weight": (V, C), "output_norm.weight": (C,)} | {
        f"blk.{layer}.{name}": shape for layer in range(layers) for name, shape in each.items()}


def kind_of(model, name, layers=LAYERS):
    """The GGUF type of a tensor."""
    if any(part in name for part in FLOATS):
        return "F32"
    if SHAPES[model]["arch"] == "gpt-oss":
        return "MXFP4" if "_exps." in name else "Q8_0"
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return "Q6_K" if name == "output.weight" or more_bits and ("attn_v." in name or "down_exps" in name) else "Q4_K"


def random_blocks(kind, rows, columns, dice):
    """(rows, bytes of a row) uint8: random weights of about 1 / sqrt(columns)."""
    import gguf
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = dice.integers(0, 256, (rows * columns // block, size), numpy.uint8)

    def put(begin, value):
        data[:, begin:begin + 2] = numpy.frombuffer(numpy.float16(value).tobytes(), numpy.uint8)

    if kind == "MXFP4":
        data[:, 0] = 128 - int(numpy.log2(columns) / 2) - 2
    elif kind == "Q8_0":
        put(0, 1 / 74 / columns**0.5)
    elif kind == "Q6_K":
        put(208, 1 / 1360 / columns**0.5)
    else:
        put(0, 1 / 175 / columns**0.5), put(2, 7.5 / 175 / columns**0.5)
    return data.reshape(rows, -1)


def write(path, model):
    import gguf
    m, dice = SHAPES[model], numpy.random.default_rng(1)
    default = gguf.GGUFReader(fetch_default_model())
    writer = gguf.GGUFWriter(path, m["arch"])
    known = default.fields["tokenizer.ggml.tokens"].contents()
    unused = [f"<|unused{i}|>" for i in range(m["vocab"] - len(known))]
    for name, field in default.fields.items():
        if name == "tokenizer.ggml.tokens":
            writer.add_token_list(known + unused)
        elif name == "tokenizer.ggml.token_type":
            writer.add_token_types(field.contents() + [5] * len(unused))
        elif name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.add_name(f"random {model}")
    numbers = {"block_count": LAYERS, "context_length": 4096, "embedding_length": m["width"], "feed_forward_length": m["ffn"],
               "expert_feed_forward_length": m["ffn"], "attention.head_count": m["heads"], "attention.head_count_kv": m["kv_heads"],
               "attention.key_length": m["head_size"], "attention.value_length": m["head_size"], "expert_count": m["experts"],
               "expert_used_count": m["chosen"]}
    if m["window"]:
        numbers["attention.sliding_window"] = m["window"]
    for key, value in numbers.items():
        writer.add_uint32(f"{m['arch']}.{key}", value)
    writer.add_float32(f"{m['arch']}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{m['arch']}.rope.freq_base", 150000.0)
    for name, shape in shapes(model).items():
        kind, rows = kind_of(model, name), int(numpy.prod(shape[:-1]))
        if kind == "F32":
            values = dice.standard_normal(shape, numpy.float32) * numpy.float32(0.3 if "gate_inp" not in name else shape[-1]**-0.5)
            writer.add_tensor(name, 1 + values if "norm" in name else values)
        else:
            blocks = random_blocks(kind, rows, shape[-1], dice)
            writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB", flush=True)


def print_sizes(context=32768):
    """What whole models take: bytes of their tensors, and of the keys and values of one context."""
    import gguf
    for model, m in SHAPES.items():
        total = {}
        for name, shape in shapes(model, m["layers"]).items():
            kind = gguf.GGMLQuantizationType[kind_of(model, name, m["layers"])]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            total[kind.name] = total.get(kind.name, 0) + int(numpy.prod(shape)) // block * size
        cache = m["layers"] * context * 2 * m["kv_heads"] * m["head_size"] * 2
        print(f"{model}: {', '.join(f'{kind} {size / 1e9:.2f}' for kind, size in total.items())}, in all {sum(total.values()) / 1e9:.2f} GB; "
              f"{context:,} tokens of float16 keys and values {cache / 1e9:.2f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("."))
    parser.add_argument("--models", type=lambda text: text.split(","), default=["gpt-oss", "qwen3moe"])
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    arguments, more = parser.parse_known_args()
    if arguments.sizes:
        return print_sizes()
    for model in arguments.models:
        path = arguments.folder / f"{model}.gguf"
        if not arguments.compare:
            write(path, model)
            continue
        print(f"\n## {model}", flush=True)
        subprocess.run([sys.executable, ROOT / "bench" / "compare.py", "--model", path,
                        "--server-args=--no-drafts --context-length 2048", *more], check=True)


if __name__ == "__main__":
    main()
