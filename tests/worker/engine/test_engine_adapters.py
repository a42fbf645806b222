"""Answers of several adapters and of their base in one engine: each has the bits that it has alone."""

import os
import shutil
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from chatlm.common.core import decode_core
from chatlm.common.hub.stamps import adapter_stamp
from chatlm.common.messages.protocol import Cancel, DropAdapter, EndThinking, LoadAdapter, NewAnswer, NewPrompt, NewRequest
from chatlm.common.messages.requests import AnswerParams, Ended, Failed, Piece, SamplingParams, ThinkingEnds
from chatlm.worker.engine.adapter_slots import AdapterSlots, adapter_digest
from chatlm.worker.model.batch import Batch
from chatlm.worker.inbox import Inbox
from engines import forward_logits, make_engine, run
from lora import SMOLLM2, random_adapter
from works import assignment

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(decode_core() is None, reason="rows are invariant with decode_core alone")]
GREEDY, DRAWN = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four adapters of the default model, of several ranks and types."""
    root = tmp_path_factory.mktemp("adapters")
    attention = {name: shape for name, shape in SMOLLM2.items() if "self_attn" in name}
    return {name: random_adapter(root / name, 30, shapes, seed, rank, 0.03, dtype, use_rslora=rslora) for seed, (name, shapes, rank, dtype, rslora) in enumerate([
        ("all", SMOLLM2, 16, torch.bfloat16, False), ("attention", attention, 4, torch.float16, False),
        ("down", {"mlp.down_proj": (576, 1536)}, 5, torch.float32, True), ("up", {"mlp.up_proj": (1536, 576)}, 1, torch.float32, False)])}


@pytest.fixture(scope="module")
def engine(default_model_path, folders):
    engine = make_engine(default_model_path, as_stored=True, num_pages=900, max_batch=64)
    for name, folder in folders.items():
        engine.adapters.load(name, folder)
    return engine


def prompt(engine, text):
    return tuple(engine.tokenizer.encode(text))


def rows_of(engine, adapters, lengths, adds=0):
    """The last logits of sequences of these adapters' slots, each a prompt of its own of so many tokens, computed in one step."""
    ids = [[(7 * n + 3 * (index + adds) + 11) % 4000 + 20 for n in range(length)] for index, length in enumerate(lengths)]
    starts = [0]
    for one in ids:
        starts.append(starts[-1] + len(one))
    first, tables = 0, []
    for one in ids:
        tables.append([*range(first, first := first + -(-len(one) // 16))])
    flat = [token for one in ids for token in one]
    previous = [token for one in ids for token in (-1, *one[:-1])]
    batch = Batch(flat, previous, starts, [len(one) for one in ids], tables, [end - 1 for end in starts[1:]], adapters=list(adapters))
    return forward_logits(engine.transformer, batch)


def test_a_row_keeps_its_logits_beside_31_adapters(engine):
    """Few rows divide a product's tiles among threads, many are divided themselves."""
    slots = [index % 5 for index in range(32)]
    together = rows_of(engine, slots, [1] * 32)
    for index in (0, 1, 2, 3, 4, 31):
        assert torch.equal(rows_of(engine, [slots[index]], [1], index)[0], together[index]), index
    prompts = rows_of(engine, [1, 2, 0, 3, 4, 1], [9, 17, 5, 33, 1, 40])
    for index, (slot, length) in enumerate(zip([1, 2, 0, 3, 4, 1], [9, 17, 5, 33, 1, 40])):
        alone = rows_of(engine, [slot], [length], index)[0]
        assert torch.equal(alone, prompts[index]), (slot, length)
    assert not torch.equal(rows_of(engine, [1], [9], 0)[0], rows_of(engine, [0], [9], 0)[0])
    without = rows_of(engine, [], [9], 0)[0]
    assert torch.equal(rows_of(engine, [0], [9], 0)[0], without)


def works_of(engine, count=6):
    names = ["all", "", "attention", "down", "all", "up"]
    texts = ["The three colors of the rainbow that I like are", "The three colors of the rainbow that I like are",
             "The cat sat on the mat. The cat sat on the mat. The cat sat on", "The capital of France, as everybody",
             "The cat sat on the mat. The cat sat on the mat. The cat sat on", "A long time ago, in a"]
    return [assignment(f"{index}", prompt(engine, text), GREEDY if index % 2 else DRAWN, 24, adapter=name, ignore_eos=True)
            for index, (name, text) in enumerate(zip(names, texts))][:count]


def tokens_of(engine, works):
    """By the engine's own steps, of which one may begin before the last is finished."""
    tokens = {work.id: [] for work in works}
    for work in works:
        engine.add(work)
    while engine.busy:
        for name, event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Piece):
                tokens[name] += event.tokens
    return tokens


@pytest.fixture(scope="module")
def alone(engine):
    found = {}
    for work in works_of(engine):
        engine.pool.forget_cached()
        found |= tokens_of(engine, [work])
    assert len({tuple(tokens) for tokens in found.values()}) >= len(found) - 1      # two repeat the cat
    return found


def test_adapter_answers_are_alike_alone_and_cached(engine, alone):
    """Answers are the same alone, together and cached."""
    engine.pool.forget_cached()
    assert tokens_of(engine, works_of(engine)) == alone
    assert tokens_of(engine, works_of(engine)) == alone     # each finds its own pages alone
    ended = run(engine, works_of(engine)).end
    assert all(isinstance(end, Ended) for end in ended.values())


def test_the_prefix_cache_keeps_adapters_apart(engine):
    ids = prompt(engine, "one two three four five six seven eight nine ten " * 4)
    engine.pool.forget_cached()
    seen = [run(engine, [assignment("a", ids, GREEDY, 2, adapter=name)]).end["a"].usage.cached_tokens for name in ("all", "", "down", "all", "", "down")]
    assert seen[:3] == [0, 0, 0] and min(seen[3:]) >= 16


@pytest.mark.parametrize("limits", [{"prefill_chunk": 16}, {"num_pages": 14}], ids=["chunked", "preempted"])
def test_adapter_answers_survive_chunks_and_preemption(limits, default_model_path, folders, alone):
    """Answers are the same chunked and preempted."""
    engine = make_engine(default_model_path, as_stored=True, max_batch=8, context_length=128, **{"num_pages": 60} | limits)
    for name, folder in folders.items():
        engine.adapters.load(name, folder)
    assert tokens_of(engine, works_of(engine)) == alone
    assert bool(engine.queue.preemptions) == (limits.get("num_pages") == 14)


def test_an_adapter_s_answer_moves_to_another_worker(engine, alone):
    """After a worker's death: the tokens so far come back, under the adapter's id."""
    work = works_of(engine)[0]
    engine.pool.forget_cached()
    resumed = assignment(work.id, work.prompt_ids, work.sampling, 24, adapter="all", ignore_eos=True, resumed_ids=tuple(alone[work.id][:9]))
    assert tokens_of(engine, [resumed])[work.id] == alone[work.id][9:]


def test_loading_an_adapter_disturbs_no_other_answer(engine, alone, folders):
    """Loading and dropping adapters disturbs no other answer."""
    engine.pool.forget_cached()
    tokens, works = {}, works_of(engine)
    for work in works:
        engine.add(work)
    engine.adapters.load("more", folders["down"])
    engine.add(assignment("gone", works[0].prompt_ids, GREEDY, 24, adapter="more"))
    failed, steps = [], 0
    while engine.busy:
        for name, event in engine.step():
            if isinstance(event, Piece):
                tokens.setdefault(name, []).extend(event.tokens)
            elif isinstance(event, Failed):
                failed.append((name, event.message))
        steps += 1
        if steps == 4:
            engine.adapters.load("another", folders["up"])
            engine.drop_adapter("more")
    engine.drop_adapter("another")
    assert failed == [("gone", AdapterSlots.GONE)] and {name: tokens[name] for name in alone} == alone
    engine.add(assignment("late", works[0].prompt_ids, GREEDY, 24, adapter="more"))
    assert engine.step() == [("late", Failed(AdapterSlots.GONE))]
    assert sorted(engine.adapters.slots) == ["all", "attention", "down", "up"] and sorted(engine.transformer.adapters) == [1, 2, 3, 4]


def test_answers_go_on_while_an_adapter_is_read(engine, alone, folders, monkeypatch, tmp_path):
    """Until its files are read, all answers come to their ends; what needs it waits for it."""
    engine.pool.forget_cached()
    told, may_read, read = [], threading.Event(), engine.transformer.read_adapter
    monkeypatch.setattr(engine.transformer, "read_adapter", lambda folder: may_read.wait(60) and read(folder))
    inbox, tokens = Inbox(engine, told.append), {}
    for work in works_of(engine):
        engine.add(work)
    inbox.obey(LoadAdapter("more", str(folders["down"])))
    while engine.busy:
        for name, event in engine.step():
            if isinstance(event, Piece):
                tokens.setdefault(name, []).extend(event.tokens)
        inbox.adapters.finish()
    assert tokens == alone and not told
    may_read.set()
    until_read(inbox)
    assert [(message.id, message.problem) for message in told] == [("more", "")] and engine.adapters.slots["more"] in engine.transformer.adapters
    inbox.obey(LoadAdapter("broken", str(tmp_path)))
    inbox.obey(LoadAdapter("another", str(folders["up"])))
    for name in ("more", "another", "broken"):
        inbox.obey(DropAdapter(name))
    until_read(inbox)
    assert [message.id for message in told[1:]] == ["broken", "another"] and "cannot read" in told[1].problem
    assert sorted(engine.transformer.adapters) == [1, 2, 3, 4] and sorted(engine.adapters.sizes) == [1, 2, 3, 4] and not inbox.adapters.dropped


def until_read(inbox):
    """Until all adapters are read."""
    while inbox.adapters.folders:
        wait([future for _, future in inbox.engine.adapters.reading.values()])
        inbox.adapters.finish()


def texts_of(engine):
    """Of each answer its tokens, and how it ended."""
    tokens, ends = {}, {}
    while engine.busy or engine.events:
        for name, event in engine.step():
            if isinstance(event, Piece):
                tokens.setdefault(name, []).extend(event.tokens)
            elif isinstance(event, (Ended, Failed, ThinkingEnds)):
                ends[name] = event
    return tokens, ends


def test_only_an_adapter_s_answers_wait_for_it(engine, folders, monkeypatch):
    """While an adapter is read the base answers, and only answers with the adapter wait for it."""
    told, may_read, read = [], threading.Event(), engine.transformer.read_adapter
    monkeypatch.setattr(engine.transformer, "read_adapter", lambda folder: may_read.wait(60) and read(folder))
    inbox = Inbox(engine, told.append)
    inbox.obey(LoadAdapter("slow", str(folders["down"])))
    for name, adapter in (("base", ""), ("one", "slow"), ("left", "slow"), ("other", "down")):
        inbox.obey(NewRequest(name, AnswerParams(sampling=GREEDY, adapter=adapter)))
        inbox.obey(NewPrompt(name, 0, prompt(engine, "The capital of France")))
        inbox.obey(NewAnswer(name, name, 0, 0, 8))
    inbox.obey(Cancel("left"))
    inbox.obey(EndThinking("one"))
    inbox.adapters.finish()
    tokens, ends = texts_of(engine)
    assert {*tokens} == {"base", "other"} and ends["one"] == ThinkingEnds(None) and not told
    may_read.set()
    until_read(inbox)
    late, ends = texts_of(engine)
    assert late == {"one": tokens["other"]} and isinstance(ends["one"], Ended)
    engine.adapters.drop("slow")


def test_an_adapter_whose_files_changed_is_refused(engine, folders, tmp_path, monkeypatch):
    """An adapter whose files are not those that were seen is refused."""
    told = []
    folder = shutil.copytree(folders["down"], tmp_path / "down")
    stamp, digest = adapter_stamp(folder), adapter_digest(folder)
    read = engine.transformer.read_adapter
    inbox = Inbox(engine, told.append)
    inbox.obey(LoadAdapter("same", str(folder), stamp, digest))
    until_read(inbox)
    inbox.obey(LoadAdapter("other digest", str(folder), stamp, "00"))
    until_read(inbox)
    monkeypatch.setattr(engine.transformer, "read_adapter", lambda place: (read(place), os.utime(folder / "adapter_config.json"))[0])
    inbox.obey(LoadAdapter("touched while it was read", str(folder), stamp))
    until_read(inbox)
    inbox.obey(LoadAdapter("touched before", str(folder), stamp))
    until_read(inbox)
    assert [(message.id, "changed or removed" in message.problem) for message in told] == [
        ("same", False), ("other digest", True), ("touched while it was read", True), ("touched before", True)]
    engine.adapters.drop("same")
    assert sorted(engine.transformer.adapters) == [1, 2, 3, 4]


def test_a_broken_adapter_takes_no_slot(engine, tmp_path):
    before = dict(engine.adapters.slots), dict(engine.transformer.adapters)
    with pytest.raises(Exception, match="cannot read|No such file"):
        engine.adapters.load("broken", Path(tmp_path))
    assert (dict(engine.adapters.slots), dict(engine.transformer.adapters)) == before


def test_cached_pages_belong_to_an_adapter_s_files(engine, folders, tmp_path):
    """So what outlives a worker is found by the next one, and never by another adapter in the same slot."""
    def root(adapter):
        engine.add(assignment(f"root {adapter}", prompt(engine, "a"), GREEDY, 1, adapter=adapter))
        [sequence] = engine.queue.waiting
        engine.cancel(sequence.work.id)
        return sequence.root

    other = random_adapter(tmp_path / "other", 30, {"mlp.down_proj": (576, 1536)}, 9, 5, 0.03)
    engine.adapters.load("again", folders["down"])
    engine.adapters.load("other", other)
    assert root("again") == root("down") and len({root(""), root("down"), root("other"), root("all")}) == 4
    engine.drop_adapter("again")
    engine.drop_adapter("other")


def test_an_adapter_s_bytes_are_those_that_it_holds(engine, folders):
    """In memory, not in its file, nor with the zeros between the parts of a matrix; a small one has a whole page of its own."""
    held = []
    for name in ("all", "up"):
        nbytes, _ = engine.adapters.load(f"{name} again", folders[name])
        size = sum(path.stat().st_size for path in folders[name].iterdir())
        packed = engine.transformer.adapters[engine.adapters.slots[f"{name} again"]]
        assert nbytes == engine.adapters.sizes[engine.adapters.slots[f"{name} again"]]
        held.append((nbytes, size, hasattr(packed, "nbytes")))
        engine.adapters.drop(f"{name} again")
    assert all(nbytes % (2 << 20) == 0 and size <= nbytes + (1 << 20) and nbytes < 1.1 * size + (4 << 20) for nbytes, size, exact in held if exact)
