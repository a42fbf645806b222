"""Chooses what computes each op of a model on a device."""

from __future__ import annotations

from typing import Any

from chatlm.common.core import decode_core, kernels_line, refused_isa, torch_installed, unused_core
from chatlm.common.errors import ConfigError, require_library
from chatlm.common.log import log
from chatlm.worker.kernels.kernels import OPS, Backend, Kernels, references
from chatlm.worker.kernels.limits import left_to_torch, not_compiled
from chatlm.worker.model.blocks.model import Model


def load_kernels(device, model: Model | None = None, *, max_tokens=512, max_rows=512, quantize=None,
                 join=None, whole: Model | None = None, fine=False) -> Kernels:
    """Choose each op for a device and a model: decode_core's if it is installed and able, else the reference.

    Steps have at most `max_tokens` tokens and `max_rows` rows of logits. Float weights are quantized to the
    type `quantize`. `fine`: on a CPU, decode_core rounds all activations that quantized weights multiply to
    16 bits. `join(backend)`, if given, makes the ops that exchange with other ranks, and `whole` is then the
    model that the ranks divide. CHAT_SERVER_KERNELS=reference disables decode_core."""
    backend = choose_backend(device, model, whole, True)
    if quantize and not backend.quantizes:
        raise ConfigError(f"--quantize needs decode_core and a CPU; {kernels_line()}")
    ops = backend.ops(max_tokens, max_rows, quantize, fine)
    names = dict.fromkeys(OPS, "torch/reference") | {"sample": "numpy/reference"}
    names |= dict.fromkeys(set(ops) - set(backend.faults), backend.name)
    ops = (references().REFERENCES if backend.tensors else {}) | ops | (join(backend) if join else {})
    return Kernels(**ops, names=names, backend=backend)


def choose_backend(device, model: Model | None, whole: Model | None = None, says_why: bool = False):
    """decode_core's backend if it runs this model on this device, else torch's. Without a model: torch's.

    All stages of a `whole` model get the same. If `says_why`, the log says what is left to torch; one caller
    for each model asks for that."""
    if refused := refused_isa():
        raise ConfigError(refused)
    core = decode_core() if model else None
    if says_why and (reason := unused_core()):
        log.error("%s", reason)
    if model and core is None and not torch_installed():
        raise ConfigError(kernels_line())
    if core and model and (features := not_compiled(whole or model, device) or not_compiled(model, device)):
        if not torch_installed():
            require_library("torch", f"This model has {features}, which decode_core cannot compute; it")
        if says_why:
            log.warning("decode_core has no kernels for %s, which this model needs: torch computes instead",
                        features)
        core = None
    backend: Any = None     # which has all attributes of Backend: tests/core/test_library.py
    if core and model:
        from chatlm.worker.kernels import devices
        backend = devices.backend_for(model, device)
    if backend and model and says_why and (ops := left_to_torch(whole or model, device)):
        log.warning("%s has no kernels for %s: torch computes only these", backend.name, " and ".join(ops))
    return backend or Backend(device)
