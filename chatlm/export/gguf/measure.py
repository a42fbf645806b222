"""Measures importance: a model reads a text, and the input of each product is squared and summed.

The products' inputs are copied into buffers of their own while a step is computed, by an op that is added
before each product. So any backend can do it: decode_core records the copies like all other ops. What experts
read is added up by `chatlm/export/gguf/experts.py`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.common.text.load import open_tokenizer
from chatlm.export.gguf.experts import ExpertLayer, ExpertSums
from chatlm.export.gguf.importance import Importance, SquareSums
from chatlm.worker.arrays.kinds import Device, floats, kind_of
from chatlm.worker.doctor.running import step
from chatlm.worker.memory_plan import plan_model
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ranks.alone import RankAlone
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.formats.gguf.file import readable
from chatlm.worker.weights.formats.gguf.model import GgufModel
from chatlm.worker.weights.formats.nanochat.gguf import gguf_name
from chatlm.worker.weights.load import read_gguf_model
from chatlm.worker.weights.load import open_model

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.arrays.kinds import Norm
    from chatlm.worker.kernels.kernels import Kernels
    from chatlm.worker.weights.loaded.model import LoadedModel

STEP_TOKENS = 128
LEAST_TOKENS = 32   # of a text
CHUNK_TOKENS = 512  # that see each other, unless --context-length says another number
OF_VOCABULARY = "embed", "head"
OTHER_NUMBERS = ("nemotron_h",)  # families of which we count two of a file's layers as one
Progress = Callable[[str, float], None]


class CapturedInput(NamedTuple):
    """What a product reads: a copy of its input, and the norm that the product itself applies."""

    copy: Any         # (most tokens of a step, at least K)
    norm: Norm | None


class CapturedExperts(NamedTuple):
    """What a layer's experts read: their input and the router's logits."""

    mixture: ExpertLayer
    x: CapturedInput
    logits: CapturedInput  # (most tokens of a step, E)


@dataclass
class Capturing:
    """Gives kernels that copy the input of every product before they compute it."""

    names: dict[int, str] = field(default_factory=dict)     # id of a packed matrix -> our name
    captured: dict[str, CapturedInput] = field(default_factory=dict)
    mixtures: dict[str, CapturedExperts] = field(default_factory=dict)  # by the name of their first matrix
    held: list[Any] = field(default_factory=list)           # so that no id is used twice

    def kernels(self, kernels: Kernels, device: Device, max_tokens: int) -> Kernels:
        arrays = kernels.arrays_on(device)

        def pack(name: str, *parts) -> Any:
            weight = kernels.pack(name, *parts)
            self.names[id(weight)] = name
            self.held.append(weight)
            return weight

        def buffer_for(x, norm: Norm | None = None) -> CapturedInput:
            return CapturedInput(arrays.empty((max_tokens, x.shape[1]), kind_of(x)), norm)

        def linear(x, weight, *given, **options):
            name = self.names.get(id(weight))
            if name is not None and name not in OF_VOCABULARY:
                if name not in self.captured:
                    self.captured[name] = buffer_for(x, options.get("norm"))
                kernels.copy(x, out=self.captured[name].copy[:len(x)])
            kernels.linear(x, weight, *given, **options)

        def experts(x, logits, up, down, *given, norm, activation, **options):
            name = self.names[id(up)]
            if name not in self.mixtures:
                bias = options.get("correction_bias")
                routing = {**options, "correction_bias": bias if bias is None else arrays.numpy(bias)}
                mixture = ExpertLayer(name, self.names[id(down)], activation, routing)
                self.mixtures[name] = CapturedExperts(mixture, buffer_for(x, norm), buffer_for(logits))
            captured = self.mixtures[name]
            kernels.copy(x, out=captured.x.copy[:len(x)])
            kernels.copy(logits, out=captured.logits.copy[:len(x)])
            kernels.experts(x, logits, up, down, *given, norm=norm, activation=activation, **options)

        return replace(kernels, pack=pack, linear=linear, experts=experts)


class Measured(NamedTuple):
    """What a model has read."""

    importance: Importance
    tokens: int
    took_s: float
    missing: tuple[str, ...]  # kinds of our matrices that nothing here measures

    def lines(self, output: str) -> Iterator[str]:
        yield (f"{output}: {len(self.importance.tensors)} matrices, {self.tokens:,} tokens in "
               f"{self.took_s:.1f} s ({self.tokens / max(self.took_s, 1e-9):,.0f} a second)")


def measure_importance(source: ModelSource, settings: Settings, text: str, name_of_text: str, *,
                       chunks: int | None = None,
                       progress: Progress = lambda stage, fraction: None) -> Measured:
    """The importance of the columns of a model's matrices while it reads `text`. ConfigError for a model
    that has no such matrices or a text that is too short."""
    if source.kind == "nanogpt":
        raise ConfigError(f"{source.path}: importance is for models that become GGUF files; nanoGPT's do not")
    settings = replace(settings, arithmetic="fine", max_batch=STEP_TOKENS, prefill_chunk=STEP_TOKENS,
                       drafts="none", quantize=None)
    context = settings.context_length
    model = open_model(source, replace(settings, context_length=None), "cpu")
    if model.architecture.of_texts:
        raise ConfigError(f"{source.path}: importance is measured with models that write texts")
    size = min(context or CHUNK_TOKENS, model.context_length)
    pieces = chunks_of(model, text, name_of_text, size)[:chunks]
    tables = names_in_file(model, source, settings)
    capturing = Capturing()
    of_experts = ExpertSums(float_tensors(model, source, settings))
    transformer = prepared(model, settings, size, capturing, progress)
    squares = dict[str, numpy.ndarray]()
    began_s = time.monotonic()
    tokens = 0
    for number, ids in enumerate(pieces):
        for begin in range(0, len(ids), STEP_TOKENS):
            end = min(begin + STEP_TOKENS, len(ids))
            step(transformer, ids, begin, end, [end - begin - 1], whole=True)
            for name, captured in capturing.captured.items():
                read = numpy.square(inputs_of(transformer, captured, end - begin)).sum(0)
                squares[name] = squares.get(name, 0.0) + read
            for mixture, x, logits in capturing.mixtures.values():
                of_experts.add(mixture, inputs_of(transformer, x, end - begin),
                               inputs_of(transformer, logits, end - begin))
        tokens += len(ids)
        progress("measuring importance", (number + 1) / len(pieces))
    of_experts.finish()
    took_s = time.monotonic() - began_s
    sums = {name: SquareSums(read[None], numpy.array([tokens])) for name, read in squares.items()}
    sums |= of_experts.sums
    return Measured(importance_of(sums, tables, name_of_text, len(pieces), size), tokens, took_s,
                    unmeasured(model, sums))


def float_tensors(model: LoadedModel, source: ModelSource, settings: Settings) -> Mapping[str, Any]:
    """The tensors of a model with experts, which become float32 when they are read; none of another model."""
    if not any(name.rpartition(".")[2].startswith("expert_") for name in model.architecture.tensors()):
        return {}
    exact = replace(settings, context_length=None, dtype="float32")
    return open_model(source, exact, "cpu").tensors


def chunks_of(model: LoadedModel, text: str, name: str, size: int) -> list[list[int]]:
    """The text as runs of `size` tokens. As llama-imatrix does it, each begins with the token that begins
    texts, if the model has one, and an incomplete run at the end is left out."""
    ids = [*open_tokenizer(model.text).encode(text)]
    begin = model.text.bos_token if model.text.add_bos else None
    if begin is not None:
        ids = [begin, *ids]
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(f"-f {name}: the text has {len(ids)} tokens; give at least {LEAST_TOKENS}, and for "
                          "a good file 50,000")
    if len(ids) < size:
        return [ids]
    found = []
    for at in range(0, len(ids) - size + 1, size):
        piece = ids[at:at + size]
        if begin is not None:
            piece[0] = begin
        found.append(piece)
    return found


def prepared(model: LoadedModel, settings: Settings, tokens: int, capturing: Capturing,
             progress: Progress) -> Transformer:
    """The model, ready for one text of so many tokens."""
    device = Device("cpu")
    plan = plan_model(model, model.architecture, settings, device, RankAlone())
    num_pages = -(-tokens // PAGE_SIZE) * max(len(plan.groups.windows), 1)
    kernels = capturing.kernels(plan.kernels, device, plan.max_tokens)
    return Transformer(model.architecture, model.tensors, kernels, dtype=model.dtype, groups=plan.groups,
                       kv=plan.memory.kv, num_pages=num_pages, num_slots=2, max_tokens=plan.max_tokens,
                       max_rows=plan.max_rows, progress=progress)


def inputs_of(transformer: Transformer, captured: CapturedInput, count: int) -> numpy.ndarray:
    """float64 (count, C): what a product has read of the last step's `count` tokens, after the norm."""
    x = floats(transformer.arrays.numpy(captured.copy))[:count].astype(numpy.float64)
    norm = captured.norm
    if norm is None:
        return x
    x = x / numpy.sqrt(numpy.square(x).mean(1, keepdims=True) + norm.eps)
    if norm.weight is not None:
        weight = floats(transformer.arrays.numpy(norm.weight)).astype(numpy.float64)
        x[:, :len(weight)] *= weight
    return x


def stored_tensors(source: ModelSource, settings: Settings) -> Mapping[str, Any]:
    """The tensors of a GGUF file (GgufTensor), by the names that the reader of its family gives."""
    with readable(source.path):
        model = read_gguf_model(source, settings)
    return getattr(model, "stored" if isinstance(model, GgufModel) else "state")


def names_in_file(model: LoadedModel, source: ModelSource, settings: Settings) -> dict[str, dict[str, int]]:
    """Our matrix -> its tensors in a GGUF file, and how many columns each has. ConfigError for folders whose
    layers have other numbers in a file."""
    if source.kind != "gguf" and model.family in OTHER_NUMBERS:
        raise ConfigError(f"{source.path}: a file of this family numbers the layers otherwise than this "
                          "program; measure the GGUF file that llama.cpp's converter makes of the folder")
    adaptable = model.adaptable
    assert adaptable is not None
    found = {}
    stored = stored_tensors(source, settings) if source.kind == "gguf" else {}
    for ours, (shape, theirs) in adaptable.sources.items():
        if len(shape) != 2:
            continue
        if source.kind == "gguf":  # a family's reader may give a tensor another name, or cut it
            found[ours] = {stored[name].name: sizes[-1] for name, sizes in theirs.items()}
        elif source.kind == "nanochat":
            found[ours] = {gguf_name(name): sizes[-1] for name, sizes in theirs.items()}
        else:
            found[ours] = {name: shape[-1] for name in converters_names(model, ours)}
    return found


def converters_names(model: LoadedModel, ours: str) -> Seq[str]:
    """What llama.cpp's converter calls the tensors of a folder's matrix; () where its columns are in another
    order there."""
    layer, _, part = ours.rpartition(".")
    row = FAMILIES.get(model.family)
    if row is None or part.startswith("mix_"):
        return ()
    found = []
    for name in row.gguf_names.get(part, ()):
        if name.count("{}") > 1:  # gates and ups of each expert, which the converter leaves together
            name = re.sub(r"_(gate|up)_exps\.{}\.", "_gate_up_exps.", name)
        found.append(name.format(layer))
    return found


def importance_of(sums: Mapping[str, SquareSums], tables: Mapping[str, Mapping[str, int]], dataset: str,
                  chunks: int, size: int) -> Importance:
    tensors = {}
    for ours, total in sums.items():
        for name, columns in tables.get(ours, {}).items():
            own = total.squares[:, :columns].astype(numpy.float32)
            tensors[name] = SquareSums(own, total.counts.astype(numpy.float32))
    if not tensors:
        raise ConfigError("none of the model's matrices can be measured")
    return Importance(tensors, (dataset,), chunks, size)


def unmeasured(model: LoadedModel, sums: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of the model's matrices that no product of this program reads alone."""
    kinds = set()
    for name, tensor in model.architecture.tensors().items():
        part = name.rpartition(".")[2]
        is_matrix = tensor.packed and tensor.columns is not None
        if is_matrix and name not in sums and part not in OF_VOCABULARY:
            kinds.add(part)
    if kinds:
        log.warning("importance of these matrices is not measured: %s", ", ".join(sorted(kinds)))
    return tuple(sorted(kinds))
