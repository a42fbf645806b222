"""decode_core: the steps of a model, compiled for CPU and CUDA.

Wrappers check device, type, shape, strides, alignment and bounds of indices, and raise a ValueError that names the argument. Only
then do pointers go to `_core`. Arrays are anything with `data_ptr` or the buffer protocol, such as torch's and numpy's; torch is
not imported here. Without the compiled half `import decode_core` raises ImportError, and chat_server runs its references.
chat_server takes only `backend_for` and `check` from here: see seam.py.
"""

try:
    import decode_core._core as _core
except ImportError as failure:
    raise ImportError(f"decode_core was installed without its compiled half, or it cannot run here: {failure}") from failure

from . import cuda
from .attention import paged_attention, plan_attention, rope_append
from .program import Program
from .ranks import RankMemory, Ranks
from .sampling import SampleBatch, Sampler, batch_of, sample
from .seam import SEAM, backend_for, check, cuda_ops
from .tiles import Arena, Matrix, embed, multiply

set_threads = _core.set_threads
get_threads = _core.get_threads
set_isa = _core.set_isa


def info() -> dict:
    """What was compiled and what runs: {"isa", "offered_isas", "left_out_isas", "missed_isa", "features", "amx_refused", "threads",
    "cuda_compiled"}.

    left_out_isas: those that the library was compiled without, whatever this CPU offers; missed_isa: the one of them that this CPU
    would choose, or "".
    amx_refused: why the AMX of this CPU cannot be used; "" if it can, or if the CPU has none."""
    features = [name for name in _core.CPU_FEATURES if _core.cpu_has(name)]
    no_amx_here = _core.amx_refusal_of(0, 0, 0)
    refused = "" if _core.amx_refusal() == no_amx_here else _core.amx_refusal()
    return {"isa": _core.isa(), "offered_isas": _core.offered_isas(), "left_out_isas": _core.left_out_isas(),
            "missed_isa": _core.missed_isa(), "features": features, "amx_refused": refused, "threads": get_threads(),
            "cuda_compiled": _core.cuda_compiled}
