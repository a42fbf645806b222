"""Models with one fault each in their weights, for the doctor: rows of the table that sick_models.py describes."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy

from chatlm.common.hub.default_model import fetch_default_model
from chatlm.worker.weights.formats.gguf.header import FileHeader
from sick_models import Fault, metadata_of, rewritten, small_folder
from tiny_gguf import gguf_bytes, random_llama, small_gguf_metadata

WIDE = {"llama.block_count": 1, "llama.context_length": 128, "llama.embedding_length": 256, "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0}


def default_copy(folder):
    """The default model, in a file that may change: 30 trained layers, Q4_1."""
    return Path(shutil.copy(fetch_default_model(), Path(folder) / "default.gguf"))


def wide_gguf(folder):
    path = Path(folder) / "wide.gguf"
    path.write_bytes(gguf_bytes({**small_gguf_metadata("gpt-2"), **WIDE}, random_llama(numbers=WIDE)))
    return path


@contextmanager
def bytes_of(path, *names):
    """A GGUF file's tensors (rows, bytes of a row) uint8, to be changed in place."""
    header = FileHeader(Path(path))
    memory = numpy.memmap(path, numpy.uint8, "r+")
    found = [memory[tensor.data_offset:tensor.data_offset + tensor.n_bytes].reshape(int(numpy.prod(tensor.shape[1:])), -1)
             for tensor in map(header.tensors.__getitem__, names)]
    yield found if names[1:] else found[0]
    memory.flush()


def changed(*names):
    """A fault that `change` makes in the bytes of some tensors of the file."""
    def of(change):
        def mutate(path):
            with bytes_of(path, *names) as rows:
                change(*rows if names[1:] else (rows,))
            return path
        return mutate
    return of


def values_of(rows, kind):
    return gguf.dequantize(numpy.ascontiguousarray(rows), kind)


Q4_1, Q8_0, Q2_K = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q2_K


@changed("blk.14.ffn_up.weight")
def scale_and_minimum(rows):
    blocks = rows[100].reshape(-1, 20)
    blocks[:, :4] = blocks[:, [2, 3, 0, 1]]


@changed("blk.14.ffn_gate.weight")
def one_scale(rows):
    blocks = rows[700].reshape(-1, 20)
    blocks[5, :4] = (blocks[5, :4].copy().view(numpy.float16) * numpy.float16(16)).view(numpy.uint8)


@changed("blk.9.ffn_down.weight")
def all_scales(rows):
    blocks = rows.reshape(-1, 20)
    blocks[:, :4] = (blocks[:, :4].copy().view(numpy.float16) * numpy.float16(4)).view(numpy.uint8)


@changed("blk.20.ffn_gate.weight")
def hole(rows):
    rows.reshape(-1)[40_960:45_056] = 0


@changed("blk.7.attn_q.weight")
def turned(rows):
    rows[:] = gguf.quantize(numpy.ascontiguousarray(values_of(rows, Q4_1).T), Q4_1)


@changed("blk.23.attn_output.weight")
def turned_output(rows):
    rows[:] = gguf.quantize(numpy.ascontiguousarray(values_of(rows, Q4_1).T), Q4_1)


@changed("blk.3.attn_k.weight")
def not_a_number(rows):
    rows[17, 40:42] = 0x00, 0x7E


@changed("blk.15.ffn_norm.weight")
def large_norm(rows):
    rows[:] = (rows.copy().view(numpy.float32) * 4).view(numpy.uint8)


@changed("blk.21.attn_v.weight", "blk.22.attn_v.weight")
def copied(first, second):
    second[:] = first


@changed("blk.12.ffn_gate.weight", "blk.12.ffn_up.weight")
def gate_and_up(gate, up):
    gate[:], up[:] = up.copy(), gate.copy()


def tensor_names(path):
    return list(FileHeader(Path(path)).tensors)


def layers_exchanged(path, first=5, second=20):
    for name in tensor_names(path):
        if name.startswith(f"blk.{first}."):
            with bytes_of(path, name, name.replace(f".{first}.", f".{second}.")) as (a, b):
                a[:], b[:] = b.copy(), a.copy()
    return path


def unordered(path):
    """As if the converter had not reordered the rows of q and k for llama.cpp."""
    with bytes_of(path, *(name for name in tensor_names(path) if name.endswith(("attn_q.weight", "attn_k.weight")))) as tensors:
        for rows in tensors:
            heads = rows.reshape(-1, 64, rows.shape[1])
            heads[:] = heads.reshape(-1, 32, 2, rows.shape[1]).swapaxes(1, 2).reshape(heads.shape)
    return path


def other_head(path):
    """A head of its own, whose rows are shifted by 256."""
    data = numpy.array(FileHeader(Path(path)).tensors["token_embd.weight"].data)
    return rewritten(path, {}, more={"output.weight": (numpy.roll(data, 256, 0), (49152, 576), int(Q8_0))})


def two_bit_head(path):
    """A tied head of type Q2_K."""
    vocab = len(metadata_of(path)["tokenizer.ggml.tokens"])
    rows = numpy.random.default_rng(0).integers(0, 256, (vocab, 84), dtype=numpy.uint8)
    rows[:, 80:] = numpy.array([0.01, 0.02], numpy.float16).view(numpy.uint8)
    return rewritten(path, {}, more={"token_embd.weight": (rows, (vocab, 256), int(Q2_K))})


def without(*names, **renamed):
    return lambda path: rewritten(path, {}, more=dict.fromkeys(names))


def extra(path):
    return rewritten(path, {}, more={"blk.3.attn_q_2.weight": (numpy.zeros((576, 4), numpy.float32), (4, 576), 0)})


def untied_file(folder):
    """A lm_head that the config says is the embedding."""
    from safetensors.numpy import load_file, save_file
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = numpy.random.default_rng(9).standard_normal(state["model.embed_tokens.weight"].shape).astype(numpy.float32)
    save_file(state, folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return folder


def short_scaling(path):
    own = "llama.rope.scaling."
    return rewritten(path, {f"{own}type": "linear", f"{own}factor": 2.0, f"{own}original_context_length": 2048})


OF_WEIGHTS = (
    Fault("scale and minimum exchanged in one row", default_copy, scale_and_minimum, ("weights",)),
    Fault("the scale of one block, 16 times as large", default_copy, one_scale, ("weights",)),
    Fault("all scales of a matrix, 4 times as large", default_copy, all_scales, ("weights",)),
    Fault("4 KiB of the file are zeros", default_copy, hole, ("weights",)),
    Fault("query matrix transposed", default_copy, turned, ("weights",)),
    Fault("output matrix transposed", default_copy, turned_output, ("weights",)),
    Fault("a scale is NaN", default_copy, not_a_number, ("weights",)),
    Fault("layers 5 and 20 exchanged", default_copy, layers_exchanged, ("weights",)),
    Fault("a layer's norm, 4 times as large", default_copy, large_norm, ("weights",)),
    Fault("a value matrix copied from the layer before", default_copy, copied, ("weights",)),
    Fault("rows of q and k not reordered", default_copy, unordered, ("weights",)),
    Fault("a head whose rows are shifted", default_copy, other_head, ("head",)),
    Fault("a head besides a tied embedding", small_folder, untied_file, ("head",)),
    Fault("a head of type Q2_K", wide_gguf, two_bit_head, ("types",)),
    Fault("rotary scaling that ends before the context", default_copy, short_scaling, ("rotary scaling",)),
    Fault("a matrix is missing", default_copy, without("blk.11.ffn_up.weight")),
    Fault("a tensor that nobody reads", default_copy, extra),
    Fault("gate and up exchanged, with the original", default_copy, gate_and_up, ("against",), fetch_default_model),
    Fault("another rotary base, with the original", default_copy, lambda path: rewritten(path, {"llama.rope.freq_base": 10000.0}), ("against",),
          fetch_default_model),
)
