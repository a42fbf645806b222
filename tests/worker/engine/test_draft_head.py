"""A model's own draft head: its logits are those of its formulas, its drafts are right where it is, and no answer changes."""

import itertools
from dataclasses import replace

import numpy
import pytest
import torch

from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common import core
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import Piece, SamplingParams
from chatlm.worker.build import build_engine
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.states import StatePool
from chatlm.worker.kernels import kernels
from draft_heads import Head, gguf_with_head, save_with_head
from image_conversations import picture_of_size
from engines import pieces
from families import make_model, save
from lora import random_adapter
from models_that_draft import draft_always, works_of
from patching import patch
from ranked import group
from seeing_engine import answer, asking, collect, open_engine
from sight_qwen import make_qwen, save_qwen_with_head
from works import assignment

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(decode_core() is None, reason="only decode_core's rows are invariant")
NAMES = ("qwen3.5", "qwen3.5moe", "qwen3next")


def engine_of(path, **changes):
    settings = Settings(**{"model": str(path), "drafts": "mtp", "kv_cache_memory": 32 << 20, "max_batch": 4} | changes)
    return build_engine(resolve_model(settings), settings, CPU)[1]


def tokens_of(engine, works, checked=True):
    found = pieces(engine, works, checked=checked)
    assert {each.end.reason for each in found.values()} == {"length"}
    return {work.id: [*work.resumed_ids, *found[work.id].tokens] for work in works}


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
def test_a_head_s_logits_are_those_of_its_formulas(name, form, with_random_head, tmp_path, monkeypatch, one_thread):
    """Of the first token of each draft, in an answer over several pages, from prompts in chunks: computed with the states of transformers' model."""
    model, head, path = with_random_head(name)
    if form == "file":
        path = gguf_with_head(model, head, tmp_path / "tiny.gguf")
    elif form == "folder by torch":
        patch(monkeypatch, core, "decode_core", lambda: None)
        assert not engine_of(path, dtype="float32").draft_models     # its rows may differ in their last bits
        monkeypatch.setattr(kernels.Backend, "few_rows_invariant", True)     # by torch, which is exact enough here
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
    [work] = works_of()[:1]
    with torch.inference_mode():
        tokens = [*work.prompt_ids, *tokens_of(engine, [work])[work.id]]
    with torch.no_grad():
        states = model.model(torch.tensor([tokens])).last_hidden_state[0]
        expected = head.states(model.get_input_embeddings()(torch.tensor(tokens)), states) @ model.lm_head.weight.T
    assert len(found) > 10 and max(found) > len(work.prompt_ids) + 2 * PAGE_SIZE
    for known, logits in found.items():
        assert (logits - expected[known - 1]).abs().max() < 2e-3 * expected.abs().max(), known


@compiled
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_without_drafts(name, with_random_head, one_thread, monkeypatch):
    """A random head is mostly wrong, so states go back after almost each draft."""
    monkeypatch.setattr(StatePool, "INTERVAL", 32)
    draft_always(monkeypatch, 3)
    engine, works = engine_of(with_random_head(name)[2], dtype="float32"), works_of()
    engine.drafts = False
    alone = {name: tokens for work in works for name, tokens in tokens_of(engine, [work]).items()}
    engine.drafts = True
    followers = engine.draft_models[0].drafter.followers

    def check(way, of=works):
        assert tokens_of(engine, of) == {work.id: alone[work.id] for work in of}, way

    engine.pool.forget_cached()
    check("in a batch")
    check("from the prefix cache of both", works[::-1])
    for work in works:
        check("one alone", [work])
    engine.pool.forget_cached()
    check("from the prefix cache of the head alone")
    followers.forget()
    check("from the prefix cache of the model alone")
    for chunk in (7, 32):
        engine.pool.forget_cached()
        engine.limits.prefill_chunk = chunk
        check(f"with prompts in chunks of {chunk}")
    for known in (1, 20):
        check(f"resumed after {known} tokens", [replace(work, resumed_ids=tuple(alone[work.id][:known])) for work in works])
    engine.pool.forget_cached()
    held = engine.pool.allocate(engine.pool.available - 7)
    assert tokens_of(engine, works, checked=False) == alone, "preempted"
    engine.pool.release(held)
    check_integrity(engine)
    assert engine.queue.preemptions and engine.drafting.drafted.mtp > 100


@compiled
def test_a_head_changes_no_adapter_or_grammar_answer(with_random_head, tmp_path, one_thread, monkeypatch):
    """The head reads the states that the adapter makes; its pages are the adapter's alone. A step for a grammar shows its states too."""
    draft_always(monkeypatch, 3)
    model, _, path = with_random_head("qwen3.5")
    engine, config = engine_of(path, dtype="float32", adapter=("one",)), model.config
    engine.adapters.load("one", random_adapter(tmp_path / "one", config.num_hidden_layers, {"mlp.down_proj": (config.hidden_size, config.intermediate_size)}, 1, 4, 0.3))
    prompt = works_of()[0].prompt_ids
    works = [assignment(f"w{n}", prompt, SamplingParams(temperature=1.0, seed=n), 30, ignore_eos=not more.get("grammar"), **more) for n, more in enumerate(
        [dict(adapter="one"), {}, dict(adapter="one"), dict(grammar="start: /[01]*1[01]{12}[01]*/")])]   # its lexer has few states left for drafts
    engine.drafts = False
    expected = endings_of(engine, works)
    engine.drafts = True
    for _ in range(2):      # and from the prefix caches
        assert endings_of(engine, works) == expected
    assert engine.drafting.drafted.mtp > 60


def endings_of(engine, works):
    """{id: (its tokens, why it ended)}"""
    return {name: (found.tokens, getattr(found.end, "reason", found.end)) for name, found in pieces(engine, works).items()}


@compiled
def test_two_ranks_have_a_head_in_the_first(with_random_head, one_thread, monkeypatch):
    draft_always(monkeypatch, 3)
    with group(monkeypatch, 2) as ranks:
        engine, works = ranks.engine(with_random_head("qwen3.5")[2], drafts="mtp", dtype="float32"), works_of()
        engine.drafts = False
        expected = tokens_of(engine, works)
        engine.drafts = True
        assert tokens_of(engine, works) == expected and engine.drafting.drafted.mtp > 30
        ranks.settle()


def right_by_construction(folder):
    """A model whose next token, greedily, depends on the last one alone, and a head that finds the token after it by the state before that one:
    drafts are right if each entry has the state of the position before it, and further ones the head's own state.

    No layer adds anything, so a state is h(t) = norm(e(t)). The head's product takes the state of t to e(f(t)), f(t) being the token after t, for
    the tokens on the way from any prompt: fewer than C. Then the norm makes h(f(t)) of it, whose logits draw f(f(t))."""
    model = make_model("qwen3.5", tie_word_embeddings=False)
    head = Head("qwen3.5", tie_word_embeddings=False)
    for each in (model, head.layer):
        for key, weight in each.named_parameters():
            if key.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(weight)
    head.layer.model.norm.load_state_dict(model.model.norm.state_dict())
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        after = (head.rms(embeddings, model.model.norm.weight) @ model.lm_head.weight.T).argmax(1)
        reached = [40]
        while (token := int(after[reached[-1]])) not in reached:
            reached.append(token)
        assert len(reached) < embeddings.shape[1]
        states = head.rms(head.rms(embeddings[reached], model.model.norm.weight), head.norms[1]).double()
        wanted = embeddings[[int(after[token]) for token in reached]].double()
        head.fc.zero_()
        head.fc[:, embeddings.shape[1]:] = torch.linalg.lstsq(states, wanted).solution.T.float()
    return save_with_head(model, head, folder), reached[0]


@compiled
def test_drafts_of_a_right_head_are_accepted(tmp_path, one_thread, monkeypatch):
    path, first = right_by_construction(tmp_path)
    draft_always(monkeypatch, 4)
    engine = engine_of(path, dtype="float32")
    for length in (1, 40, 70):
        works = [assignment(f"{length} {n}", (first,) * length, SamplingParams(temperature=0.0), 60, ignore_eos=True) for n in range(3)]
        engine.drafts = False
        expected = tokens_of(engine, works[:1])
        engine.drafts = True
        assert tokens_of(engine, works) == {work.id: [*expected.values()][0] for work in works}
    drafted, accepted = engine.drafting.drafted.mtp, engine.drafting.accepted.mtp
    assert drafted > 200 and accepted > 0.9 * drafted, (accepted, drafted)


@compiled
def test_a_right_head_makes_fewer_steps(tmp_path, one_thread, monkeypatch):
    """By what is measured, which here is mostly Python; but how ever many are drafted, no step is wrong and the states are those of the answer."""
    path, first = right_by_construction(tmp_path)
    engine = engine_of(path, dtype="float32", drafts="auto")
    work = assignment("w", (first,) * 20, SamplingParams(temperature=0.0), 100, ignore_eos=True)
    engine.drafts = False
    expected = tokens_of(engine, [work])
    engine.drafts = True
    assert tokens_of(engine, [work]) == expected
    counts = engine.drafting
    assert counts.drafted.total > 0 and counts.accepted.total > 0


@compiled
def test_a_head_sees_rows_of_the_text_before_pictures(tmp_path, one_thread, monkeypatch):
    """The step is planned while the one under way draws the last token of the answer before it in the batch: its row is left out."""
    draft_always(monkeypatch, 2)
    folder, picture = save_qwen_with_head(tmp_path, make_qwen("qwen3_5")), picture_of_size(60, 40)
    engine = open_engine(folder, prefill_chunk=256, drafts="mtp")
    assert engine.runner.ahead
    seen = {}

    def read(sequence, first, count, rows, original=engine.draft_models[0].drafter.read_hidden):
        seen.setdefault(sequence.work.id, {}).update({first + i: row.copy() for i, row in enumerate(rows[:count])})
        original(sequence, first, count, rows)

    monkeypatch.setattr(engine.draft_models[0].drafter, "read_hidden", read)
    about, text, short = asking(engine, picture), asking(engine, text="And you, what do you say?"), asking(engine, text="Why?")
    alone = answer(engine, text, [], "alone")
    answer(engine, asking(engine, picture, text="Who?"), [picture], "encoded before")
    engine.drafts = False
    drawn = answer(engine, short, [], "short", tokens=12)
    last = next(i for i in range(4, 12) if drawn[i] not in drawn[:i])
    engine.pool.forget_cached()
    engine.add(assignment("ends", short, SamplingParams(temperature=0.0), 40, stop_token_ids=(drawn[last],)))
    [ends] = engine.queue.waiting
    while ends.generated <= last:
        engine.step()
    assert engine.under_way and ends.tokens[-1] < 0
    engine.drafts = True
    for name, ids, pictures in (("about", about, (picture,)), ("beside", text, ())):
        engine.add(assignment(name, ids, SamplingParams(temperature=0.0), 8, ignore_eos=True, pictures=pictures))
    first = [event.tokens for name, event in engine.step() if name == "beside" and isinstance(event, Piece)]
    assert ends.finished and all(sequence.computed for sequence in engine.queue.running)
    assert [*itertools.chain(*first), *collect(engine)["beside"]] == alone
    assert seen["beside"].keys() == seen["alone"].keys()
    for position, row in seen["beside"].items():
        assert numpy.array_equal(row, seen["alone"][position]), position


def test_an_unusable_head_is_refused_or_left_out(with_random_head, tmp_path):
    path = with_random_head("qwen3.5")[2]
    with pytest.raises(ConfigError, match="--drafts mtp needs the draft head of a model: its files have none"):
        engine_of(save(make_model("llama3.1"), tmp_path / "llama"))
    with pytest.raises(ConfigError, match=r"a model in stages \(--pp\) cannot use it"):
        engine_of(path, pipeline_parallel_size=2)
    assert not engine_of(path, drafts="lookup").draft_models and engine_of(path, drafts="auto").draft_models


def test_its_memory_is_in_the_plan(with_random_head):
    """Embedding and output matrix are the model's; a page of its own goes with each of the model's."""
    path = with_random_head("qwen3.5")[2]
    with_head, without = (engine_of(path, drafts=drafts, kv_cache_memory=1 << 20) for drafts in ("mtp", "none"))
    own = with_head.draft_models[0].drafter.transformer
    assert own.weights["embed"] is with_head.transformer.weights["embed"] and own.weights["head"] is with_head.transformer.weights["head"]
    assert with_head.pool.num_pages < without.pool.num_pages
    assert own.cache.nbytes == with_head.pool.num_pages * own.layout.page_bytes
