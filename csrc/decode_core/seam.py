"""The seam between chat_server and this package.

SEAM is the digest of chat_server's side (chatlm/common/seam.py), which setup.py compiled in. A chat_server with another digest
does not use this package and runs its references.

`backend_for(spec, device, script)` returns None, or a backend, which computes the steps of a model in chat_server's place. Its
attributes:

    name                          for /stats: "decode_core/avx512"
    row_invariant                 the bits of a row depend on nothing else in the batch
    few_rows_invariant            a row's bits do not depend on the other rows of a step of up to 8 tokens that all draw,
                                  drafts among them
    activations                   torch dtype of every activation buffer; None: chat_server chooses
    dtype                         torch dtype of float weights, if the user names none
    stored_dtype                  dtype of activations and cache with matrices as stored; None: the backend decides
    short_floats                  name of the type of keys and values if weights are shorter than float32; "": as activations
    turns                         do rotations go by Batch.turns, if the batch has them?
    packs_kv                      does it read keys and values of the type q8_0?
    groups_layers                 may layers form groups, each with pages and a table of its own? A step's tables then list a
                                  page of each group in turn
    quantizes                     does `ops` take a type for `quantize`?
    as_stored(shape, parts)       a matrix in its file's type or one close to it, or a tuple of matrices whose rows together
                                  are its rows. as_stored is None: matrices are always dequantized
    converted(sources, stored)    in words, which matrices cannot stay in the file's type
    held_bytes(tensors)           how many bytes the GGUF tensors that form one matrix will take
    ops(max_tokens, max_rows, quantize, fine)   {name: op}, which replace chat_server's references. What `pack` returns may have
                                  `finite`: is there no NaN and no infinity in the weights, nor in what they became?
    join(path, rank, patience_s)  the ops all_reduce and all_gather of a rank, which shares a model with others on this host
                                  through the memory of a RankMemory. join is None: torch.distributed's are used
    record(transformer)           None, or a function that runs a batch in place of Transformer.compute. If batch.states is
                                  true, buffer x then has the last layer's output of every row. Unless spec.opens, another
                                  stage writes the buffers transformer.passed_on(0) before a step. There are no logits unless
                                  spec.closes, nor if spec.of_texts
    make_steps(transformer, max_batch, context_length)      an object with the methods of chat_server's Steps
    pause_while(word, most_s)     from then on the op `pause` waits while the int64 at word.address is above the nanoseconds of
                                  the monotonic clock, but at most `most_s`
    pack_adapter(matrices, device)      an adapter as steps read it. Its matrices have the names by which `compute` asks
                                  Inputs.adapters for them. transformer.adapters has it at its slot, which batch.adapters names
    faults                        {op: what is wrong}: the references compute these ops. Complete once steps are prepared

`check(script, threads, say)` proves and measures every op that can run here: see report.py.

`spec` is chat_server's CoreSizes. `script` holds what this package uses of chat_server (`for_decode_core` in
chatlm/worker/model/kernels.py), because nothing of chatlm is imported here. torch is imported with a backend, not with this
package.
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
    """The backend for a model on a torch device; None if it cannot run. chat_server's `not_compiled` has accepted the model."""
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
    """Say a report line by line. Returns whether all ops are as their references."""
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
