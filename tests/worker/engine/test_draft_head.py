"""A model's own draft head: its logits are those of its formulas, its drafts are right where it is, and no answer changes."""

from dataclasses import replace

import numpy
import pytest
import torch

from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import Ended, Piece, SamplingParams
from chatlm.worker.build import build_engine
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.states import StatePool
from draft_heads import Head, gguf_with_head, save_with_head
from families import make_model, save
from models_that_draft import draft_always
from ranked import group
from works import assignment

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(decode_core() is None, reason="only decode_core's rows are invariant")
NEW = 40
NAMES = ("qwen3.5", "qwen3.5moe", "qwen3next")


def engine_of(path, **changes):
    settings = Settings(**{"model": str(path), "drafts": "mtp", "kv_cache_memory": 32 << 20, "max_batch": 4} | changes)
    return build_engine(resolve_model(settings), settings, CPU)[1]


def tokens_of(engine, works):
    tokens = {work.id: list(work.resumed_ids) for work in works}
    for work in works:
        engine.add(work)
    while engine.busy:
        for name, event in engine.step():
            if isinstance(event, Piece):
                tokens[name] += event.tokens
            elif isinstance(event, Ended):
                assert event.reason == "length"
        check_integrity(engine)
    return tokens


def works_of(vocab_size=250, new=NEW):
    prompts = [tuple((31 * i * i + 7 * i + 5 * n) % vocab_size for i in range(length)) for n, length in enumerate((70, 37, 1, 19))]
    return [assignment(f"w{n}", prompt, SamplingParams(temperature=t, seed=n), new, ignore_eos=True)
            for n, (prompt, t) in enumerate(zip(prompts, (0.0, 0.7, 1.0, 1.0)))]


@pytest.fixture(scope="module")
def with_random_head(tmp_path_factory):
    """A function from a name of MODELS to (its model, its head, a folder of both)."""
    made = {}

    def of(name):
        if name not in made:
            model, head = make_model(name), Head(name)
            made[name] = model, head, save_with_head(model, head, tmp_path_factory.mktemp("head"))
        return made[name]
    return of


@pytest.mark.parametrize("name, form", [*((name, "folder") for name in NAMES), ("qwen3.5", "file"), ("qwen3.5", "folder by torch")])
def test_its_logits_are_those_of_its_formulas(name, form, with_random_head, tmp_path, monkeypatch, one_thread):
    """Of the first token of each draft, in an answer over several pages, from prompts in chunks: computed with the states of transformers' model."""
    model, head, path = with_random_head(name)
    if form == "file":
        path = gguf_with_head(model, head, tmp_path / "tiny.gguf")
    elif form == "folder by torch":
        monkeypatch.setenv("CHAT_SERVER_KERNELS", "reference")
    draft_always(monkeypatch, 2)
    engine = engine_of(path, dtype="float32", prefill_chunk=32)
    drafter, found = engine.draft_models[0].drafter, {}
    compute = drafter._compute

    def watched(parts, rows):
        tokens = compute(parts, rows)
        if rows and parts[0].end == len(parts[0].own.tokens):
            found[parts[0].end] = torch.tensor(numpy.array(drafter.transformer.arrays.numpy(drafter.transformer.buffers["logits"][:1])))[0]
        return tokens

    monkeypatch.setattr(drafter, "_compute", watched)
    monkeypatch.setattr(engine, "drafts", True)     # by torch, which is exact enough here
    [work] = works_of()[:1]
    with torch.inference_mode():
        tokens = [*work.prompt_ids, *tokens_of(engine, [work])[work.id]]
    with torch.no_grad():
        states = model.model(torch.tensor([tokens])).last_hidden_state[0]
        expected = head.states(model.get_input_embeddings()(torch.tensor(tokens)), states) @ model.lm_head.weight.T
    assert len(found) > 10 and max(found) > len(work.prompt_ids) + 2 * PAGE_SIZE
    for known, logits in found.items():
        assert (logits - expected[known - 1]).abs().max() < 2e-3 * expected.abs().max(), known
