"""The compiled kernels that can be called alone, and what is asked of the library.

Wrappers check device, type, shape, strides, alignment and bounds of indices, and raise a ValueError that
names the argument. Only then do pointers go to the library. Arrays are anything with `data_ptr` or the buffer
protocol, such as torch's and numpy's; torch is not imported.
Without a compiled library of this program's interface, importing it raises ImportError.
"""

from __future__ import annotations

from chatlm.common.core import core_info
from chatlm.worker.kernels import cuda, tiles
from chatlm.worker.kernels.attention import paged_attention, plan_attention, rope_append
from chatlm.worker.kernels.library import _core
from chatlm.worker.kernels.program import Program
from chatlm.worker.kernels.ranks import RankMemory, Ranks
from chatlm.worker.kernels.sampling import SampleBatch, Sampler, batch_of, sample
from chatlm.worker.kernels.tiles import Arena, Matrix, embed, multiply

__all__ = [
    "Arena", "Matrix", "Program", "RankMemory", "Ranks", "SampleBatch", "Sampler", "_core", "batch_of",
    "cuda", "embed", "get_threads", "info", "multiply", "paged_attention", "plan_attention",
    "rope_append", "sample", "set_isa", "set_threads", "tiles"]
set_threads = _core.set_threads
get_threads = _core.get_threads
set_isa = _core.set_isa


def info() -> dict:
    """What was compiled and what runs, as `core_info` says it."""
    return core_info(_core)
