"""A model's steps on a CPU. `Transformer.compute` is recorded once as a Program, which compiled threads then
run."""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import ConfigError
from chatlm.common.processes.start import own_threads
from chatlm.worker.arrays.kinds import mapped_zeros, of_kind
from chatlm.worker.kernels.kernels import OPS
from chatlm.worker.kernels.library import _core
from chatlm.worker.kernels.program import Program
from chatlm.worker.kernels.ranks import Ranks
from chatlm.worker.kernels.sampling import Sampler, batch_of
from chatlm.worker.kernels.tiles import KINDS, Arena, Matrix, multiply
from chatlm.worker.kernels.weights import as_stored, converted, held_bytes, pack, tile_row_bytes

if TYPE_CHECKING:
    from chatlm.common.answering import AnswerLease
    from chatlm.worker.arrays.kinds import AdapterMatrix
    from chatlm.worker.kernels.sampling import SampleBatch
    from chatlm.worker.model.batch import Batch
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.pages import PageLayout
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ops.rows import SampleRow


@functools.cache
def slower_than_torch(width: int) -> str:
    """Why torch should compute a model of this width; "" if decode_core should.

    decode_core computes if the CPU has AVX2 or AVX-512, or if DECODE_CORE_ISA names what to use. On older x86
    its kernels are portable C++, and those of aarch64 were never compared with torch. There, if torch is
    installed, a measurement of about 0.2 s decides: the products of an answer of 100 tokens after a prompt of
    64, with Q8_0 tiles against the faster of torch's float32 and bfloat16.
    """
    uncertain = _core.isa() in ("portable", "neon", "dotprod", "i8mm")
    if not uncertain or os.environ.get("DECODE_CORE_ISA") or not importlib.util.find_spec("torch"):
        return ""
    ours, theirs = answer_seconds(width)
    if ours <= theirs:
        return ""
    return f"decode_core's {_core.isa()} kernels take {ours / theirs:.1f} times as long here"


def answer_seconds(width: int, rows: int = 1024) -> tuple[float, float]:
    """Seconds that decode_core and torch take for the products with one (rows, width) matrix in such an
    answer."""
    def seconds(product: Callable, x: Any) -> float:
        product(x)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            product(x)
            times.append(time.perf_counter() - begin)
        return min(times)

    import torch
    weights = torch.randn(rows, width)
    matrix = Matrix(Arena(1 << 20), "q8_0", rows, -(-width // 32) * 32)
    matrix.fill(torch.nn.functional.pad(weights, (0, matrix.columns - width)), "f32")

    def tiles(x: torch.Tensor) -> None:
        multiply(x, matrix, out=torch.empty(len(x), rows))

    products: list[tuple[Callable, torch.dtype, int]] = [(tiles, torch.float32, matrix.columns)]
    for dtype in (torch.float32, torch.bfloat16):
        products.append((functools.partial(torch.nn.functional.linear,
                                           weight=weights.to(dtype)), dtype, width))
    prompt, token = (
        [seconds(product, torch.randn(count, columns, dtype=dtype)) for product, dtype, columns in products]
        for count in (64, 1))
    ours, *theirs = (first + 100 * later for first, later in zip(prompt, token))
    return ours, min(theirs)


class CpuBackend:
    """See Backend. Weights lie in tiles, in the order of use. Activations are float32.

    A layer's cache is (P, Hkv, 2, 16 * D), with keys transposed: by default float16 with 16-bit and quantized
    weights, else float32. A packed cache is (P, Hkv, 2, 17 * D) bytes. That of latent attention is (P, 16,
    D), packed (P, 17, D) bytes.
    """

    row_invariant = True
    few_rows_invariant = True
    quantizes = True
    groups_layers = True
    turns = True
    tensors = False
    activations = "float32"
    dtype = "bfloat16"
    stored_dtype = None
    short_floats = "float16"
    packs_kv = True
    converted = staticmethod(converted)
    program: Program        # the ops record themselves here
    lease: AnswerLease | None = None  # threads of the process read its memory, also without this backend

    def __init__(self, model: Model):
        self.model = model
        self.name = f"decode_core/{_core.isa()}"
        self.as_stored = as_stored
        self.held_bytes = functools.partial(held_bytes, row_bytes=tile_row_bytes)
        self.faults: dict[str, str] = {}

    def ops(self, max_tokens: int, max_rows: int, quantize: str | None,
            fine: bool = False) -> dict[str, Callable]:
        """Ops that append themselves to a Program instead of computing."""
        _core.set_threads(own_threads())
        program = Program(max_tokens, max_rows, fine)
        self.program = program
        arena = Arena(64 << 20)
        recorded = {name: getattr(program, name) for name in OPS if hasattr(program, name)}
        return recorded | {
            "pack": lambda name, *parts: pack(arena, name, parts, quantize, self.model.tied),
            "look_up": self.look_up, "make_cache": self.make_cache,
            "plan_attention": lambda *_: program.attention, "sample": Sampler()}

    def look_up(self, table: Any, ids: Any, out: Any, part: Any = None) -> None:
        if table.kind not in KINDS:
            raise ConfigError(
                f"the embeddings of each layer are of type {table.kind}, which decode_core does not "
                f"read from the file; it reads {', '.join(KINDS)}. With CHAT_SERVER_KERNELS=reference torch "
                "computes the model")
        self.program.look_up(table, ids, out, part)

    def make_cache(self, model: Model, layout: PageLayout, num_pages: int,
                   device: str) -> tuple[numpy.ndarray, list]:
        """As the reference, but each layer's cache is (P, Hkv, 2, 16 * D) or packed, with pages apart if
        layers share them."""
        size = PAGE_SIZE
        whole = mapped_zeros((num_pages * layout.page_bytes,), "uint8")

        def pages(layer: int, sizes: Any) -> numpy.ndarray:
            packed = layout.types[layer] == "q8_0"
            memory = whole if packed else of_kind(whole, layout.types[layer])
            block = sizes.head_size * size
            if packed:
                block += sizes.head_size            # 2 bytes of scale for 32 numbers, of 16 positions
            begin, apart = (places * layout.unit * size // memory.itemsize
                            for places in layout.place(layer, num_pages))
            if sizes.values_in_keys:
                steps = tuple(step * memory.itemsize for step in (apart, sizes.head_size, 1))
                shape = (num_pages, size + packed, sizes.head_size)
                return numpy.lib.stride_tricks.as_strided(memory[begin:], shape, steps, subok=True)
            steps = tuple(step * memory.itemsize for step in (apart, 2 * block, block, 1))
            return numpy.lib.stride_tricks.as_strided(memory[begin:], (num_pages, sizes.kv_heads, 2, block),
                                                      steps, subok=True)

        return whole, [sizes and pages(layer, sizes) for layer, sizes in enumerate(model.by_layer)]

    def join(self, path: str, rank: int, patience_s: float) -> dict[str, Callable]:
        program = self.program
        ranks = Ranks(path, rank, patience_s)
        return {"all_reduce": lambda x, out, residual=None: program.all_reduce(x, ranks, out, residual),
                "all_gather": lambda x, out: program.all_gather(x, ranks, out)}

    def record(self, transformer: Transformer) -> Callable:
        program = self.program
        if not transformer.model.opens:
            for name in transformer.passed_on(0):           # the stage before writes these
                program.given(transformer.buffers[name])
        recorded: Any = program         # it stands for a step's inputs while ops are recorded
        transformer.compute(recorded, SimpleNamespace(**transformer.buffers))
        if transformer.model.closes and not transformer.model.of_texts:
            program.sample(transformer.buffers["logits"])
        return lambda batch: program.finish(program.start(
            *batch[:6], all_rows=batch.states, states=batch[7:10], adapters=adapters_of(batch, transformer),
            ahead=batch.ahead, turns=batch.turns))

    def pause_while(self, lease: AnswerLease, most_s: float) -> None:
        _core.pause_while(lease.address, int(1e9 * most_s), lease.SLICE_NS)
        CpuBackend.lease = lease

    def pack_adapter(self, matrices: Mapping[str, AdapterMatrix], device: str) -> Any:
        return self.program.adapters.pack(matrices)

    def make_runner(self, transformer: Transformer, max_batch: int, context_length: int) -> ProgramRunner:
        return ProgramRunner(self.program, transformer)


def adapters_of(batch: Batch, transformer: Transformer) -> list:
    """The adapter of each sequence, or None; [] if no sequence has one."""
    return [transformer.adapters.get(slot) for slot in batch.adapters]


class ProgramRunner:
    """Runs steps as a Program, on its threads. A second step may start before the first is finished."""

    ahead = True

    def __init__(self, program: Program, transformer: Transformer):
        self.program = program
        self.transformer = transformer
        self.sampling: SampleBatch | None = None           # the SampleBatch of the step before

    def start(self, batch: Batch, rows: Sequence[SampleRow]) -> int:
        self.sampling = batch_of(rows, self.transformer.model.vocab_size, self.sampling)
        return self.program.start(*batch[:6], sampling=self.sampling, all_rows=batch.states,
                                  states=batch[7:10], adapters=adapters_of(batch, self.transformer),
                                  ahead=batch.ahead, turns=batch.turns)

    def finish(self, ticket: int) -> list[int]:
        return self.program.finish(ticket)

    def forward(self, batch: Batch) -> numpy.ndarray:
        return self.transformer.forward(batch)

    def prepare(self, progress: Callable[[float], None]) -> None:
        """There is nothing to prepare: the program is recorded already."""
