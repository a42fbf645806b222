"""Random models in the published shapes of hybrids, of Gemma 4, of GLM-4.7-Flash and of Bonsai, at few layers, and our server compared with others on them.

    python bench/family_shapes.py FOLDER --llama-quantize PATH [--shapes qwen3.5-4b,...] [--type Q4_K_M]
    python bench/family_shapes.py FOLDER --compare --llama-server PATH [--ik-llama-server PATH] [--shapes ...] [flags of bench/compare.py]

The first command writes FOLDER/SHAPE-Q4_K_M.gguf for each shape, from a float16 file that it then deletes; --compare runs
bench/compare.py on each. Their layers, mostly four, have the whole model's kinds: for Qwen3.5 three delta rules and one full attention;
for Gemma-4-E4B a sliding and a full layer, then one of each that reads their keys; for 26B-A4B three sliding and one full; for
GLM-4.7-Flash one dense and two with experts.

The vocabulary is the default model's (49,152 tokens), so that the head takes about the same share of a step as in the
whole model (a head of 248,320 rows would be two thirds of four layers) and Gemma's table of per-layer embeddings stays
small. Where there are many experts, all are copies of 16, each stored separately. Weights are normal; decays and time steps
are distributed as at the start of Mamba-2's training: such a state forgets within 1 to 1,000 tokens. Embeddings are small
compared with what the blocks add: otherwise, with a tied head, an answer would repeat its last token, and so its experts.
Logits have a deviation of about 2.5. Text is meaningless to these models, so speeds are without drafts.
Bonsai 8B is a Qwen3 that was trained in one bit: `--shapes bonsai-8b --type Q1_0`, or Q2_0, in which all of its matrices are, the head too.
llama.cpp supports all of these; ik_llama.cpp (September 2026) supports neither lfm2 nor granitehybrid.
"""

import argparse
import functools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402
from large_model import copy_metadata    # noqa: E402

X = 0.15            # deviation of a channel of x before the first block
SPREAD = 2.5        # deviation of the logits
DRAWN = 1 << 22     # random numbers that all matrices are cut from, since drawing billions would take minutes
FEW = 16            # experts that are quantized; llama-quantize would take 8 for Mixtral and choose other types
PURE = ("Q1_0", "Q2_0")     # types that all matrices of a model have
FLOATS = ("ssm_a", "ssm_d", "norm.weight", "ssm_conv1d.weight", "shortconv.conv.weight", "ffn_gate_inp.weight")


class Shape(NamedTuple):
    arch: str
    layers: tuple[str, ...]     # names of MIXERS
    numbers: dict               # GGUF's metadata after the architecture
    tied: bool = True


# 1. the shapes ---------------------------------------------------------------------------------------------------
# Qwen3.5-4B: config.json of models tuned from it on the hub (halen214/st01), metadata of its GGUF (llama.cpp's pull request 22673).
# Qwen3.6-35B-A3B: its card on the hub, transformers' Qwen3_5MoeTextConfig, whose defaults it is, metadata of its GGUF (ollama's pull
# request 16031). Gemma-4-E4B: google/gemma-4-E4B-it's config.json, metadata of its GGUF (ollama's issue 18123), gemma.cpp's pull request
# 919. Gemma-4-26B-A4B: metadata of its GGUF (ollama.com/library/gemma4:26b-a4b-it-q4_K_M). LFM2-1.2B and Granite-4.0-H-Tiny: their
# config.json, as in tests/support/hub_configs.py. GLM-4.7-Flash: transformers' Glm4MoeLiteConfig, whose defaults it is; the keys are those
# of llama.cpp's converter.

QWEN35 = {"attention.key_length": 256, "attention.value_length": 256, "attention.layer_norm_rms_epsilon": 1e-6,
          "rope.dimension_count": 64, "rope.dimension_sections": [11, 11, 10, 0], "rope.freq_base": 1e7,
          "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": 32, "ssm.inner_size": 4096,
          "attention.recurrent_layers": [True, True, True, False]}
GEMMA4 = {"attention.key_length": 512, "attention.value_length": 512, "attention.key_length_swa": 256, "attention.value_length_swa": 256,
          "attention.layer_norm_rms_epsilon": 1e-6, "final_logit_softcapping": 30.0, "rope.dimension_count": 512,
          "rope.dimension_count_swa": 256, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4}
SHAPES = {
    "qwen3.5-4b": Shape("qwen35", ("delta", "delta", "delta", "gated"), QWEN35 | {
        "embedding_length": 2560, "feed_forward_length": 9216, "attention.head_count": 16, "attention.head_count_kv": 4}),
    "qwen3.6-35b-a3b": Shape("qwen35moe", ("delta", "delta", "delta", "gated"), QWEN35 | {
        "embedding_length": 2048, "attention.head_count": 16, "attention.head_count_kv": 2, "expert_count": 256, "expert_used_count": 8,
        "expert_feed_forward_length": 512, "expert_shared_feed_forward_length": 512}, tied=False),
    "gemma-4-e4b": Shape("gemma4", ("sliding", "full", "sliding shared", "full shared"), GEMMA4 | {
        "embedding_length": 2560, "feed_forward_length": 10240, "attention.head_count": 8, "attention.head_count_kv": 2,
        "attention.sliding_window": 512, "attention.sliding_window_pattern": [True, False, True, False], "attention.shared_kv_layers": 2,
        "embedding_length_per_layer_input": 256}),
    "gemma-4-26b-a4b": Shape("gemma4", ("sliding", "sliding", "sliding", "full without v"), GEMMA4 | {
        "embedding_length": 2816, "feed_forward_length": 2112, "attention.head_count": 16, "attention.head_count_kv": [8, 8, 8, 2],
        "attention.sliding_window": 1024, "attention.sliding_window_pattern": [True, True, True, False], "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0, "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 704}),
    "lfm2-1.2b": Shape("lfm2", ("conv", "conv", "normed", "conv"), {
        "embedding_length": 2048, "feed_forward_length": 8192, "attention.head_count": 32, "attention.head_count_kv": [0, 0, 8, 0],
        "attention.key_length": 64, "attention.value_length": 64, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6,
        "shortconv.l_cache": 3}),
    "granite-4.0-h-tiny": Shape("granitehybrid", ("mamba", "mamba", "mamba", "plain"), {
        "embedding_length": 1536, "feed_forward_length": 512, "attention.head_count": 12, "attention.head_count_kv": [0, 0, 0, 4],
        "attention.key_length": 128, "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4,
        "rope.dimension_count": 128, "rope.scaling.finetuned": False, "attention.scale": 0.0078125, "embedding_scale": 12.0,
        "residual_scale": 0.22, "logit_scale": 6.0, "expert_count": 64, "expert_used_count": 6, "expert_shared_feed_forward_length": 1024,
        "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 1, "ssm.time_step_rank": 48, "ssm.inner_size": 3072}),
    "glm-4.7-flash": Shape("deepseek2", ("latent", "latent", "latent"), {
        "embedding_length": 2048, "feed_forward_length": 10240, "attention.head_count": 20, "attention.head_count_kv": 1,
        "attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 256, "attention.value_length_mla": 256,
        "attention.q_lora_rank": 768, "attention.kv_lora_rank": 512, "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 64,
        "rope.freq_base": 1e6, "leading_dense_block_count": 1, "expert_count": 64, "expert_used_count": 4, "expert_shared_count": 1,
        "expert_feed_forward_length": 1536, "expert_shared_feed_forward_length": 1536, "expert_weights_scale": 1.8, "expert_weights_norm": True,
        "expert_gating_func": 2, "expert_group_count": 1, "expert_group_used_count": 1}, tied=False),
    "bonsai-8b": Shape("qwen3", ("full", "full", "full", "full"), {
        "embedding_length": 4096, "feed_forward_length": 12288, "attention.head_count": 32, "attention.head_count_kv": 8,
        "attention.key_length": 128, "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": 128, "rope.freq_base": 1e6}, tied=False)}


# 2. a file's tensors ---------------------------------------------------------------------------------------------


def attention(n, layer, *, size="attention.key_length", gate=1, norms=True, keys=True, values=True):
    """{name: shape} of a layer's attention; with `gate` 2, each head's query is followed by its gate."""
    C, D, heads, own = n["embedding_length"], n[size], n["attention.head_count"], n["attention.head_count_kv"]
    rows = (own[layer] if isinstance(own, list) else own) * D
    return ({"attn_q.weight": (gate * heads * D, C), "attn_output.weight": (C, heads * D)}
            | ({"attn_k.weight": (rows, C)} if keys else {}) | ({"attn_v.weight": (rows, C)} if keys and values else {})
            | ({"attn_q_norm.weight": (D,)} if norms else {}) | ({"attn_k_norm.weight": (D,)} if norms and keys else {}))


def delta_rule(n, layer):
    C, values, heads = n["embedding_length"], n["ssm.inner_size"], n["ssm.time_step_rank"]
    mixed = 2 * n["ssm.state_size"] * n["ssm.group_count"] + values
    return {"attn_qkv.weight": (mixed, C), "attn_gate.weight": (values, C), "ssm_conv1d.weight": (mixed, n["ssm.conv_kernel"]),
            "ssm_a": (heads,), "ssm_dt.bias": (heads,), "ssm_beta.weight": (heads, C), "ssm_alpha.weight": (heads, C),
            "ssm_norm.weight": (values // heads,), "ssm_out.weight": (C, values)}


def mamba(n, layer):
    C, inner, heads, groups = n["embedding_length"], n["ssm.inner_size"], n["ssm.time_step_rank"], n["ssm.group_count"]
    mixed = inner + 2 * groups * n["ssm.state_size"]
    return {"ssm_in.weight": (inner + mixed + heads, C), "ssm_conv1d.weight": (mixed, n["ssm.conv_kernel"]), "ssm_conv1d.bias": (mixed,),
            "ssm_a": (heads, 1), "ssm_d": (heads, 1), "ssm_dt.bias": (heads,), "ssm_norm.weight": (groups, inner // groups),
            "ssm_out.weight": (C, inner)}


def latent(n, layer):
    """Latent attention (MLA), with keys and values of heads in two tensors, the former transposed."""
    C, heads, kept, turned, rank = (n[key] for key in (
        "embedding_length", "attention.head_count", "attention.kv_lora_rank", "rope.dimension_count", "attention.q_lora_rank"))
    keys, values = n["attention.key_length_mla"], n["attention.value_length_mla"]
    return {"attn_q_a.weight": (rank, C), "attn_q_a_norm.weight": (rank,), "attn_q_b.weight": (heads * keys, rank),
            "attn_kv_a_mqa.weight": (kept + turned, C), "attn_kv_a_norm.weight": (kept,), "attn_k_b.weight": (heads, kept, keys - turned),
            "attn_v_b.weight": (heads, values, kept), "attn_output.weight": (C, heads * values)}


def short_convolution(n, layer):
    C = n["embedding_length"]
    return {"shortconv.in_proj.weight": (3 * C, C), "shortconv.conv.weight": (C, n["shortconv.l_cache"]), "shortconv.out_proj.weight": (C, C)}


def sliding(n, layer, **how):
    return attention(n, layer, size="attention.key_length_swa", **how)


MIXERS = {
    "delta": delta_rule, "mamba": mamba, "conv": short_convolution, "normed": attention, "full": attention, "sliding": sliding,
    "latent": latent,
    "plain": lambda n, layer: attention(n, layer, norms=False), "gated": lambda n, layer: attention(n, layer, gate=2),
    "full without v": lambda n, layer: attention(n, layer, values=False),
    "full shared": lambda n, layer: attention(n, layer, keys=False), "sliding shared": lambda n, layer: sliding(n, layer, keys=False)}
NORMS = {       # of a block, each as wide as x
    "qwen35": ("attn_norm", "post_attention_norm"), "qwen35moe": ("attn_norm", "post_attention_norm"), "lfm2": ("attn_norm", "ffn_norm"),
    "granitehybrid": ("attn_norm", "ffn_norm"), "deepseek2": ("attn_norm", "ffn_norm"), "qwen3": ("attn_norm", "ffn_norm"), "gemma4": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")}


def feed_forward(shape, layer):
    n, gemma = shape.numbers, shape.arch == "gemma4"
    C, E, F, shared = (n.get(key, 0) for key in ("embedding_length", "expert_count", "feed_forward_length", "expert_shared_feed_forward_length"))
    found, width = {}, n.get("expert_feed_forward_length", F)
    if layer < n.get("leading_dense_block_count", 0):
        E = shared = 0
    if gemma or not E:
        found |= {"ffn_gate.weight": (F, C), "ffn_up.weight": (F, C), "ffn_down.weight": (C, F)}
    if E:
        found |= {"ffn_gate_inp.weight": (E, C), "ffn_down_exps.weight": (E, C, width)}
        found |= {"ffn_gate_up_exps.weight": (E, 2 * width, C)} if gemma else {
            "ffn_gate_exps.weight": (E, width, C), "ffn_up_exps.weight": (E, width, C)}
    if shared:
        found |= {"ffn_gate_shexp.weight": (shared, C), "ffn_up_shexp.weight": (shared, C), "ffn_down_shexp.weight": (C, shared)}
    if E and shape.arch == "qwen35moe":
        found["ffn_gate_inp_shexp.weight"] = (C,)
    if E and shape.arch == "deepseek2":
        found["exp_probs_b.bias"] = (E,)
    if E and gemma:
        found |= {"ffn_gate_inp.scale": (C,), "ffn_down_exps.scale": (E,)}
        found |= {f"{name}.weight": (C,) for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")}
    return found


def tensors(shape, vocab):
    """{name of a GGUF tensor: its shape} of the file."""
    n, layers = shape.numbers, len(shape.layers)
    C, per_layer = n["embedding_length"], n.get("embedding_length_per_layer_input", 0)
    found = {"token_embd.weight": (vocab, C), "token_embd_norm.weight" if shape.arch == "lfm2" else "output_norm.weight": (C,)}
    if not shape.tied:
        found["output.weight"] = (vocab, C)
    if shape.arch == "gemma4":
        found["rope_freqs.weight"] = (n["attention.key_length"] // 2,)
    if per_layer:
        found |= {"per_layer_token_embd.weight": (vocab, layers * per_layer), "per_layer_model_proj.weight": (layers * per_layer, C),
                  "per_layer_proj_norm.weight": (per_layer,)}
    for layer, mixer in enumerate(shape.layers):
        block = {f"{name}.weight": (C,) for name in NORMS[shape.arch]} | MIXERS[mixer](n, layer) | feed_forward(shape, layer)
        if shape.arch == "gemma4":
            block["layer_output_scale.weight"] = (1,)
        if per_layer:
            block |= {"inp_gate.weight": (per_layer, C), "proj.weight": (C, per_layer), "post_norm.weight": (C,)}
        found |= {f"blk.{layer}.{name}": size for name, size in block.items()}
    return found


# 3. their values -------------------------------------------------------------------------------------------------


def embedding_scale(shape):
    """The factor by which a token's row is multiplied to give x."""
    return shape.numbers["embedding_length"]**0.5 if shape.arch == "gemma4" else shape.numbers.get("embedding_scale", 1.0)


def special(shape, part, size, dice):
    """The values of a tensor of a block (or of none) that is not drawn like a matrix, or None."""
    C = shape.numbers["embedding_length"]
    if part == "ssm_a":
        return -dice.uniform(1, 16, size)
    if part == "ssm_dt.bias":           # softplus of it is between 0.001 and 0.1
        return numpy.log(numpy.expm1(numpy.exp(dice.uniform(numpy.log(1e-3), numpy.log(0.1), size))))
    if part == "rope_freqs.weight":     # of a head the first quarter turns
        return numpy.where(numpy.arange(size[0]) < size[0] // 4, 1.0, 1e30)
    if part in ("output_norm.weight", "token_embd_norm.weight"):
        return numpy.full(size, SPREAD * shape.numbers.get("logit_scale", 1.0) * embedding_scale(shape) / X / C**0.5)
    if part == "ffn_gate_inp.scale":    # the router divides by it
        return numpy.full(size, C**0.5)
    if shape.arch == "gemma4" and part in ("attn_q_norm.weight", "attn_k_norm.weight"):     # scores are not divided by sqrt(D)
        return numpy.full(size, size[0]**-0.25)
    if "norm" in part or "scale" in part or part == "ssm_d":
        return numpy.ones(size)
    return dice.standard_normal(size) * 0.02 if len(size) == 1 else None


def deviation(shape, name, columns):
    """Of a matrix's entries."""
    if name in ("token_embd.weight", "output.weight"):
        return X / embedding_scale(shape)
    if name == "per_layer_token_embd.weight":       # the model multiplies it
        return shape.numbers["embedding_length_per_layer_input"]**-0.5
    adds = any(part in name for part in ("attn_output", "ssm_out", "out_proj", "ffn_down"))     # to x
    return (2.0 / shape.numbers.get("residual_scale", 1.0) if adds else 1.0) / columns**0.5


def type_of(name, size):
    """float32 if llama.cpp's converter keeps it, else float16."""
    return numpy.dtype(numpy.float32 if len(size) == 1 or name.endswith(FLOATS) else numpy.float16)


def values_of(shape, name, size, dice):
    part, kind = name.split(".", 2)[2] if name.startswith("blk.") else name, type_of(name, size)
    if (values := special(shape, part, size, dice)) is not None:
        return values.astype(kind)
    values, drawn = numpy.empty(size, kind), (normal_numbers() * numpy.float32(deviation(shape, name, size[-1]))).astype(kind)
    flat, length = values.reshape(-1), DRAWN // 4
    for begin in range(0, flat.size, length):
        piece, first = flat[begin:begin + length], dice.integers(DRAWN - length)
        piece[:] = drawn[first:first + piece.size]
    return values


@functools.cache
def normal_numbers():
    return numpy.random.default_rng(2).standard_normal(DRAWN, numpy.float32)


def numbers_of(shape):
    """The metadata after the architecture."""
    return {"block_count": len(shape.layers), "context_length": 32768} | shape.numbers


def write(path, name, shape, source):
    """Write the float16 file that a quantized one is made from; the GGUF file `source` has the tokenizer."""
    import gguf
    writer = gguf.GGUFWriter(path, shape.arch)
    vocab = copy_metadata(gguf.GGUFReader(source), writer, "tokenizer.")
    writer.add_name(f"random {name}, {len(shape.layers)} layers")
    writer.add_uint32("general.file_type", 1)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, number in numbers_of(shape).items():
        add[type(number)](f"{shape.arch}.{key}", number)
    sizes, dice = tensors(shape, vocab), numpy.random.default_rng(1)
    for tensor, size in sizes.items():
        kind = type_of(tensor, size)
        writer.add_tensor_info(tensor, size, kind, int(numpy.prod(size)) * kind.itemsize)
    write_all(writer, (values_of(shape, tensor, size, dice) for tensor, size in sizes.items()))


def write_all(writer, arrays):
    """Write the file of a writer that has its tensors' shapes; tensors come one at a time, since some are 1 GB."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in arrays:
        writer.write_tensor_data(values)
    writer.close()


def write_with_all_experts(path, shape, few):
    """The file `few`, with FEW experts a layer, expanded to as many as the shape has: copies of these, with a new router."""
    import gguf
    reader, dice = gguf.GGUFReader(few), numpy.random.default_rng(3)
    writer, sizes = gguf.GGUFWriter(path, shape.arch), tensors(shape, 0)
    copy_metadata(reader, writer, "", {f"{shape.arch}.expert_count": shape.numbers["expert_count"]})

    def whole(tensor):
        if "_exps.weight" in tensor.name:
            return numpy.tile(tensor.data, (shape.numbers["expert_count"] // FEW, 1, 1))
        routes = tensor.name.endswith(("ffn_gate_inp.weight", "ffn_down_exps.scale", "exp_probs_b.bias"))
        return values_of(shape, tensor.name, sizes[tensor.name], dice) if routes else tensor.data

    for tensor in reader.tensors:
        data = whole(tensor)
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, raw_dtype=tensor.tensor_type)
    write_all(writer, map(whole, reader.tensors))


def write_quantized(path, kind, name, llama_quantize):
    """Make one shape's file. If it has many experts, llama-quantize makes only FEW, which takes one minute instead of ten."""
    shape, plain, part = SHAPES[name], path.with_suffix(".float"), path.with_suffix(".part")
    many = shape.numbers.get("expert_count", 0) > FEW
    try:
        write(plain, name, shape._replace(numbers=shape.numbers | {"expert_count": FEW}) if many else shape, fetch_default_model())
        pure = ["--pure"] if kind in PURE else []
        subprocess.run([llama_quantize, *pure, plain, part, kind, "2"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if many:
            plain.unlink()
            write_with_all_experts(plain, shape, part)
        (plain if many else part).rename(path)
    finally:
        for unfinished in (plain, part):
            unfinished.unlink(missing_ok=True)


# 4. command line -------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES), help=f"of {','.join(SHAPES)}")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--llama-quantize", default="llama-quantize")
    parser.add_argument("--compare", action="store_true")
    arguments, more = parser.parse_known_args()
    if unknown := set(arguments.shapes) - set(SHAPES):
        parser.error(f"--shapes knows {','.join(SHAPES)}, not {','.join(sorted(unknown))}")
    if more and not arguments.compare:
        parser.error(f"only --compare takes other flags: {' '.join(more)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.shapes:
        path = arguments.folder / f"{name}-{arguments.type}.gguf"
        if arguments.compare:
            print(f"\n## {name} in {arguments.type}", flush=True)
            subprocess.run([sys.executable, ROOT / "bench" / "compare.py", "--model", path,
                            "--server-args=--no-drafts --context-length 10240", *more], check=True)
        elif not path.exists():
            write_quantized(path, arguments.type, name, arguments.llama_quantize)
            print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
