"""Tiny random checkpoints as nanoGPT's train.py (github.com/karpathy/nanoGPT) and build-nanogpt's train_gpt2.py write them."""

import pickle
import sys
from dataclasses import dataclass

import torch

ARGS = dict(n_layer=3, n_head=2, n_embd=64, block_size=512, bias=True, vocab_size=60, dropout=0.1)
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrst\u00e9"
assert len(CHARACTERS) == ARGS["vocab_size"]


def random_state(args, seed=0):
    dice, C, state = torch.Generator().manual_seed(seed), args["n_embd"], {}

    def add(name, *shape, scale=0.15):
        state[f"transformer.{name}"] = torch.randn(shape, generator=dice) * scale

    def norm(name):
        add(f"{name}.weight", C)
        state[f"transformer.{name}.weight"] += 1
        if args["bias"]:
            add(f"{name}.bias", C)

    add("wte.weight", args["vocab_size"], C, scale=0.45)
    add("wpe.weight", args["block_size"], C)
    for l in range(args["n_layer"]):
        norm(f"h.{l}.ln_1"), norm(f"h.{l}.ln_2")
        for name, N, K in (("attn.c_attn", 3 * C, C), ("attn.c_proj", C, C), ("mlp.c_fc", 4 * C, C), ("mlp.c_proj", C, 4 * C)):
            add(f"h.{l}.{name}.weight", N, K)
            if args["bias"]:
                add(f"h.{l}.{name}.bias", N)
    norm("ln_f")
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def write(folder, state, args, prefix="", **more):
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(1000), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}, "optimizer": optimizer, "model_args": args, "iter_num": 7,
                "best_val_loss": torch.tensor(1.5), "config": {"dataset": "plays", "out_dir": "out", "compile": True} | more}, folder / "ckpt.pt")
    return folder


def write_meta(path, characters=CHARACTERS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"vocab_size": len(characters), "itos": dict(enumerate(characters)),
                                   "stoi": {character: i for i, character in enumerate(characters)}}))


@dataclass
class GPTConfig:
    """The sizes of a model in build-nanogpt's train_gpt2.py."""

    block_size: int = 512
    vocab_size: int = 60
    n_layer: int = 3
    n_head: int = 2
    n_embd: int = 64


GPTConfig.__module__ = "__main__"       # train_gpt2.py is run as a script


def save_build(path, monkeypatch, state=None, step=5000, **sizes):
    """A checkpoint as build-nanogpt's train_gpt2.py saves it, its sizes an object of a class of the script."""
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state or random_state(ARGS), "config": GPTConfig(**sizes), "step": step, "val_loss": 3.2}, path)
    return path
