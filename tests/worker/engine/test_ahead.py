"""Prefixes that are restored before anybody asks: right to the bit, their owner's alone, and never in anybody's way."""

import random
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.core import decode_core
from chatlm.common.memory import populate
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.segments import segment_paths
from chatlm.worker.engine.ahead import Ahead
from chatlm.worker.engine.states import StatePool
from chatlm.worker.model.pages import KvType
from chatlm.common.messages.protocol import NewAnswer, NewPrompt, NewRequest
from chatlm.worker.loop import WorkerLoop
from engines import tokens_of
from families import make_model, save
from kept_prefixes import CHANGES, Memory, bits_of, cached, conversations, keep, make, writing
from nightly import by_day
from worker_front import Front
from works import assignment, changed

PACKED = KvType("float32", packed=True)


def restore_all(engine):
    """As a worker's loop does while nobody asks for anything; the engine."""
    ahead = engine.keeper.ahead
    while ahead.is_due:
        ahead.more()
        if ahead.waits:
            engine.keeper.wait(1.0)
    return engine


def store_of(engine, works, folder):
    """What an engine answers, and a store with all that it has computed."""
    memory = Memory()
    keep(engine, memory)
    with writing(folder, memory):
        tokens = tokens_of(engine, works)
    memory.close()
    return tokens


@pytest.fixture
def again(nanochat_fixtures, stored):
    """A new engine beside the store of another one, before it has restored anything."""
    memory = Memory()
    yield keep(make(nanochat_fixtures / "gen5"), memory, stored.folder)
    memory.close()


@torch.inference_mode()
def test_nothing_is_left_to_restore_for_a_prompt(stored, again):
    """All pages of the prompt are there before it comes, and nothing holds them."""
    restore_all(again)
    assert again.keeper.counts["restored_tokens"] >= stored.pages * PAGE_SIZE
    assert again.pool.available == again.pool.num_pages and not again.keeper.restorations
    before = {**again.keeper.counts}
    assert tokens_of(again, [stored.work]) == stored.tokens
    assert again.keeper.counts["restored_tokens"] == before["restored_tokens"]
    assert cached(again, stored.work) == stored.pages * PAGE_SIZE


@torch.inference_mode()
def test_random_conversations_are_restored_ahead(nanochat_fixtures, tmp_path):
    """Conversations with common beginnings: every page has the bits that were computed, whoever is claimed first."""
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        works = conversations(seed, count=6)
        first = make(nanochat_fixtures / "gen5", num_pages=400)
        alone = store_of(first, works, folder)
        engine = restore_all(keep(make(nanochat_fixtures / "gen5", num_pages=400), Memory(), folder))
        restored = engine.keeper.counts["restored_tokens"]
        assert restored > 100
        random.Random(seed).shuffle(works)
        for work in works:
            assert tokens_of(engine, [work])[work.id] == alone[work.id]
        pages, expected = bits_of(engine)[0], bits_of(first)[0]
        assert len(pages.keys() & expected.keys()) >= restored // PAGE_SIZE
        if engine.kernels.row_invariant:
            assert all(pages[address] == expected[address] for address in pages.keys() & expected.keys())


@torch.inference_mode()
def test_a_new_beginning_joins_a_claimed_one(nanochat_fixtures, tmp_path):
    """The second of two conversations is restored after the owner of the first one has come: both go on from the same pages."""
    dice = random.Random(4)
    common = [dice.randrange(200) for _ in range(100)]
    works = [assignment(name, (*common, *(dice.randrange(200) for _ in range(100))), SamplingParams(temperature=0.0), 4) for name in "ab"]
    alone = store_of(make(nanochat_fixtures / "gen5"), works, tmp_path)
    engine = keep(make(nanochat_fixtures / "gen5"), Memory(), tmp_path)
    ahead = engine.keeper.ahead
    later, ahead.ends = ahead.ends[:-1], ahead.ends[-1:]
    assert later
    restore_all(engine)
    for work in works:              # claims the beginning of both
        assert tokens_of(engine, [work])[work.id] == alone[work.id]
    engine.pool.forget_cached()
    ahead.ends = later
    restore_all(engine)
    for work in works:
        assert tokens_of(engine, [work])[work.id] == alone[work.id]


@torch.inference_mode()
def test_only_its_owner_finds_what_was_restored(nanochat_fixtures, tmp_path):
    """Nobody's name is in a store; a prefix is found by whom it belongs to, with keys and without."""
    for owner in ("", "alice"):
        folder = tmp_path / f"of {owner}"
        folder.mkdir()
        [work] = conversations(1, 1)
        work = changed(work, owner=owner)
        store_of(make(nanochat_fixtures / "gen5"), [work], folder)
        engine = restore_all(keep(make(nanochat_fixtures / "gen5"), Memory(), folder))
        engine.keeper.kept.profile = b""        # from now on nothing else is restored
        for other in ("bob", "alice" if owner != "alice" else "", "unclaimed "):
            assert cached(engine, changed(work, owner=other)) == 0
        assert cached(engine, work) == (len(work.prompt_ids) - 1) // PAGE_SIZE * PAGE_SIZE
        assert cached(engine, changed(work, owner="carol")) == 0


FAMILIES = [("lfm2", None), ("granite4h", None), ("gemma3", None), ("gemma4", PACKED), ("kimi2", PACKED)]


@pytest.mark.skipif(decode_core() is None, reason="not built")
@pytest.mark.parametrize("name, kv", by_day(FAMILIES, ("lfm2", None), ("gemma3", None)))
@torch.inference_mode()
def test_states_and_windows_are_restored_ahead(name, kv, tmp_path, monkeypatch, one_thread):
    """Snapshots of states, and pages of layers with windows, are there before a prompt too."""
    monkeypatch.setattr(StatePool, "INTERVAL", 64)
    monkeypatch.setattr(Ahead, "SHARE", 1)
    model, store = save(make_model(name), tmp_path / "model"), tmp_path / "store"
    store.mkdir()
    works = conversations(7)
    first = make(model, apart=True, kv=kv)
    alone = store_of(first, works, store)
    engine = restore_all(keep(make(model, apart=True, kv=kv), Memory(), store))
    assert engine.keeper.counts["restored_tokens"] > 100 and engine.pool.available == engine.pool.num_pages
    assert tokens_of(engine, works) == alone
    for mine, its in zip(bits_of(engine), bits_of(first)):
        assert all(mine[address] == its[address] for address in mine.keys() & its.keys())


@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_a_spoilt_store_is_no_danger_ahead(stored, nanochat_fixtures, change):
    """A store that was tampered with gives fewer pages, and never a wrong token."""
    dice, [path] = random.Random(change.__name__), segment_paths(stored.folder)
    data, restored = path.read_bytes(), []
    for _ in range(6):
        path.write_bytes(change(bytearray(data), dice))
        memory = Memory()
        engine = restore_all(keep(make(nanochat_fixtures / "gen5"), memory, stored.folder))
        restored.append(engine.keeper.counts["restored_tokens"] // PAGE_SIZE)
        assert engine.pool.available == engine.pool.num_pages and not engine.keeper.restorations
        assert tokens_of(engine, [stored.work]) == stored.tokens
        memory.close()
    assert min(restored) < stored.pages


@torch.inference_mode()
def test_a_store_replaced_meanwhile_is_no_danger(stored, again, nanochat_fixtures):
    """The file is cut, then another one is in its place, while its headers are known and its pages are not read yet."""
    [path] = segment_paths(stored.folder)
    data = path.read_bytes()
    ahead = again.keeper.ahead
    while not ahead.restoration:
        ahead.more()
        if ahead.waits:
            again.keeper.wait(1.0)
    path.write_bytes(data[:len(data) // 3])
    path.unlink()
    path.write_bytes(random.Random(1).randbytes(len(data)))
    restore_all(again)
    assert tokens_of(again, [stored.work]) == stored.tokens and again.pool.available == again.pool.num_pages


@torch.inference_mode()
def test_who_asks_never_waits_for_others_prefixes(stored, again, monkeypatch):
    """A prompt stops what is restored ahead. When nobody asks any more, that goes on."""
    keeper, read, asked = again.keeper, again.keeper.kept.read, Event()

    def held(key):
        assert asked.wait(60)
        return read(key)

    monkeypatch.setattr(keeper.kept, "read", held)
    while not keeper.ahead.restoration:
        keeper.ahead.more()
        if keeper.ahead.waits:
            keeper.wait(0.1)
    again.add(assignment("other", (1, 2, 3), SamplingParams(temperature=0.0), 2))
    assert keeper.ahead.rests and keeper.ahead.restoration.over
    asked.set()
    while again.busy:
        again.step()
    assert keeper.ahead.is_due
    restore_all(again)
    assert cached(again, stored.work) == stored.pages * PAGE_SIZE


@torch.inference_mode()
def test_a_silent_disk_ends_restoring_ahead(again, monkeypatch, caplog):
    """A disk that does not answer is asked no more, and holds nobody up."""
    keeper, answers, began = again.keeper, Event(), Event()

    def hang(key):
        began.set()
        assert answers.wait(60)

    monkeypatch.setattr(keeper.kept, "read", hang)
    while not keeper.ahead.restoration:
        keeper.ahead.more()
        if keeper.ahead.waits:
            keeper.wait(0.1)
    assert began.wait(60)
    keeper.STUCK_S = 0.0
    keeper.ahead.more()
    keeper.ahead.more()
    assert not keeper.ahead.is_due and not keeper.restorations and len(caplog.records) == 1
    answers.set()
    keeper.reader.threads.shutdown()
    again.step()
    assert again.pool.available == again.pool.num_pages


@torch.inference_mode()
def test_no_page_that_holds_anything_is_taken(stored, nanochat_fixtures):
    """At most a quarter of the cache is filled, and nothing that it holds is evicted."""
    for pages, used in ((4 * stored.pages // 2, 0), (8 * stored.pages, 7 * stored.pages)):
        engine = keep(make(nanochat_fixtures / "gen5", num_pages=pages), Memory(), stored.folder)
        held = engine.pool.take(used)
        free = len(engine.pool.free)
        restore_all(engine)
        taken = engine.keeper.counts["restored_tokens"] // PAGE_SIZE
        assert taken == max(pages // 4 - used, 0) and len(engine.pool.free) == free - taken
        engine.pool.release(held)
        assert tokens_of(engine, [stored.work]) == stored.tokens


@torch.inference_mode()
def test_an_emptied_cache_stays_empty(stored, again):
    """Memory that another model was given is not taken again by what nobody asks for."""
    again.keeper.ahead.more()
    again.empty_cache()
    restore_all(again)
    assert not again.pool.index and again.pool.available == again.pool.num_pages and not again.keeper.restorations


def test_providing_memory_changes_no_byte(again):
    """Memory is provided for pages whatever they hold; addresses that are no memory are only refused."""
    rows = again.keeper.memory.rows
    rows[:] = torch.randint(0, 255, rows.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
    before = rows.copy()
    again.keeper.memory.provide([*range(50), 60, 61, again.pool.num_pages - 1], lambda: False)
    assert (rows == before).all()
    populate(1 << 46, 1 << 12)


def asking(work):
    return [NewRequest(work.id, work.params), NewPrompt(work.id, 0, work.prompt_ids), NewAnswer(work.id, work.id, 0, 0, work.max_tokens)]


@pytest.mark.parametrize("early", [False, True])
@torch.inference_mode()
def test_a_worker_restores_while_nobody_asks(stored, again, early):
    """Its loop does, and answers what comes after that, or in the middle of it."""
    class PatientFront(Front):
        def receive(self, wait, patience_s=None):
            if patience_s is None:
                return super().receive(wait)
            if early and again.keeper.ahead.restoration and len(self.batches) > 1:
                return self.batches.pop(0)
            again.keeper.wait(patience_s)
            return []

    other = assignment("other", (1, 2, 3), SamplingParams(temperature=0.0), 2)
    front = PatientFront(*([asking(other)] if early else []), asking(stored.work))
    with pytest.raises(EOFError):
        WorkerLoop(front, again, SimpleNamespace(settings=Settings(stream_interval=0), device="cpu")).run()
    said = [token for name, event in front.events if name == stored.work.id for token in getattr(event, "tokens", ())]
    ends = {name: event for name, event in front.events if hasattr(event, "usage")}
    assert said == stored.tokens[stored.work.id] and len(ends) == 1 + early
    assert ends[stored.work.id].usage.cached_tokens == stored.pages * PAGE_SIZE
