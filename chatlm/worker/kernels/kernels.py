"""The ops that a worker uses, compiled ones or references, and what chooses them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm import __version__
from chatlm.common.config import PAGE_SIZE
from chatlm.common.core import (core_info, decode_core, installed_core, interface_of, kernels_line,
                                refused_isa, torch_installed, unused_core)
from chatlm.common.errors import ConfigError, require_library
from chatlm.common.interface import INTERFACE
from chatlm.common.log import log
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.processes.start import own_threads, threads_per_worker
from chatlm.common.records import record
from chatlm.worker.arrays.kinds import (
    AdapterMatrix, Arrays, Device, Norm, as_kind, mapped_zeros, of_kind)
from chatlm.worker.arrays.packed import dequantize, dequantized, i8_as_q8_0, unpermute_rope
from chatlm.worker.model.batch import RowAdapters, Sequences, token_places
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.experts import Experts, ExpertsBesideDense
from chatlm.worker.model.blocks.extras import LayerInput
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2, ShortConv
from chatlm.worker.model.blocks.mla import Mla
from chatlm.worker.model.blocks.norms import LayerNorm
from chatlm.worker.model.core_sizes import core_sizes, plain_sizes
from chatlm.worker.model.pages import KvType
from chatlm.worker.model.tensors import TILE_ROWS
from chatlm.worker.ops.rows import SampleRow

if TYPE_CHECKING:
    from chatlm.common.answering import Word
    from chatlm.worker.model.batch import Batch
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.transformer import Transformer


class Steps(typing.Protocol):
    """How steps run: EagerSteps here; decode_core has ProgramSteps (threads) and GraphSteps (CUDA graphs)."""

    ahead: bool  # may a step start before the previous one is finished?

    def prepare(self, progress: Callable[[float], None]):
        """Pay one-time costs before the first step; `progress` receives the fraction done."""

    def start(self, batch: Batch, rows: Seq[SampleRow]) -> object:
        """Compute a batch, and draw tokens as `rows` say for each row of logits -> a ticket for `finish`.

        ~i in the batch stands for the token that row i of the step before is still drawing."""
        ...

    def finish(self, ticket) -> list[int]:
        """Wait for the drawn tokens and return them."""
        ...

    def forward(self, batch: Batch) -> Any:
        """Compute a batch while no step is under way -> logits (R, V) float32, valid until the next step."""
        ...


class EagerSteps:
    """Runs a transformer op by op, on any device. `start` computes and draws; `finish` returns the tokens."""

    ahead = False

    def __init__(self, transformer: Transformer):
        self.transformer = transformer
        self.drawn: list[int] = []

    def start(self, batch: Batch, rows: Seq[SampleRow]) -> list[int]:
        batch.token_ids[:] = [self.drawn[~token] if token < 0 else token for token in batch.token_ids]
        logits = self.transformer.forward(batch)
        self.drawn = self.transformer.kernels.sample(logits, rows) if rows else []
        return self.drawn

    def finish(self, ticket: list[int]) -> list[int]:
        return ticket

    def forward(self, batch: Batch):
        return self.transformer.forward(batch)

    def prepare(self, progress: Callable[[float], None]):
        pass  # the first steps are as fast as later ones


class Backend:
    """Computes the steps of a model: here torch, op by op. Those of decode_core have the same attributes."""

    name = "torch/reference"
    row_invariant = False
    quantizes = False
    groups_layers = True
    few_rows_invariant = False  # does a row keep its bits in any step of up to FREE_ROWS that all draw?
    activations: str | None = None  # type of every activation buffer; None: the model's own
    faults: Mapping[str, str] = {}  # compiled op that its reference replaces -> why
    as_stored: Callable | None = None  # loads a GGUF matrix in the file's type; None: all are dequantized
    stored_dtype: str | None = None  # of activations and pages with such matrices; None: float16
    short_floats = ""    # type of keys and values if weights are shorter than float32; "": as activations
    turns = True         # do rotations go by Batch.turns, if the batch has them?
    packs_kv = True      # does it read keys and values of the type q8_0?
    converted: Callable[[Mapping, Mapping], str]  # with as_stored: says which matrices change their type
    held_bytes: Callable[[Seq], int]  # with as_stored: bytes that the tensors of a matrix will take
    join = None          # makes ranks exchange through shared memory; None: torch.distributed is used

    tensors = True       # do its ops take torch's tensors? Else they take numpy's arrays

    def __init__(self, device: str):
        dtype = references().fastest_dtype(device)  # of float weights, if the user names none
        self.dtype = str(dtype).removeprefix("torch.")

    def ops(self, max_tokens: int, max_rows: int, quantize: str | None,
            fine: bool = False) -> dict[str, Callable]:
        return {}  # all ops are references

    def record(self, transformer: Transformer) -> Callable[[Batch], None] | None:
        """A function that runs a batch in place of Transformer.compute, which it may record; or None."""

    def make_steps(self, transformer: Transformer, max_batch: int, context_length: int) -> Steps:
        return EagerSteps(transformer)

    def pause_while(self, word: Word, most_s: float):
        """From now on the op `pause` waits while the word says that answers are written, at most `most_s`."""
        references().pausing.update(word=word, most_s=most_s)

    def pack_adapter(self, matrices: Mapping[str, AdapterMatrix], device: str) -> Any:
        """An adapter in the form that ops read. Its matrices are named after those they change."""
        return {name: AdapterMatrix(*map(references().TorchArrays(device).of, matrix))
                for name, matrix in matrices.items()}


@functools.cache
def references() -> Any:
    """The module of references, which imports torch. ConfigError if torch is not installed."""
    require_library("torch", "computing without decode_core").set_num_threads(own_threads())
    return importlib.import_module("chatlm.worker.ops.references")


def missing_op(*_, **options):
    raise NotImplementedError("no op was chosen")


@record
class Kernels:
    """The op that was chosen for each name. `forward` and the engine use no other ops."""

    embed: Callable = missing_op
    gather_rows: Callable = missing_op
    rms_norm: Callable = missing_op
    layer_norm: Callable = missing_op
    pack: Callable = missing_op
    linear: Callable = missing_op
    experts: Callable = missing_op
    copy: Callable = missing_op
    mix: Callable = missing_op
    gated_add: Callable = missing_op
    look_up: Callable = missing_op
    layer_inputs: Callable = missing_op
    gate_input: Callable = missing_op
    smear: Callable = missing_op
    backout: Callable = missing_op
    softcap: Callable = missing_op
    make_cache: Callable = missing_op
    mean_squares: Callable = missing_op
    norm_qk: Callable = missing_op
    norm_heads: Callable = missing_op
    scale_rows: Callable = missing_op
    clamp: Callable = missing_op
    rope_append: Callable = missing_op
    plan_attention: Callable = missing_op
    paged_attention: Callable = missing_op
    text_attention: Callable = missing_op
    absorb: Callable = missing_op
    append_latents: Callable = missing_op
    by_head: Callable = missing_op
    pause: Callable = missing_op
    short_conv: Callable = missing_op
    delta_rule: Callable = missing_op
    mamba2: Callable = missing_op
    group_squares: Callable = missing_op
    norm_groups: Callable = missing_op
    split_gates: Callable = missing_op
    gate: Callable = missing_op
    sample: Callable = missing_op
    # Only if a model has several ranks:
    # (x, out, residual=None): residual + the sum of all ranks' x -> out
    all_reduce: Callable = None  # pyright: ignore[reportAssignmentType]  as stated above
    # (x, out): all ranks' x concatenated -> out, which may be shorter
    all_gather: Callable = None  # pyright: ignore[reportAssignmentType]  as stated above
    names: Mapping[str, str] = field(default_factory=dict)  # what computes each op, for /stats
    backend: Any = None

    def arrays_on(self, device: Device) -> Arrays:
        """Makes the arrays that the ops take."""
        return references().FOR_BACKENDS["TorchArrays"](device) if self.backend.tensors else Arrays()

    @property
    def pads(self) -> bool:
        """Must a model whose sizes are no multiples of 16 be padded with zeros for them?"""
        return not self.backend.tensors

    def computed(self, model: Model) -> Model:
        """The model that a Transformer of this model computes: itself, or padded."""
        return model.padded() if self.pads else model

    @property
    def row_invariant(self) -> bool:
        """Are a row's bits the same whatever else is in the batch?"""
        return self.backend.row_invariant

    def activation_dtype(self, weights: str | None) -> str:
        """The type of activations that may be short, for matrices of this type; None: of the file's."""
        return weights or self.backend.stored_dtype or "float16"

    def kv_type(self, choice: str, weights: str | None) -> KvType:
        """The type of keys and values with such matrices, if --kv-cache-dtype is `choice`.

        ConfigError if no kernel reads it."""
        own = self.activation_dtype(weights)
        floats = "float16" if self.backend.short_floats == "float16" and own != "float32" else own
        if choice == "q8_0" and not self.backend.packs_kv:
            raise ConfigError(f"--kv-cache-dtype q8_0: {self.backend.name} has no kernels that read it; "
                              "auto, bfloat16 and float32 are possible")
        return KvType(floats if choice in ("auto", "q8_0") else choice, packed=choice == "q8_0")


OPS = tuple(op.name for op in dataclasses.fields(Kernels) if op.default is missing_op)


def load_kernels(device, model: Model | None = None, *, max_tokens=512, max_rows=512, quantize=None,
                 join=None, whole: Model | None = None, fine=False) -> Kernels:
    """Choose each op for a device and a model: decode_core's if it is installed and able, else the reference.

    Steps have at most `max_tokens` tokens and `max_rows` rows of logits. Float weights are quantized to the
    type `quantize`. `fine`: on a CPU, decode_core rounds all activations that quantized weights multiply to
    16 bits. `join(backend)`, if given, makes the ops that exchange with other ranks, and `whole` is then the
    model that the ranks divide. CHAT_SERVER_KERNELS=reference disables decode_core."""
    backend = choose_backend(device, model, whole, True)
    if quantize and not backend.quantizes:
        raise ConfigError(f"--quantize needs decode_core and a CPU; {kernels_line()}")
    ops = backend.ops(max_tokens, max_rows, quantize, fine)
    names = dict.fromkeys(OPS, "torch/reference") | {"sample": "numpy/reference"}
    names |= dict.fromkeys(set(ops) - set(backend.faults), backend.name)
    ops = (references().REFERENCES if backend.tensors else {}) | ops | (join(backend) if join else {})
    return Kernels(**ops, names=names, backend=backend)


def choose_backend(device, model: Model | None, whole: Model | None = None, says_why: bool = False):
    """decode_core's backend if it runs this model on this device, else torch's. Without a model: torch's.

    All stages of a `whole` model get the same. If `says_why`, the log says what is left to torch; one caller
    for each model asks for that."""
    if refused := refused_isa():
        raise ConfigError(refused)
    core = decode_core() if model else None
    if says_why and (reason := unused_core()):
        log.error("%s", reason)
    if model and core is None and not torch_installed():
        raise ConfigError(kernels_line())
    if core and model and (features := not_compiled(whole or model, device) or not_compiled(model, device)):
        if not torch_installed():
            require_library("torch", f"This model has {features}, which decode_core cannot compute; it")
        if says_why:
            log.warning("decode_core has no kernels for %s, which this model needs: torch computes instead",
                        features)
        core = None
    backend = None
    if core and model:
        from chatlm.worker.kernels import devices
        backend = devices.backend_for(core_sizes(model), device, for_decode_core())
    if backend and model and says_why and (ops := left_to_torch(whole or model, device)):
        log.warning("%s has no kernels for %s: torch computes only these", backend.name, " and ".join(ops))
    return backend or Backend(device)


def left_to_torch(model: Model, device) -> list[str]:
    """In words, the ops that torch computes on this device while decode_core computes the others."""
    words = {ShortConv: "short convolution", DeltaRule: "delta rule", Mamba2: "Mamba layer"}
    ops = dict.fromkeys(words[type(mixer)] for mixer in model.mixers if mixer)
    if any(experts.router.kind == "sigmoid" for experts in feeds_of(model, Experts)):
        ops["router of sigmoids"] = None
    routers = [experts.router for experts in feeds_of(model, Experts)]
    if any(router.kind == "softmax" and router.choice_bias for router in routers):
        ops["router with a bias"] = None
    if any(isinstance(attn, Attention) and attn.gates for attn in model.attentions):
        ops["gates of heads"] = None
    if any(isinstance(attn, Mla) and attn.scores.growth for attn in model.attentions):
        ops["scale of queries by their position"] = None
    return list(ops) if Device(device).type != "cpu" else []


class Most(NamedTuple):
    """The largest sizes that decode_core's kernels accept, as its `cpu` and `cuda` halves check them."""

    head_size: int
    group: int          # query heads per KV head
    experts: int
    chosen: int         # experts per token
    vocabulary: int


MOST_ON_CPU = Most(head_size=512, group=16, experts=4096, chosen=64, vocabulary=2**31)
MOST_ON_GPU = Most(head_size=256, group=64, experts=1024, chosen=1024, vocabulary=2**18)


MOST_LATENT = 576  # numbers that a token keeps of latent attention
MOST_LATENT_VALUE = 512  # of which so many are the value; on a GPU


def feeds_of(model: Model, *kinds: type) -> list[Any]:
    """The feed-forward blocks of these kinds, including the experts that all tokens take."""
    feeds = [layer.feed for layer in model.layers if layer.feed]
    feeds += [feed.shared for feed in feeds if isinstance(feed, Experts) and feed.shared]
    feeds += [feed.dense for feed in feeds if isinstance(feed, ExpertsBesideDense)]
    return [feed for feed in feeds if isinstance(feed, kinds)]


def layer_inputs_of(model: Model) -> list[LayerInput]:
    return [extra for layer in model.layers for extra in layer.after if isinstance(extra, LayerInput)]


def not_compiled(model: Model, device="cpu") -> str:
    """In words, what decode_core cannot compute of a model on this device; then torch computes all of it.

    Nothing else is refused: tests/worker/model/test_odd_sizes.py tries every dimension."""
    on_gpu = Device(device).type != "cpu"
    refused = refused_on_gpu(model) if on_gpu else refused_on_cpu(model.padded())
    features = refused_anywhere(model if on_gpu else model.padded(), MOST_ON_GPU if on_gpu else MOST_ON_CPU)
    return " and ".join(feature for feature, needed in (features | refused).items() if needed)


def refused_anywhere(model: Model, most: Most) -> dict[str, bool]:
    attentions = [attn for attn in model.attentions if isinstance(attn, Attention)]
    experts = feeds_of(model, Experts, ExpertsBesideDense)
    return {
        "heads of this size": any(
            attn.head_size % 16 or attn.head_size > most.head_size for attn in attentions),
        "this many query heads per KV head": any(
            attn.heads > most.group * attn.kv_heads for attn in attentions),
        "this many experts": any(
            each.count > most.experts or each.router.chosen > most.chosen for each in experts),
        "vocabulary of this size": model.vocab_size > most.vocabulary,
        "attention whose keys and values differ in width": any(
            attn.value_size != attn.head_size for attn in attentions)}


def refused_on_cpu(model: Model) -> dict[str, bool]:
    """What a CPU cannot compute. The model is padded already."""
    feeds = feeds_of(model, FeedForward, Experts, ExpertsBesideDense)
    experts = feeds_of(model, Experts)
    latents = [attn for attn in model.attentions if isinstance(attn, Mla)]
    return {
        "latent attention of these sizes": any(
            attn.head_size > MOST_LATENT or size % 16 for attn in latents
            for size in (attn.kept, attn.turned, attn.plain, attn.head_values, attn.query_width)),
        "embedding of each layer with a width not a multiple of 16": any(
            extra.size % 16 for extra in layer_inputs_of(model)),
        "width that is not a multiple of 16": model.width % 16 != 0,
        "experts that read a width not a multiple of 16": any(each.latent % 16 for each in experts),
        "delta rule with head sizes that are not multiples of 16": any(
            isinstance(mixer, DeltaRule) and (mixer.key_size % 16 or mixer.value_size % 16)
            for mixer in model.mixers),
        "Mamba layer whose heads or channels are not multiples of 16": any(
            isinstance(mixer, Mamba2) and (mixer.head_size % 16 or mixer.parts[1] % 16)
            for mixer in model.mixers),
        "feed-forward of this width": any(feed.width % TILE_ROWS for feed in feeds)}


ONLY_ON_CPU = ("gelu", "reglu2", "quick_geglu", "gelu_erf", "gelu_tanh", "gelu_quick")  # activations


def refused_on_gpu(model: Model) -> dict[str, bool]:
    attentions = model.attentions
    norms = [norm for layer in model.layers for norm in layer.norms.values()]
    dense = feeds_of(model, FeedForward)
    experts = feeds_of(model, Experts, ExpertsBesideDense)
    latents = [each.latent for each in experts if isinstance(each, Experts)]
    mlas = [attn for attn in attentions if isinstance(attn, Mla)]
    activations = dict.fromkeys(feed.activation for feed in (*dense, *feeds_of(model, Experts)))
    return {
        "latent attention of these sizes on a GPU": any(
            attn.head_size > MOST_LATENT or attn.kept > MOST_LATENT_VALUE or size % 16
            for attn in mlas for size in (attn.kept, attn.turned)),
        "norm of all heads together on a GPU": any(attn.norms and attn.norms.whole for attn in attentions),
        "LayerNorm of heads on a GPU": any(
            isinstance(attn, Attention) and attn.norms and attn.norms.centred for attn in attentions),
        "bounds of queries and keys on a GPU": any(
            isinstance(attn, Attention) and attn.clip for attn in attentions),
        "embedding of each layer on a GPU": bool(layer_inputs_of(model)),
        "scale of experts on a GPU": any(isinstance(each, ExpertsBesideDense) for each in experts),
        "scale of queries by their position on a GPU": any(
            isinstance(attn, Attention) and attn.scores.growth for attn in attentions),
        "experts of this width": bool(experts) and any(
            size % 8 for size in (model.width, *latents, *(each.width for each in experts))),
        "attention of several kinds on a GPU": not uniform(model),
        "LayerNorm on a GPU": any(isinstance(norm, LayerNorm) for norm in (*norms, model.norm)),
        "attention to what comes after a token on a GPU": model.of_texts,
        "router with jitter on a GPU": any(
            each.router.kind == "jitter" for each in experts if isinstance(each, Experts)),
        "learned positions on a GPU": isinstance(model.input, Input) and model.input.positions > 0,
        **{f"{activation} feed-forward on a GPU": activation in ONLY_ON_CPU for activation in activations},
        "feed-forward of this width": bool(experts) and any(feed.width % TILE_ROWS for feed in dense)}


def uniform(model: Model) -> bool:
    """Does every attention layer cache the same sizes, and read no other layer's keys and values?"""
    kinds = {(attn.heads, attn.kv_heads, attn.head_size, attn.value_norm, attn.values_from_keys, attn.source)
             for attn in model.attentions}
    return all(kind[3:] == (False, False, None) for kind in kinds) and len(kinds) <= 1


class ForDecodeCore(SimpleNamespace):
    """Attributes that were not given are looked up in `references`, which imports torch."""

    @property
    def references(self) -> Mapping[str, Callable]:
        return references().REFERENCES

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return references().FOR_BACKENDS[name]
        except KeyError:
            raise AttributeError(name) from None


def for_decode_core() -> ForDecodeCore:
    """The parts of the program that backends use."""
    return ForDecodeCore(
        PAGE_SIZE=PAGE_SIZE, OPS=OPS, as_kind=as_kind, of_kind=of_kind, mapped_zeros=mapped_zeros,
        own_threads=own_threads, token_places=token_places, dequantized=dequantized,
        dequantize=dequantize, unpermute_rope=unpermute_rope, i8_as_q8_0=i8_as_q8_0,
        plain_sizes=plain_sizes, DeltaRule=DeltaRule, Mamba2=Mamba2, Norm=Norm,
        Sequences=Sequences, SampleRow=SampleRow, SamplingParams=SamplingParams,
        RowAdapters=RowAdapters, EagerSteps=EagerSteps, ConfigError=ConfigError)


def machine_report() -> str:
    def line_of(path: str, words: str) -> str:
        with suppress(OSError):
            for line in Path(path).read_text(errors="replace").splitlines():
                if line.startswith(words):
                    return line.partition(":")[2].strip()
        return ""

    theirs = interface_of(installed_core()) or "none"
    info = core_info(core) if (core := decode_core()) else {}
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    isa = " ".join([info.get("isa") or "instructions unknown", *info.get("features", ())])
    cpu = line_of("/proc/cpuinfo", "model name") or os.uname().machine
    return "\n".join((
        f"chat_server {__version__} (interface {INTERFACE}), decode_core (interface {theirs}); "
        f"{kernels_line()}",
        f"{f'torch {torch.__version__}' if torch else 'no torch'}, numpy {numpy.__version__}, "
        f"Python {sys.version.split()[0]}",
        f"CUDA of torch: {torch and torch.version.cuda or 'none'}; "
        f"driver: {line_of('/proc/driver/nvidia/version', 'NVRM') or 'none'}",
        f"{os.uname().sysname}, {cpu}, {isa}, {threads_per_worker(1)} threads"))


def check_main(arguments: Seq[str]) -> int:
    """The role `check`: print a report to paste into an issue.

    Returns 0, or 1 if an op differs from its reference or if decode_core is installed but does not load."""
    print(machine_report(), flush=True)
    if decode_core() is None:
        print("no compiled kernels here, so there is nothing to compare")
        return 1 if unused_core() else 0
    from chatlm.worker.kernels import devices
    say = partial(print, flush=True)
    return 0 if devices.check(for_decode_core(), threads_per_worker(1), say) else 1
