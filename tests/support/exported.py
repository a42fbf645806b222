"""Models that `export` has written, as transformers reads them, and the same models as this server computes them."""

import torch

import chat_server
from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.hub.find import resolve_model
from chatlm.worker.model.batch import Batch
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.load import open_model
from engines import forward_logits
from run_here import run_here


def export(*words):
    """Run the command; all words are text or paths."""
    assert chat_server.main(["export", *map(str, words)]) == 0


def refused(capfd, *words):
    """Run a command that must fail, and return its line."""
    status, _, said = run_here(capfd, "export", *words)
    assert status == 2
    return said.strip().splitlines()[-1]


def opened(path, **settings):
    settings = Settings(model=str(path), **{"dtype": "float32", **settings})
    return open_model(resolve_model(settings), settings)


def our_logits(path, ids, **settings):
    """The logits (T, V) after each token of a text, computed by this server in float32."""
    model = opened(path, **settings)
    pages = -(-len(ids) // PAGE_SIZE)
    transformer = Transformer(model.architecture, dict(model.tensors), load_kernels("cpu"), num_pages=pages, max_tokens=len(ids), device="cpu",
                              dtype="float32")
    return forward_logits(transformer, Batch(
        token_ids=ids, previous_token_ids=[-1, *ids][:-1], starts=[0, len(ids)], lengths=[len(ids)], tables=[list(range(pages))],
        logit_rows=list(range(len(ids))))).float()


def loaded(folder, trust=False):
    """A folder in transformers, in float32. Every tensor has its place."""
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def greedy(model, ids, count, mask=None, **more):
    """The tokens that transformers generates after `ids` (B, T)."""
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **more)
    return made[:, ids.shape[1]:].tolist()
