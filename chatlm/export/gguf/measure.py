"""Measures importance: a model reads a text, and the input of each product is squared and summed.

The products' inputs are copied into buffers of their own while a step is computed, by an op that is added
before each product. So any backend can do it: decode_core records the copies like all other ops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.common.text.load import open_tokenizer
from chatlm.export.gguf.importance import Importance, Sums
from chatlm.worker.arrays.kinds import Device, floats, kind_of
from chatlm.worker.doctor.running import step
from chatlm.worker.memory_plan import plan_model
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ranks.ranks import RankAlone
from chatlm.worker.weights.families import FAMILIES
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.nanochat_gguf import gguf_name

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.arrays.kinds import Norm
    from chatlm.worker.model.kernels import Kernels
    from chatlm.worker.weights.rules import LoadedModel

STEP_TOKENS = 128
LEAST_TOKENS = 32   # of a text
CHUNK_TOKENS = 512  # that see each other, unless --context-length says another number
OF_VOCABULARY = "embed", "head"
Progress = Callable[[str, float], None]


class Captured(NamedTuple):
    """What a product reads: a copy of its input, and the norm that the product itself applies."""

    copy: Any         # (most tokens of a step, at least K)
    norm: Norm | None


@dataclass
class Capturing:
    """Gives kernels that copy the input of every product before they compute it."""

    names: dict[int, str] = field(default_factory=dict)     # id of a packed matrix -> our name
    captured: dict[str, Captured] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)           # so that no id is used twice

    def kernels(self, kernels: Kernels, device: Device, max_tokens: int) -> Kernels:
        arrays = kernels.arrays_on(device)

        def pack(name: str, *parts) -> Any:
            weight = kernels.pack(name, *parts)
            self.names[id(weight)] = name
            self.held.append(weight)
            return weight

        def linear(x, weight, *given, **options):
            name = self.names.get(id(weight))
            if name is not None and name not in OF_VOCABULARY:
                if name not in self.captured:
                    copy = arrays.empty((max_tokens, x.shape[1]), kind_of(x))
                    self.captured[name] = Captured(copy, options.get("norm"))
                kernels.copy(x, out=self.captured[name].copy[:len(x)])
            kernels.linear(x, weight, *given, **options)

        return replace(kernels, pack=pack, linear=linear)


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
    tables = names_in_file(model, source)
    capturing = Capturing()
    transformer = prepared(model, settings, size, capturing, progress)
    sums = dict[str, Any]()
    began_s = time.monotonic()
    tokens = 0
    for number, ids in enumerate(pieces):
        for begin in range(0, len(ids), STEP_TOKENS):
            end = min(begin + STEP_TOKENS, len(ids))
            step(transformer, ids, begin, end, [end - begin - 1], whole=True)
            for name, captured in capturing.captured.items():
                sums[name] = sums.get(name, 0.0) + squares_of(transformer, captured, end - begin)
        tokens += len(ids)
        progress("measuring importance", (number + 1) / len(pieces))
    took_s = time.monotonic() - began_s
    return Measured(importance_of(sums, tables, tokens, name_of_text, len(pieces), size), tokens, took_s,
                    unmeasured(model, sums))


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


def squares_of(transformer: Transformer, captured: Captured, count: int) -> numpy.ndarray:
    """float64 (C,): the squares of what a product has read in the last step, summed over `count` tokens."""
    x = floats(transformer.arrays.numpy(captured.copy))[:count].astype(numpy.float64)
    norm = captured.norm
    if norm is None:
        return numpy.square(x).sum(0)
    squares = numpy.square(x)
    means = squares.mean(1, keepdims=True) + norm.eps
    total = (squares / means).sum(0)
    if norm.weight is None:
        return total
    weight = floats(transformer.arrays.numpy(norm.weight)).astype(numpy.float64)
    total[:len(weight)] *= numpy.square(weight)
    return total


def names_in_file(model: LoadedModel, source: ModelSource) -> dict[str, dict[str, int]]:
    """Our matrix -> its tensors in a GGUF file, and how many columns each has."""
    adaptable = model.adaptable
    assert adaptable is not None
    found = {}
    for ours, (shape, theirs) in adaptable.sources.items():
        if len(shape) != 2:
            continue
        if source.kind == "gguf":
            found[ours] = {name: sizes[-1] for name, sizes in theirs.items()}
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
    return [name.format(layer) for name in row.gguf_names.get(part, ())]


def importance_of(sums: Mapping[str, Any], tables: Mapping[str, Mapping[str, int]], tokens: int, dataset: str,
                  chunks: int, size: int) -> Importance:
    tensors = {}
    for ours, squares in sums.items():
        for name, columns in tables.get(ours, {}).items():
            own = numpy.asarray(squares)[None, :columns].astype(numpy.float32)
            tensors[name] = Sums(own, numpy.array([tokens], numpy.float32))
    if not tensors:
        raise ConfigError("none of the model's matrices can be measured")
    return Importance(tensors, (dataset,), chunks, size)


def unmeasured(model: LoadedModel, sums: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of the model's matrices that no product of this program reads alone."""
    kinds = set()
    for name, tensor in model.architecture.tensors().items():
        part = name.rpartition(".")[2]
        if tensor.packed and name not in sums and part not in OF_VOCABULARY:
            kinds.add(part)
    if kinds:
        log.warning("importance of these matrices is not measured: %s", ", ".join(sorted(kinds)))
    return tuple(sorted(kinds))
