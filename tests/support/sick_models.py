"""Models with one fault each, for the doctor (`check MODEL`): a row of a table is a fault, made in a good tiny model."""

import dataclasses
import functools
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.default_model import fetch_default_model
from chatlm.common.hub.find import resolve_model
from chatlm.worker.doctor.checks import CHECKS
from chatlm.worker.doctor.examine import findings_of, labelled
from chatlm.worker.doctor.examined_model import ExaminedModel
from chatlm.worker.weights.formats.gguf.header import FileHeader
from chatlm.worker.weights.formats.gguf.texts import Texts
from tiny_gguf import gguf_bytes, packed_text, packed_value, random_llama, sentencepiece_metadata, small_gguf_metadata, tensor_info

NUMBERS = {"llama.block_count": 1, "llama.context_length": 2048, "llama.embedding_length": 64, "llama.feed_forward_length": 128,
           "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
           "llama.rope.freq_base": 10000.0}
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}")


class WithBytes(FileHeader):
    """Keeps the bytes of each value, with its type before them."""

    def read(self):
        self.values = []
        super().read()
        self.packed = dict(zip([key for key in self.metadata if not key.startswith("GGUF.")], self.values, strict=True))

    def value(self, kind):
        begin = self.at - 4
        value = super().value(kind)
        self.values.append(bytes(self.buffer[begin:self.at]))
        return value


def metadata_of(path):
    """A GGUF file's metadata, as values that `packed_value` takes."""
    header = FileHeader(Path(path))
    return {key: list(value) if isinstance(value, Texts) else value for key, value in header.metadata.items() if not key.startswith("GGUF.")}


def rewritten(path, changes, tensors=None, more={}):
    """Write a GGUF file again with changed metadata (None: without the key), in place. tensors: name -> its new bytes. more: name ->
    (data, shape, number of its type) of a new or another one; None: without it."""
    path = Path(path)
    header = WithBytes(path)
    metadata = {key: value for key, value in {**header.packed, **changes}.items() if value is not None}
    data, infos = bytearray(), b""
    stored = {name: (bytes(header.buffer[tensor.data_offset:tensor.data_offset + tensor.n_bytes]), tuple(reversed(tensor.shape.tolist())),
                     int(tensor.tensor_type)) for name, tensor in header.tensors.items()} | more
    stored = {name: tensor for name, tensor in stored.items() if tensor}
    for name, (own, shape, kind) in stored.items():
        own = (tensors or {}).get(name, own if isinstance(own, bytes) else own.tobytes())
        infos += tensor_info(name, shape, kind, len(data))
        data += own + bytes(-len(own) % 32)
    for key, value in changes.items():
        if value is not None:
            kind, packed = packed_value(value)
            metadata[key] = struct.pack("<I", kind) + packed
    pairs = b"".join(packed_text(key) + value for key, value in metadata.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(stored), len(metadata)) + pairs + infos
    del header
    whole = head + bytes(-len(head) % 32) + data
    path.unlink()
    path.write_bytes(whole)
    return path


@functools.cache
def small_bytes(path=None):
    own = {key: value for key, value in metadata_of(path or fetch_default_model()).items() if key.startswith("tokenizer.")}
    tensors = random_llama(vocab=len(own["tokenizer.ggml.tokens"]), numbers=NUMBERS)
    return gguf_bytes({"general.architecture": "llama", **NUMBERS, **own}, tensors)


def small_gguf(folder):
    """A llama of one layer with the default model's tokenizer and template."""
    path = Path(folder) / "small.gguf"
    path.write_bytes(small_bytes())
    return path


def pieces_gguf(folder):
    """The same with a small sentencepiece vocabulary, whose texts begin with <s>."""
    own = sentencepiece_metadata() | {"tokenizer.chat_template": INST}
    tensors = random_llama(vocab=len(own["tokenizer.ggml.tokens"]), numbers=NUMBERS)
    path = Path(folder) / "pieces.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama", **NUMBERS, **own}, tensors))
    return path


def chatml_gguf(folder):
    """The same with a small byte-level vocabulary, in which there are ChatML's tokens and another control token."""
    own = small_gguf_metadata("gpt-2")
    tokens, types = own["tokenizer.ggml.tokens"], own["tokenizer.ggml.token_type"]
    more = ["<|im_start|>", "<|im_end|>", "<file_sep>"]
    own |= {"tokenizer.ggml.tokens": tokens + more, "tokenizer.ggml.token_type": types + [3] * len(more), "tokenizer.ggml.eos_token_id": len(tokens) + 1,
            "tokenizer.chat_template": CHATML}
    path = Path(folder) / "chatml.gguf"
    path.write_bytes(gguf_bytes({**own, **NUMBERS}, random_llama(vocab=len(tokens) + len(more), numbers=NUMBERS)))
    return path


def small_folder(folder):
    """A Hugging Face folder of the small model."""
    from safetensors.numpy import save_file
    from chatlm.worker.weights.load import open_model
    path = small_gguf(folder)
    text = open_model(resolve_model(Settings(model=str(path))), Settings()).text
    shapes = {"model.embed_tokens.weight": (49152, 64), "model.norm.weight": (64,)} | {f"model.layers.0.{name}.weight": shape for name, shape in {
        "input_layernorm": (64,), "post_attention_layernorm": (64,), "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128)}.items()}
    target, dice = Path(folder) / "small", numpy.random.default_rng(3)
    target.mkdir()
    save_file({name: (dice.standard_normal(shape) / 8).astype(numpy.float32) for name, shape in shapes.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float32",
        "eos_token_id": 2}))
    (target / "tokenizer.json").write_bytes(text.payload)
    (target / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": text.chat_template}))
    path.unlink()
    return target


class Fault(NamedTuple):
    """mutate: a path in, the path of the sick model out. finds: the names of checks of which one must say so; (): any, or that the
    model is refused."""

    name: str
    make: Callable[[Path], Path]
    mutate: Callable[[Path], Path]
    finds: tuple[str, ...] = ()
    against: Callable[[], Path] | None = None  # its original, if that is given too


def metadata_fault(name, changes, *finds, make=small_gguf):
    """A fault in the metadata: `changes` is the new values, or makes them of the old ones."""
    return Fault(name, make, lambda path: rewritten(path, changes(metadata_of(path)) if callable(changes) else changes), finds)


def other_order(metadata):
    merges = metadata["tokenizer.ggml.merges"]
    return {"tokenizer.ggml.merges": merges[:5000] + merges[5200:5300] + merges[5000:5200] + merges[5300:]}


def of_type(name, kind):
    def changes(metadata):
        types = list(metadata["tokenizer.ggml.token_type"])
        types[metadata["tokenizer.ggml.tokens"].index(name)] = kind
        return {"tokenizer.ggml.token_type": types}
    return changes


def token_twice(metadata):
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[30_000] = tokens[20_000]
    return {"tokenizer.ggml.tokens": tokens}


def edited(file, change):
    """A fault in a folder's JSON file."""
    def mutate(folder):
        path = Path(folder) / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return folder
    return mutate


def template_of(text):
    return {"tokenizer.chat_template": text}


def nanochat(folder):
    shutil.copytree(Path(__file__).parents[1] / "fixtures/nanochat/gen5", Path(folder) / "nanochat")
    return Path(folder) / "nanochat"


def ranks_in_another_order(folder):
    import tiktoken
    path = folder / "tokenizer/tokenizer.pkl"
    encoding = pickle.loads(path.read_bytes())
    ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    ranks[256:] = reversed(ranks[256:])
    path.write_bytes(pickle.dumps(tiktoken.Encoding(
        encoding.name, pat_str=encoding._pat_str, mergeable_ranks={piece: rank for rank, piece in enumerate(ranks)}, special_tokens=encoding._special_tokens)))
    return folder


OF_TEXT = (
    metadata_fault("100 merges moved before 200 others", other_order, "merges", "likeness"),
    metadata_fault("the second half of the merges is missing", lambda old: {"tokenizer.ggml.merges": old["tokenizer.ggml.merges"][:24000]}, "reach"),
    metadata_fault("another pre-tokenizer", {"tokenizer.ggml.pre": "deepseek-coder"}, "likeness", "reach"),
    metadata_fault("no pre-tokenizer", {"tokenizer.ggml.pre": None}, "pre-tokenizer"),
    metadata_fault("no BOS", {"tokenizer.ggml.add_bos_token": False} | template_of(INST.replace("{{ bos_token }}", "")), "template", make=pieces_gguf),
    metadata_fault("BOS twice", template_of("{{ bos_token }}" + INST), "template", make=pieces_gguf),
    metadata_fault("eos is the token that begins turns", {"tokenizer.ggml.eos_token_id": 1}, "template"),
    metadata_fault("eos is an ordinary token", {"tokenizer.ggml.eos_token_id": 260}, "ends"),
    metadata_fault("the end token is typed as ordinary", of_type("<|im_end|>", 1), "ends"),
    metadata_fault("an ordinary word is typed as control", of_type("Ġthe", 3), "added tokens"),
    metadata_fault("a token twice", token_twice, "vocabulary"),
    metadata_fault("an old template without a prompt for answers", template_of(CHATML.partition("{% if")[0]), "template", make=chatml_gguf),
    metadata_fault("a template that drops system messages", template_of(CHATML.replace("%}{{ '<|im", "%}{{ '' if message['role'] == 'system' else '<|im", 1)),
                   "template", make=chatml_gguf),
    metadata_fault("a template that shows the last message twice", template_of(CHATML.replace(
        "{% endfor %}", "{% endfor %}{{ messages[-1]['content'] }}")), "template", make=chatml_gguf),
    metadata_fault("a template that loses results of calls", template_of("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
        "%}{{ '<|im", "%}{% if message.role == 'tool' %}{% continue %}{% endif %}{{ '<|im", 1).replace(
        "+ '<|im_end|>", "+ (message.tool_calls | tojson if message.tool_calls else '') + '<|im_end|>", 1)), "template", make=chatml_gguf),
    metadata_fault("a template that shows no calls", template_of("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML), "template", make=chatml_gguf),
    metadata_fault("another model's template", template_of(INST), "template", make=chatml_gguf),
    metadata_fault("a template whose end token does not end answers", template_of(CHATML.replace("<|im_end|>", "<file_sep>")), "template", make=chatml_gguf),
    Fault("nanochat's ranks in another order", nanochat, ranks_in_another_order, ("merges",)),
    Fault("an eos that is no token", small_folder, edited("tokenizer_config.json", lambda content: content.update(eos_token="<|end|>")), ("ends",)),
    Fault("an added token with another's id", small_folder, edited("tokenizer.json", lambda content: content["added_tokens"].append(
        {**content["added_tokens"][0], "id": 30_000, "content": "<|new|>"})), ("vocabulary",)))


@dataclasses.dataclass
class Diagnosis:
    """What the doctor says of a model: its findings, or why it could not be opened."""

    findings: list
    refused: str = ""

    @property
    def serious(self):
        return [finding for finding in self.findings if finding.severity != "note"]

    def finds(self, fault):
        """By which checks of those that a fault names, or of all; "opening" where the model was refused."""
        names = {finding.check for finding in self.serious} | ({"opening"} if self.refused else set())
        return sorted(names & {*fault.finds, "opening"} if fault.finds else names)


def diagnose(path, only=None, against=None, **settings):
    """Run the checks, or those named, in this process."""
    settings = Settings(model=str(path), **settings)
    try:
        source = resolve_model(settings)
        other = against and resolve_model(dataclasses.replace(settings, model=str(against)))
        examined = ExaminedModel(source, settings, other or None)
        examined.tokenizer
        checks = [check for check in CHECKS if (only is None or check.name in only) and check.needs(examined)]
        return Diagnosis([finding for check in checks for finding in labelled(check.name, findings_of(check, examined))])
    except ConfigError as reason:
        return Diagnosis([], str(reason))
