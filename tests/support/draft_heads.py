"""Tiny models with draft heads (MTP), as folders and GGUF files, and what such a head computes, in plain torch."""

import gguf
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from families import as_gguf, make_model, save
from tiny_gguf import small_gguf_metadata, write_gguf


class Head:
    """A draft head with random weights: a layer of attention as the model's own, made as a model of one layer."""

    def __init__(self, name, seed=7, **changes):
        self.layer = make_model(name, seed=seed, num_hidden_layers=1, layer_types=["full_attention"], **changes)
        random = torch.Generator().manual_seed(seed)
        self.eps, C = self.layer.config.rms_norm_eps, self.layer.config.hidden_size
        self.fc = torch.randn(C, 2 * C, generator=random) * 0.12
        self.norms = [torch.randn(C, generator=random) * 0.2 for _ in range(2)]       # of the embedding, of the state: w of 1 + w

    def tensors(self):
        """By their names in a folder."""
        own = {name.replace("model.layers.0.", "mtp.layers.0.").replace("model.norm.", "mtp.norm."): tensor.clone()
               for name, tensor in self.layer.state_dict().items() if "layers" in name or name == "model.norm.weight"}
        return own | {"mtp.fc.weight": self.fc, "mtp.pre_fc_norm_embedding.weight": self.norms[0], "mtp.pre_fc_norm_hidden.weight": self.norms[1]}

    def rms(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + weight)

    @torch.no_grad()
    def states(self, embeddings, states):
        """h' (T, C) of each entry: of the token's embedding, and of the model's state before it (after its final norm)."""
        before = torch.cat([torch.zeros(1, states.shape[1]), states[:-1]])
        x = torch.cat([self.rms(embeddings, self.norms[0]), self.rms(before, self.norms[1])], 1) @ self.fc.T
        return self.layer.model(inputs_embeds=x[None]).last_hidden_state[0]


def save_with_head(model, head, folder):
    """The folder of a model and its draft head."""
    save(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensor.contiguous() for name, tensor in head.tensors().items()}, path, metadata={"format": "pt"})
    return folder


def gguf_with_head(model, head, path, quantized=False):
    """A GGUF file of them: the head is the layer after the model's, as llama.cpp's converter writes it."""
    L = model.config.num_hidden_layers
    parts = [GGUFReader(as_gguf(path.with_suffix(f".{part}"), each, quantized=quantized)) for part, each in (("model", model), ("head", head.layer))]
    arch = parts[0].fields["general.architecture"].contents()
    numbers = {field.name: field.contents() for field in parts[0].fields.values() if field.name.startswith(f"{arch}.")}
    numbers |= {f"{arch}.block_count": L + 1, f"{arch}.nextn_predict_layers": 1}
    if f"{arch}.attention.recurrent_layers" in numbers:
        numbers[f"{arch}.attention.recurrent_layers"] += [False]
    tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in parts[0].tensors}
    for tensor in parts[1].tensors:
        if tensor.name.startswith("blk.0."):
            tensors[tensor.name.replace("blk.0.", f"blk.{L}.")] = tensor.data, tensor.tensor_type
        elif tensor.name == "output_norm.weight":
            tensors[f"blk.{L}.nextn.shared_head_norm.weight"] = tensor.data, tensor.tensor_type
    fc = head.fc.numpy()
    kind = gguf.GGMLQuantizationType["Q8_0" if quantized else "F32"]
    tensors |= {f"blk.{L}.nextn.eh_proj.weight": (gguf.quantize(fc, kind), kind),
                f"blk.{L}.nextn.enorm.weight": (1 + head.norms[0].numpy(), None), f"blk.{L}.nextn.hnorm.weight": (1 + head.norms[1].numpy(), None)}
    return write_gguf(path, tensors, numbers, small_gguf_metadata("gpt-2") | {"general.architecture": arch})
