"""The seam between chat_server and this package. SEAM is the digest of chat_server's side (chatlm/common/seam.py), from which
setup.py compiles it in; where the chat_server that runs has another, it runs its references.

`backend_for(spec, device, script)` returns None, or a backend: what computes a model's steps in chat_server's
place.

    name                          for /stats: "decode_core/avx512"
    row_invariant                 the bits of a row depend on nothing else in the batch
    few_rows_invariant            a row's bits do not depend on the other rows of a step of up to 8 tokens that all draw,
                                  drafts among them
    activations                   torch dtype of every activation buffer; None: chat_server's own choice
    dtype                         torch dtype of float weights whose user names none
    stored_dtype                  of activations and cache with matrices as stored; None: the backend decides
    short_floats                  name of the type of keys and values with weights of any type below float32; "": as activations
    turns                         do rotations go by Batch.turns where it has them?
    packs_kv                      does it read keys and values of the type q8_0?
    groups_layers                 may pages hold some layers only, each group with a table of its own? (a step's tables then
                                  list a page of each group in turn)
    quantizes                     does `ops` take a type for `quantize`?
    as_stored(shape, parts)       a matrix in its file's type, or one close to it, or a tuple of matrices whose rows
                                  together are its rows; None: always dequantized
    converted(sources, stored)    which matrices cannot stay in the file's type, in words
    held_bytes(tensors)           what the GGUF tensors that form one matrix will take
    ops(max_tokens, max_rows, quantize, fine)   {name: op} replacing chat_server's references; what `pack` returns may say in
                                  `finite` whether neither the weights nor what they became has a NaN or an infinity
    join(path, rank, patience_s)  the ops all_reduce and all_gather of a rank whose model others of this host share, through
                                  the memory of a RankMemory; join is None: torch.distributed's are used
    record(transformer)           None, or a function that runs a batch in place of Transformer.compute; where
                                  batch.states is true, buffer x then has the last layer's output of every row.
                                  Unless spec.opens, the buffers transformer.passed_on(0) are another stage's, written before
                                  a step; unless spec.closes, and if spec.of_texts, it has no logits
    make_steps(transformer, max_batch, context_length)      what has the methods of chat_server's Steps
    pause_while(word, most_s)           from then on the op `pause` waits, at most so long, while the int64 at word.address is above the
                                  nanoseconds of the monotonic clock
    pack_adapter(matrices, device)      what steps read of an adapter, whose matrices have the names by which `compute` asks
                                  Inputs.adapters for them; it lies in transformer.adapters by the slots of batch.adapters
    faults                        {op: what is wrong}: the reference computes each of these; complete once the
                                  steps are prepared

`check(script, threads, say)` proves and measures every op that can run here: see report.py.

`spec` is chat_server's CoreSizes. `script` holds what this package uses of chat_server (`for_decode_core` in
chatlm/worker/model/kernels.py): nothing of chatlm is imported here. torch is imported with a backend,
not with this package.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from . import _core, cuda

SEAM = _core.SEAM
log = logging.getLogger("chat_server.decode_core")


def backend_for(spec: Any, device: Any, script: SimpleNamespace) -> Any:
    """The backend for a model that chat_server's `not_compiled` accepts, on a torch device; None if it cannot run."""
    device_type, _, index = str(device).partition(":")
    if device_type == "cpu":
        from . import cpu_backend
        slower = cpu_backend.slower_than_torch(spec.width)
        return say_once(slower) if slower else cpu_backend.CpuBackend(spec, script)
    ops = cuda_ops(int(index or 0)) if device_type == "cuda" else None
    if ops is None:
        return None
    from .cuda_backend import CudaBackend
    return CudaBackend(spec, script, ops, device=device)


def check(script: SimpleNamespace, threads: int, say: Callable[[str], None]) -> bool:
    """Print a report, a line each `say`; whether all ops are as their references."""
    from .report import Report
    return Report(script, threads, say).run()


@functools.cache
def say_once(reason: str) -> None:
    log.warning("%s: torch computes instead", reason)


def cuda_ops(device: int = 0) -> cuda.CudaOps | None:
    """The CUDA ops, if they were compiled and the device and its driver can run them."""
    ops = cuda.CudaOps(_core) if _core.cuda_compiled else None
    if ops and (refusal := ops.refusal(device)):
        return say_once(refusal) if _core.cuda_devices() else None      # without any GPU there is nothing to say
    return ops
