"""`export_gguf`: a model becomes one GGUF file of a type, by the rules of llama-quantize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

import numpy

from chatlm import __version__
from chatlm.common.errors import ConfigError, shown, visible
from chatlm.common.log import log
from chatlm.common.new_files import refuse_inputs
from chatlm.common.sizes import shown_bytes
from chatlm.export.gguf import encoding
from chatlm.export.gguf.importance import Importance, read_importance
from chatlm.export.gguf.mixes import EMBEDDINGS, FLOATS, NEED_IMPORTANCE, Mix, TypeRules, mix_of
from chatlm.export.gguf.packers import pack
from chatlm.export.gguf.sources import written_model
from chatlm.export.gguf.unfinished import CHANGED, UnfinishedFile, digest_of
from chatlm.export.gguf.export_model import ExportModel, ExportTensor
from chatlm.worker.weights.formats.gguf.file_types import NUMBERS

if TYPE_CHECKING:
    from chatlm.common.messages.requests import ModelSource

AT_ONCE = 1 << 17        # weights that a thread packs at once: their arrays stay in its cache
QUANTIZATION_VERSION = 2
Progress = Callable[[str, float], None]


class ExportResult(NamedTuple):
    """What was written."""

    path: Path
    n_bytes: int
    weights: int
    types: dict[str, int]  # how many tensors have each type
    without: int           # matrices of which the importance file says nothing

    def lines(self) -> Iterator[str]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.types.items())
        bits = 8 * self.n_bytes / max(self.weights, 1)
        yield (f"{visible(str(self.path))}: {shown_bytes(self.n_bytes)}, {bits:.2f} bits for each of "
               f"{self.weights / 1e6:,.1f} million weights ({kinds})")


def export_gguf(source: ModelSource, output: Path, *, type: str, imatrix: Path | None = None,
                progress: Progress = lambda stage, fraction: None, threads: int = 1,
                softcap: float | None = None) -> ExportResult:
    """Write the model to `output` as a file of this type. The file appears once it is complete; after a kill
    the same call goes on. ConfigError for whatever is wrong with the model, the type or the disk."""
    name, mix = mix_of(type)
    importance = read_importance(imatrix) if imatrix else None
    model = written_model(source, softcap)
    refuse_inputs(output, [*model.files, *([imatrix] if imatrix else [])])
    if model.is_quantized and mix.is_quantized:
        log.warning("%s is quantized already: what it has lost stays lost; make the file of the original if "
                    "you have it", source.name)
    rules = TypeRules(mix, model.shape, importance is not None)
    types = rules.types_of(tensor.matrix for tensor in model.tensors)
    packing = Quantizer(model, types, mix, importance)
    packing.refuse_missing_importance(name)
    pairs = metadata_of(model, name, importance)
    layout = encoding.layout_of(
        pairs, [(tensor.matrix.name, tensor.matrix.sizes, types[tensor.matrix.name])
                for tensor in model.tensors])
    stamps = model.stamps()
    job = digest_of(__version__, stamps, name, softcap, importance_stamp(imatrix), layout.size)
    file = UnfinishedFile(output, job)
    try:
        file.reserve(layout.size)
        with ThreadPoolExecutor(threads) as pool:
            write_tensors(file, layout, packing, pool, threads, progress)
        if model.has_changed(stamps):
            raise ConfigError(f"{CHANGED}; {visible(str(output))} is not complete")
        file.finish()
    finally:
        file.close()
    weights = sum(tensor.columns * tensor.count for tensor in model.tensors)
    return ExportResult(output, layout.size, weights, dict(Counter(types.values()).most_common()),
                  packing.without_importance())


def importance_stamp(path: Path | None) -> tuple:
    if path is None:
        return ()
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def metadata_of(model: ExportModel, type: str, importance: Importance | None) -> dict[str, encoding.Value]:
    pairs = dict(model.metadata)
    pairs["general.quantization_version"] = encoding.of_number(QUANTIZATION_VERSION)
    pairs["general.file_type"] = encoding.of_number(NUMBERS[type])
    if importance is not None:
        pairs["quantize.imatrix.file"] = encoding.of_text(importance.path.name if importance.path else "")
        if importance.datasets:
            pairs["quantize.imatrix.dataset"] = encoding.of_text(importance.datasets[0])
        pairs["quantize.imatrix.entries_count"] = encoding.of_number(len(importance.tensors))
        pairs["quantize.imatrix.chunks_count"] = encoding.of_number(importance.chunks)
    return pairs


@dataclass(frozen=True)
class Quantizer:
    """How each tensor of a model becomes bytes of its new type."""

    model: ExportModel
    types: dict[str, str]
    mix: Mix
    importance: Importance | None

    def importance_of(self, tensor: ExportTensor) -> numpy.ndarray | None:
        """(E, K), or None. ConfigError if the file of importance is of another model."""
        if self.importance is None or self.types[tensor.matrix.name] in FLOATS:
            return None
        return self.importance.of(tensor.matrix.name, tensor.matrix.sizes)

    def refuse_missing_importance(self, name: str):
        """ConfigError if the type needs the importance of all columns and has not got it."""
        for tensor in self.model.tensors:
            weights = self.importance_of(tensor)  # a file of another model is refused before work begins
            matrix = tensor.matrix
            kind = self.types[matrix.name]
            is_of_vocabulary = matrix.name in (*EMBEDDINGS, "output.weight")
            is_needed = kind in NEED_IMPORTANCE or kind == "Q2_K" and name == "Q2_K_S"
            if is_needed and not is_of_vocabulary and weights is None and kind != matrix.kind:
                lack = f", which has none of {shown(matrix.name)}" if self.importance else ""
                raise ConfigError(f"--type {name} needs --imatrix{lack}; `imatrix MODEL -f TEXT -o FILE` "
                                  "measures it, or take Q2_K or IQ3_S")
        if self.importance is not None and self.mix.is_quantized:
            names = {tensor.matrix.name for tensor in self.model.tensors}
            if not names & self.importance.tensors.keys():
                raise ConfigError("--imatrix: it is of another model: none of its tensors is in this one")

    def without_importance(self) -> int:
        if self.importance is None:
            return 0
        quantized = [tensor for tensor in self.model.tensors
                     if self.types[tensor.matrix.name] not in FLOATS]
        return sum(self.importance_of(tensor) is None for tensor in quantized)

    def chunks(self, tensor: ExportTensor) -> Iterator[tuple[int, int]]:
        """Runs of rows, none of which crosses from one matrix into the next."""
        step = max(AT_ONCE // tensor.columns, 1)
        rows = tensor.rows_of_matrix
        for first in range(0, tensor.count, rows):
            for begin in range(first, first + rows, step):
                yield begin, min(begin + step, first + rows)

    def packed(self, tensor: ExportTensor, importance: numpy.ndarray | None, begin: int,
               end: int) -> numpy.ndarray:
        """The bytes of some rows. ConfigError if a value is not finite."""
        kind = self.types[tensor.matrix.name]
        if kind == tensor.matrix.kind and tensor.raw:
            return tensor.raw(begin, end)
        values = tensor.rows(begin, end)
        if not numpy.isfinite(values).all():
            raise ConfigError(f"{shown(tensor.matrix.name)} has values that are not finite, such as NaN; "
                              "`check MODEL` says where")
        of_matrix = None
        if importance is not None:
            of_matrix = importance[begin // tensor.rows_of_matrix]
        return pack(kind, numpy.ascontiguousarray(values), of_matrix)


def write_tensors(file: UnfinishedFile, layout: encoding.GgufLayout, packing: Quantizer,
                  pool: ThreadPoolExecutor, threads: int, progress: Progress):
    """Write the header and every tensor that is not in the file yet. Few rows are in memory at once."""
    if not file.pieces:
        file.write(layout.header)
        file.end_piece()
    for place, tensor in islice(zip(layout.places, packing.model.tensors), file.pieces - 1, None):
        file.write(bytes(layout.begin_of(place) - file.at))
        importance = packing.importance_of(tensor)
        waiting = []
        for begin, end in packing.chunks(tensor):
            waiting.append(pool.submit(packing.packed, tensor, importance, begin, end))
            if len(waiting) > 2 * threads:
                file.write(waiting.pop(0).result())
                progress(f"writing {place.name}", file.at / layout.size)
        for chunk in waiting:
            file.write(chunk.result())
        file.end_piece()
        progress(f"writing {place.name}", file.at / layout.size)
    file.write(bytes(layout.size - file.at))
