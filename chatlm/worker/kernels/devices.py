"""Which of the compiled backends computes a model on a device."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.library import _core

if TYPE_CHECKING:
    from chatlm.worker.kernels.cpu_backend import CpuBackend
    from chatlm.worker.kernels.cuda_backend import CudaBackend
    from chatlm.worker.model.blocks.model import Model

log = logging.getLogger("chat_server.decode_core")


def backend_for(model: Model, device: object) -> CpuBackend | CudaBackend | None:
    """The backend for a model on a device; None if it cannot run. `not_compiled` has accepted the model."""
    device_type, _, index = str(device).partition(":")
    if device_type == "cpu":
        from chatlm.worker.kernels import cpu_backend
        if slower := cpu_backend.slower_than_torch(model.width):
            say_once(slower)
            return None
        return cpu_backend.CpuBackend(model)
    ops = cuda_ops(int(index or 0)) if device_type == "cuda" else None
    if ops is None:
        return None
    from chatlm.worker.kernels import cuda_backend
    return cuda_backend.CudaBackend(model, ops, device=device)


@functools.cache
def say_once(reason: str) -> None:
    log.warning("%s: torch computes instead", reason)


def cuda_ops(device: int = 0) -> cuda.CudaOps | None:
    """The CUDA ops, if they were compiled and the device and its driver can run them."""
    ops = cuda.CudaOps(_core) if _core.cuda_compiled else None
    if ops and (refusal := ops.refusal(device)):
        if _core.cuda_devices():    # without any GPU there is nothing to say
            say_once(refusal)
        return None
    return ops
