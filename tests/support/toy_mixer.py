"""A family with a kind of layer that the program does not have: a leaky average of what came before.

All of it is here and in toy_mixer.cpp: the block, what files call its tensors, the family, and the op. A test
puts the family into the table."""

import ctypes
import functools
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from chatlm.worker.model.blocks.axes import Run, matrix, vector
from chatlm.worker.model.blocks.feed_forward import columns_of
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import Mixer, buffers_of, run
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.families.family import Family
from chatlm.worker.weights.formats.folder.description import described_blocks
from chatlm.worker.weights.formats.sources import file_shapes, tensor_sources
from families import write_tokenizer

CONFIG = {"model_type": "toy", "vocab_size": 272, "hidden_size": 48, "intermediate_size": 64,
          "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
          "max_position_embeddings": 512, "layer_types": ["leak", "full_attention", "leak"]}
COMPILER = "g++", "-O2", "-ffp-contract=off", "-shared", "-fPIC"


@functools.cache
def kernel():
    """The compiled op."""
    library = Path(tempfile.mkdtemp()) / "toy_mixer.so"
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run([*COMPILER, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).leak


def as_argument(value):
    """What C++ gets of a tensor, of a number, or of several numbers."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else (ctypes.c_int64 * len(value))(*value)


@dataclass(frozen=True)
class Leak(Mixer):
    """mix_out h, where h_t = d * h_{t-1} + (1 - d) * (mix_in x)_t and d is `decay`. Its state is h."""

    title = "leaky average"
    channels: int

    def tensors(self, C):
        own = Run(self.channels, of="channels")
        return {"mix_in": matrix((own,), C, adapted=True), "decay": vector((own,)),
                "mix_out": matrix(C, (own,), adapted=True)}

    def states(self, C):
        return ((self.channels,),)

    def scratch(self, C):
        return buffers_of((self.channels, self.channels))

    def compute(self, s, read, to):
        run(s, read, (self.channels, self.channels), self.mix, to)

    def mix(self, s, x, out):
        sequences = s.inputs.sequences
        rows, slots = zip(*sequences.writes) if sequences.writes else ((), ())
        values = (x, x.stride(0), s.w["decay"], s.states[0], out, out.stride(0), self.channels,
                  sequences.starts, sequences.firsts, sequences.reads, len(sequences.firsts),
                  rows, slots, len(rows))
        kernel()(*map(as_argument, values))

    def divided(self, rank, tp, block):
        return {"channels": columns_of(self.channels, rank, tp, block)}

    def of_rank(self, divided):
        return Leak(len(divided["channels"]))


def toy(facts):
    """Llama's layers, some of which average instead of attending."""
    norm = RmsNorm(facts.eps)
    layers = []
    for number, kind in enumerate(facts.kinds):
        mixer = Leak(facts.width) if kind == "leak" else facts.attention(number)
        layers.append(Layer(mixer, facts.feed(number), norm, norm))
    return facts.decoder(layers, norm)


ROW = Family("Toy", {"layer_types": None}, toy, {
    ours: (f"model.layers.{{}}.leak.{theirs}",) for ours, theirs in (
        ("mix_in", "in_proj.weight"), ("decay", "decay"), ("mix_out", "out_proj.weight"))}, kinds=("leak",))


def write_model(folder):
    """A folder with small random weights, once the family is in the table. -> its tensors"""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    _, model = described_blocks(folder / "config.json", CONFIG, None)
    dice = torch.Generator().manual_seed(3)
    shapes = file_shapes(tensor_sources(model, ROW.all_tensors, model.vocab_size))
    tensors = {name: torch.randn(shape, generator=dice) * (0.25 if len(shape) > 1 else 1.0)
               for name, shape in shapes.items()}
    tensors |= {name: tensor.sigmoid() for name, tensor in tensors.items() if name.endswith("decay")}
    save_file(tensors, folder / "model.safetensors")
    return tensors
