"""Tensors of tests as the arrays that a model's files become."""

import torch

from chatlm.worker.arrays.kinds import AdapterMatrix, of_kind


def array_of(tensor):
    """A copy of a tensor as an array."""
    tensor = tensor.detach().contiguous()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    made = bits.numpy().copy()
    return of_kind(made, "bfloat16") if tensor.dtype == torch.bfloat16 else made


def arrays_of(tensors):
    """A model's tensors by name."""
    return {name: array_of(tensor) if isinstance(tensor, torch.Tensor) else tensor for name, tensor in tensors.items()}


def matrix_of(a, b, scales):
    """An AdapterMatrix of tensors."""
    return AdapterMatrix(*map(array_of, (a, b, scales)))
