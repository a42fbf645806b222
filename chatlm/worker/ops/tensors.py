"""Tensors of torch in place of numpy's arrays, for references and for GPUs."""

from __future__ import annotations

import numpy
import torch

from chatlm.worker.arrays.kinds import Arrays, Bits, Device, Norm, bits_of, kind_of, mapped_zeros


def normed(x, norm: Norm):
    """The RMS norm of each row of x."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def dtype_of(kind: str) -> torch.dtype:
    return getattr(torch, kind)


def tensor_of(array: numpy.ndarray, device="cpu", kind: str | None = None) -> torch.Tensor:
    """An array as a tensor. On a CPU it shares the array's memory, unless `kind` is another type."""
    bits = bits_of(array)
    if not bits.flags.writeable or any(step < 0 for step in bits.strides):
        bits = bits.copy()
    # torch computes nothing with uint16, so it gets the bits as int16
    signed = bits.view(numpy.int16) if bits.dtype == numpy.uint16 else bits
    tensor = torch.from_numpy(signed)
    if isinstance(array, Bits):
        tensor = tensor.view(dtype_of(kind_of(array)))
    return tensor.to(device, dtype_of(kind) if kind else None)


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device) -> torch.Tensor:
    """Zeros. On a CPU they take memory only where they are written; torch.zeros would write all at once."""
    if torch.device(device).type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    return tensor_of(mapped_zeros(shape, str(dtype).removeprefix("torch.")))


def rope_tables(model, device) -> tuple[torch.Tensor, ...]:
    """The rotary tables of a model's usual attention, on a device."""
    return tuple(tensor_of(table, device) for table in model.attention.rope.tables(model.max_positions))


class TorchArrays(Arrays):
    """Arrays as tensors on a device."""

    computing = staticmethod(torch.inference_mode)

    def __init__(self, device: str):
        self.device = Device(device)

    def of(self, array, kind: str | None = None) -> torch.Tensor:
        if isinstance(array, torch.Tensor):  # as tests give them
            return array.to(self.device, dtype_of(kind) if kind else None)
        return tensor_of(array, self.device, kind)

    def copy(self, array) -> torch.Tensor:
        return array.clone()

    def empty(self, shape: tuple[int, ...], kind: str) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype_of(kind), device=self.device)

    def zeros(self, shape: tuple[int, ...], kind: str) -> torch.Tensor:
        return zeroed(shape, dtype_of(kind), self.device)

    def numpy(self, array) -> numpy.ndarray:
        return array.float().cpu().numpy()

    def bytes(self, array) -> numpy.ndarray:
        return array.reshape(-1).view(torch.uint8).numpy()

    def put(self, values: numpy.ndarray, out):
        with torch.inference_mode():  # in which buffers were made
            out.copy_(torch.from_numpy(values))

    def wait(self, array):
        if array.is_cuda:  # the next step may run on another stream
            torch.cuda.current_stream(array.device).synchronize()
