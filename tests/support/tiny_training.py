"""A training run in small: a nanochat model of the first generation in plain torch, trained on bytes, whose checkpoints are written as
upstream writes them. It shares no code with chatlm, so it also says what a model's logits and its bits per byte must be.

    python tests/support/tiny_training.py BASE STEPS EVERY     trains, writes every so many steps, prints each step"""

import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

CONFIG = {"sequence_len": 128, "vocab_size": 283, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}


def norm(x):
    return functional.rms_norm(x, x.shape[-1:])


class Model(torch.nn.Module):
    """config: as in meta_<step>.json."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, V, head = config["n_embd"], config["vocab_size"], config["n_embd"] // config["n_head"]
        kv = config["n_kv_head"] * head
        shapes = {"transformer.wte.weight": (V, C), "lm_head.weight": (V, C)}
        for layer in range(config["n_layer"]):
            shapes |= {f"transformer.h.{layer}.{name}.weight": shape for name, shape in {
                "attn.c_q": (C, C), "attn.c_k": (kv, C), "attn.c_v": (kv, C), "attn.c_proj": (C, C),
                "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}.items()}
        dice = torch.Generator().manual_seed(7)
        self.w = {name: (torch.randn(shape, generator=dice) * shape[1] ** -0.5).requires_grad_() for name, shape in shapes.items()}
        self.means, self.squares, self.steps = {}, {}, 0       # what Adam keeps of each weight's slopes

    def forward(self, ids):
        """ids (T,) -> logits (T, V)"""
        w, heads, kv_heads, T = self.w, self.config["n_head"], self.config["n_kv_head"], len(ids)
        D = self.config["n_embd"] // heads
        angles = torch.outer(torch.arange(T).float(), 10000.0 ** -(torch.arange(0, D, 2).float() / D))
        cos, sin = angles.cos().bfloat16().float()[:, None], angles.sin().bfloat16().float()[:, None]

        def turned(x):
            a, b = x.chunk(2, dim=-1)
            return norm(torch.cat([a * cos + b * sin, b * cos - a * sin], -1)).transpose(0, 1)

        x = norm(w["transformer.wte.weight"][ids])
        for layer in range(self.config["n_layer"]):
            prefix = f"transformer.h.{layer}."
            q, k, v = ((norm(x) @ w[f"{prefix}attn.c_{part}.weight"].T).view(T, -1, D) for part in "qkv")
            k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (turned(k), v.transpose(0, 1)))
            mixed = functional.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
            x = x + mixed.transpose(0, 1).reshape(T, -1) @ w[f"{prefix}attn.c_proj.weight"].T
            x = x + functional.relu(norm(x) @ w[f"{prefix}mlp.c_fc.weight"].T).square() @ w[f"{prefix}mlp.c_proj.weight"].T
        return 15 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 15)

    def learn(self, ids):
        """One step of training on a text (T,), with AdamW: the import of torch's takes seconds. Returns its loss."""
        loss = functional.cross_entropy(self(ids[:-1]), ids[1:])
        slopes = torch.autograd.grad(loss, list(self.w.values()))
        self.steps += 1
        with torch.no_grad():
            for (name, weight), slope in zip(self.w.items(), slopes):
                self.means[name] = mean = 0.9 * self.means.get(name, 0.0) + 0.1 * slope
                self.squares[name] = square = 0.999 * self.squares.get(name, 0.0) + 0.001 * slope ** 2
                weight *= 1 - 3e-3 * 0.01
                weight -= 3e-3 * mean / (1 - 0.9 ** self.steps) / ((square / (1 - 0.999 ** self.steps)).sqrt() + 1e-8)
        return loss.item()


def load(path):
    """The model of a checkpoint."""
    meta = json.loads(path.with_name(path.name.replace("model_", "meta_").replace(".pt", ".json")).read_text())
    model = Model(meta["model_config"])
    state = {name.removeprefix("_orig_mod."): weight for name, weight in torch.load(path, weights_only=True).items()}
    model.w = {name: state[name].float() for name in model.w}
    return model


def save(model, folder, step):
    """As upstream does: the weights first, then what is known of them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: weight.detach() for name, weight in model.w.items()}, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": model.config}))


def bits_per_byte(model, ids, size):
    """Of a text of `size` bytes whose tokens `ids` begin with one that is not scored: each token is scored in the first window that has it,
    and each window begins half a context after the one before."""
    context, bits, done = model.config["sequence_len"], 0.0, 1
    for begin in range(0, len(ids), context // 2):
        window = torch.tensor(ids[begin:begin + context])
        with torch.no_grad():
            lines = model(window[:-1]).double().log_softmax(-1)
        for position in range(done, begin + len(window)):
            bits -= lines[position - 1 - begin, ids[position]].item() / math.log(2)
        done = begin + len(window)
        if done == len(ids):
            return bits / size


TEXT = "The cat sat on the mat. The dog ran after the cat. One and two make three, and three and four make seven. "


trained = {}        # by the tokens of the text: the models after 0, 1, 2 ... steps


def train(base, steps, every, ids=None, pause_s=0.0):
    """Train and write checkpoints; yields each step that is written. ids: of the text, by default its bytes.

    No process learns the same step twice."""
    ids = tuple(TEXT.encode() if ids is None else ids)[:CONFIG["sequence_len"]]
    models = trained.setdefault(ids, [Model(CONFIG)])
    for step in range(1, steps + 1):
        if len(models) == step:
            models.append(copy.deepcopy(models[-1]))
            models[-1].learn(torch.tensor(ids))
        model = models[step]
        if step % every == 0:
            save(model, Path(base) / "base_checkpoints" / "d2", step)
            yield step, model
            time.sleep(pause_s)


if __name__ == "__main__":
    for number, _ in train(sys.argv[1], *map(int, sys.argv[2:4])):
        print(number, flush=True)
