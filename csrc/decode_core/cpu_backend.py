"""A model's steps on a CPU: `Transformer.compute` is recorded once as a Program, which compiled threads run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from . import _core
from .program import Program
from .sampling import Sampler, batch_of
from .tiles import Arena
from .weights import as_stored, converted, pack

RECORDED = ("embed", "gather_rows", "rms_norm", "linear", "copy", "mix", "smear", "backout", "softcap",
            "rope_append", "paged_attention")


class CpuBackend:
    """See seam.py. Weights lie in tiles in the order of use; activations are float32.

    A layer's cache is (P, Hkv, 2, 16 * D), keys transposed, in float16 beside 16-bit and quantized weights,
    else float32.
    """

    row_invariant, quantizes = True, True
    activations, dtype = torch.float32, torch.bfloat16
    converted = staticmethod(converted)

    def __init__(self, spec: Any, script: SimpleNamespace):
        self.spec, self.script = spec, script
        self.name = f"decode_core/{_core.isa()}"
        self.as_stored = functools.partial(as_stored, script=script)
        self.program: Program | None = None

    def ops(self, max_tokens: int, max_rows: int, quantize: str | None) -> dict[str, Callable]:
        """The ops append themselves to a Program instead of computing."""
        _core.set_threads(torch.get_num_threads())
        program = self.program = Program(max_tokens, max_rows)
        arena = Arena(64 << 20)
        return {name: getattr(program, name) for name in RECORDED} | {
            "pack": lambda name, weight: pack(arena, name, weight, quantize, self.spec.tied_head),
            "make_cache": self.make_cache, "plan_attention": lambda *_: program.attention,
            "sample": Sampler()}

    def make_cache(self, spec: Any, num_pages: int, dtype: torch.dtype | None, device: torch.device):
        kind = torch.float32 if dtype == torch.float32 else torch.float16
        shape = (spec.layers, num_pages, spec.kv_heads, 2, self.script.PAGE_SIZE * spec.head_size)
        return self.script.zeroed(shape, kind, device)

    def record(self, transformer: Any) -> Callable:
        program = self.program
        transformer.compute(program, SimpleNamespace(**transformer.buffers))
        program.sample(transformer.buffers["logits"])
        return lambda batch: program.finish(program.start(*batch))

    def make_steps(self, transformer: Any, max_batch: int, context_length: int) -> ProgramSteps:
        return ProgramSteps(self.program, transformer.spec.vocab_size)


class ProgramSteps:
    """Runs steps as a Program, on its threads; a second one may be started before the first is finished."""

    ahead = True

    def __init__(self, program: Program, vocab_size: int):
        self.program, self.vocab_size = program, vocab_size
        self.sampling: Any = None           # the SampleBatch of the step before

    def start(self, batch: Any, rows: Sequence[Any]) -> int:
        self.sampling = batch_of(rows, self.vocab_size, self.sampling)
        return self.program.start(*batch, self.sampling)

    def finish(self, ticket: int) -> list[int]:
        return self.program.finish(ticket)

    def prepare(self, progress: Callable[[float], None]) -> None:
        """A recorded program has nothing left to prepare."""
