"""Tiny GGUF files and metadata for tests."""

import random
import struct
from functools import cache

import gguf
import numpy


# The bytes in the order of a vocabulary: those that have a letter of their own, and the rest
OWN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
LETTERS = [*OWN, *(byte for byte in range(256) if byte not in OWN)]


def letter_of(byte):
    """The letter that stands for a byte in vocabularies like GPT-2's."""
    return chr(byte if byte in OWN else 256 + LETTERS.index(byte) - len(OWN))


def small_gguf_metadata(pre, model="gpt2", **more):
    """A vocabulary of bytes, a few merges, digits and one special token, as GGUF metadata."""
    letters = [letter_of(byte) for byte in LETTERS]
    merges = ["h e", "l l", "he ll", "hell o", "1 2", "12 3", "Ġ Ġ", "Ġ hello", "' s", "Ċ Ċ", "Ġ 1", "A B"]
    tokens = letters + ["".join(merge.split()) for merge in merges] + ["A" + "BC", "<|end|>"]
    return {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
            "tokenizer.ggml.eos_token_id": len(tokens) - 1, "general.architecture": "llama", **more}


def sentencepiece_metadata():
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [2, 3, 3] + [6] * 256
    words = ["▁", "e", "t", "o", "h", "l", "w", "r", "d", "s", "<", "/", ">", "/s", "</", "s>", "he", "ll", "▁he", "hell", "llo",
             "▁hell", "▁hello", "hello", "▁w", "or", "ld", "▁wor", "▁world", "▁▁", "日", "本", "日本"]
    scores = [0.0] * len(pieces) + [-1.0 - i for i in random.Random(5).sample(range(len(words)), len(words))]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces + words, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types + [1] * len(words), "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}


def write_gguf(path, tensors, numbers, metadata=None, **options):
    """`tensors` is name -> array, or (raw bytes as uint8 rows, type); `numbers` are the llama.* metadata."""
    writer = gguf.GGUFWriter(path, (metadata or {}).get("general.architecture", "llama"), **options)
    for key, value in {**numbers, **(metadata or small_gguf_metadata("gpt-2"))}.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, numpy.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_NUMBERS = {"llama.block_count": 1, "llama.context_length": 128, "llama.embedding_length": 256,
                 "llama.feed_forward_length": 512, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
                 "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0}


def llama_shapes(vocab, numbers=LLAMA_NUMBERS):
    """The tensors of a llama GGUF (rows, columns), head tied."""
    width, ffn = numbers["llama.embedding_length"], numbers["llama.feed_forward_length"]
    size = numbers.get("llama.attention.key_length", width // numbers["llama.attention.head_count"])
    query, key = size * numbers["llama.attention.head_count"], size * numbers["llama.attention.head_count_kv"]
    shapes = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    for layer in range(numbers["llama.block_count"]):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in {
            "attn_norm": (width,), "attn_q": (query, width), "attn_k": (key, width), "attn_v": (key, width),
            "attn_output": (width, query), "ffn_norm": (width,), "ffn_gate": (ffn, width), "ffn_up": (ffn, width),
            "ffn_down": (width, ffn)}.items()}
    return shapes


def random_llama(seed=0, vocab=None, numbers=LLAMA_NUMBERS):
    """Random float32 tensors of a llama GGUF, which the caller may change."""
    vocab = vocab or len(small_gguf_metadata("gpt-2")["tokenizer.ggml.tokens"])
    return {name: tensor.copy() for name, tensor in random_tensors(seed, tuple(llama_shapes(vocab, numbers).items())).items()}


@cache
def random_tensors(seed, shapes):
    dice = numpy.random.default_rng(seed)
    return {name: (dice.standard_normal(shape) / 16).astype(numpy.float32) for name, shape in shapes}


def packed_text(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def packed_value(value):
    """(GGUF's number for a value's type, its bytes); also for what no writer makes: empty lists, lists of
    lists."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        types = (4, "<I", 0, 2**32), (5, "<i", -2**31, 0), (10, "<Q", 0, 2**64), (11, "<q", -2**63, 0)
        return next((kind, struct.pack(form, value)) for kind, form, low, high in types if low <= value < high)
    if isinstance(value, float):
        wide = 3.4e38 < abs(value) < float("inf")
        return (12, struct.pack("<d", value)) if wide else (6, struct.pack("<f", value))
    if isinstance(value, (str, bytes)):
        return 8, packed_text(value)
    if value and {*map(type, value)} == {str}:
        return 9, struct.pack("<IQ", 8, len(value)) + b"".join([struct.pack("<Q", len(data)) + data for data in map(str.encode, value)])
    items = [packed_value(item) for item in value]
    assert len({kind for kind, _ in items}) <= 1, "an array has values of one type"
    header = struct.pack("<IQ", items[0][0] if items else 8, len(items))
    return 9, header + b"".join(data for _, data in items)


def tensor_info(name, shape, kind, offset):
    """The entry of a tensor in a GGUF's table; shape is (rows, columns)."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return packed_text(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf_bytes(metadata, tensors, infos=None, keys=None, tensor_count=None, key_count=None):
    """A GGUF file, valid or not, with any metadata and with `tensors`, float32 arrays.

    `infos` (name -> the bytes of a `tensor_info`) replaces entries of the table, or adds some without a
    tensor. `keys` is more metadata, already packed.
    """
    told, data = {}, b""
    for name, tensor in tensors.items():
        told[name] = tensor_info(name, tensor.shape, 0, len(data))
        data += tensor.tobytes() + bytes(-tensor.nbytes % 32)
    told |= infos or {}
    pairs = [packed_text(key) + struct.pack("<I", kind) + packed
             for key, value in metadata.items() for kind, packed in [packed_value(value)]] + [keys or b""]
    tensor_count = len(told) if tensor_count is None else tensor_count
    key_count = len(metadata) + bool(keys) if key_count is None else key_count
    header = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + b"".join(pairs) + b"".join(told.values())
    return header + bytes(-len(header) % 32) + data
