"""Pages that outlive the process: restored ones equal computed ones to the bit, and no fault of a store is more than a recomputation."""

import dataclasses
import gc
import itertools
import math
import os
import random
from concurrent.futures import wait
from contextlib import ExitStack
from threading import Event
from types import SimpleNamespace

import numpy
import pytest
import torch

from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.core import decode_core
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.protocol import WorkerConfig
from chatlm.common.messages.requests import Ended
from chatlm.common.segments import HEADER_BYTES, MOST_GROUPS, PAGE, ROOT, STATE, Record, check_folder, locked, segment_paths
from chatlm.common.tiers import listed_store, prune
from chatlm.front.pool.prefixes import StoreWriter
from chatlm.worker.engine.keeper import PageReader
from chatlm.worker.engine.kept_pages import KeptPages, checksum
from chatlm.worker.engine.states import StatePool
from chatlm.worker.engine.warm_up import WarmUp
from chatlm.worker.model import pages as model_pages
from chatlm.worker.model.pages import KvType
from chatlm.worker.prefixes import PrefixPlan
from chatlm.worker.weights.loaded.digest import arithmetic_of, files_of, fingerprint_of, profile_of, whole_digest
from engines import chat_work, make_engine, tokens_of
from families import make_model, save
from kept_prefixes import CHANGES, Memory, bits_of, cached, conversations, flip, keep, make, writing
from limits import files_of_at_most
from nightly import WHOLE, by_day
from powerless import powerless
from works import changed

PACKED = KvType("float32", packed=True)
BACKENDS = [pytest.param("reference", marks=pytest.mark.slow), pytest.param("decode_core", marks=pytest.mark.skipif(decode_core() is None, reason="not built"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("generation", by_day(["gen1", "gen3", "gen5"], "gen5"))
@torch.inference_mode()
def test_restored_pages_equal_computed_ones(nanochat_fixtures, tmp_path, generation, backend):
    """Restored pages equal computed ones to the bit in random conversations."""
    for seed in range(2):
        memory, folder = Memory(), tmp_path / str(seed)
        folder.mkdir()
        works = conversations(seed)
        alone = {work.id: tokens_of(make(nanochat_fixtures / generation, backend), [work])[work.id] for work in works}
        first = keep(make(nanochat_fixtures / generation, backend), memory)
        with writing(folder, memory):
            assert tokens_of(first, works) == alone
        memory.close()
        other = Memory()                      # nothing of the first process is left but the store
        again = keep(make(nanochat_fixtures / generation, backend), other, folder)
        assert tokens_of(again, works) == alone
        assert again.keeper.counts["restored_tokens"] > 200 and again.pool.available == again.pool.num_pages
        pages, expected = bits_of(again)[0], bits_of(first)[0]
        assert pages.keys() & expected.keys()
        if again.kernels.row_invariant:     # torch computes a page's last bits by what else is in the step
            assert all(pages[address] == expected[address] for address in pages.keys() & expected.keys())
        other.close()


KEPT = [*((name, None) for name in ("lfm2", "qwen3.5", "granite4h", "gemma3", "gemma4", "mistral")),
        *((name, PACKED) for name in ("qwen3.5", "gemma3", "gemma4", "kimi2"))]


@pytest.mark.parametrize("name, kv", by_day(KEPT, ("lfm2", None), ("gemma3", None), ("gemma4", PACKED), ("kimi2", PACKED)))
@torch.inference_mode()
def test_states_and_windows_are_restored_too(name, kv, tmp_path, memory, monkeypatch, one_thread):
    """Snapshots of states and pages of layers with windows are restored too."""
    monkeypatch.setattr(StatePool, "INTERVAL", 64)
    folder = save(make_model(name), tmp_path / "model")
    works = conversations(7)
    def made():
        return make(folder, "decode_core" if decode_core() else "reference", apart=True, kv=kv)
    assert ("q8_0" in made().transformer.layout.types) == (kv is PACKED)
    alone = {work.id: tokens_of(made(), [work])[work.id] for work in works}
    first = keep(made(), memory)
    assert tokens_of(first, works) == alone
    again = keep(made(), memory)
    assert tokens_of(again, works) == alone and again.keeper.counts["restored_tokens"] > 100
    for mine, its in zip(bits_of(again), bits_of(first)):
        assert all(mine[address] == its[address] for address in mine.keys() & its.keys())
    assert not again.pool.states or bits_of(again)[1].keys() & bits_of(first)[1].keys()


@torch.inference_mode()
def test_an_owner_never_sees_another_s_pages(nanochat_fixtures, memory):
    """An owner neither reads another's pages nor notices them."""
    first = keep(make(nanochat_fixtures / "gen5"), memory)
    [work] = conversations(1, 1)
    tokens_of(first, [changed(work, owner="alice")])
    again = keep(make(nanochat_fixtures / "gen5"), memory)
    assert cached(again, changed(work, owner="bob")) == 0 and again.keeper.counts["restored_tokens"] == 0
    assert cached(again, changed(work, owner="alice")) == again.keeper.counts["restored_tokens"] > 0


@torch.inference_mode()
def test_pages_of_other_weights_are_not_found(nanochat_fixtures, memory):
    """Pages of other weights or another arithmetic are not found."""
    [work] = conversations(2, 1)
    tokens_of(keep(make(nanochat_fixtures / "gen5"), memory), [work])
    assert cached(keep(make(nanochat_fixtures / "gen5"), memory, profile=b"q" * 16), work) == 0


def test_the_profile_changes_with_what_changes_bits(nanochat_fixtures, tmp_path):
    """The profile changes with weights, types, kernels and context."""
    engine, settings = make(nanochat_fixtures / "gen5"), Settings(model=str(nanochat_fixtures / "gen5"))
    source = resolve_model(settings)
    files = files_of(source, settings)
    same, other = arithmetic_of(engine.transformer, settings), tmp_path / source.path.name
    assert profile_of("a", same) == profile_of("a", arithmetic_of(make(nanochat_fixtures / "gen5").transformer, settings))
    changes = [Settings(model=settings.model, dtype="float32"), Settings(model=settings.model, quantize="q8_0")]
    profiles = {profile_of("a", same), profile_of("b", same), *(profile_of("a", arithmetic_of(engine.transformer, its)) for its in changes),
                *(profile_of("a", arithmetic_of(its.transformer, settings)) for its in (
                   make(nanochat_fixtures / "gen5", "reference"), make(nanochat_fixtures / "gen5", kv=KvType("bfloat16"))))}
    assert len(profiles) == 5 + (decode_core() is not None)
    other.write_bytes(source.path.read_bytes())
    before = whole_digest([other], fingerprint_of([other]), tmp_path)
    assert before == whole_digest([source.path], fingerprint_of([source.path]), tmp_path) and files[0] == source.path
    data = bytearray(other.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    assert whole_digest([other], fingerprint_of([other]), tmp_path) != before
    assert oct((tmp_path / "weights.json").stat().st_mode)[-3:] == "600"
    stamp = fingerprint_of([other])
    other.write_bytes(data + b"x")
    (tmp_path / "weights.json").unlink()
    with pytest.raises(OSError, match="changed since"):
        whole_digest([other], stamp, tmp_path)


@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_a_tampered_store_never_gives_a_wrong_token(stored, nanochat_fixtures, change, caplog):
    """A store that was tampered with costs a recomputation, and never a wrong token."""
    dice, [path] = random.Random(change.__name__), segment_paths(stored.folder)
    data, restored, trials = path.read_bytes(), [], 6 if WHOLE else 3
    for _ in range(trials):
        path.write_bytes(change(bytearray(data), dice))
        other = Memory()
        engine = keep(make(nanochat_fixtures / "gen5"), other, stored.folder)
        assert tokens_of(engine, [stored.work]) == stored.tokens
        assert engine.pool.available == engine.pool.num_pages
        restored.append(engine.keeper.counts["restored_tokens"] // PAGE_SIZE)
        other.close()
    assert min(restored) < stored.pages and len(caplog.records) <= trials, restored


@torch.inference_mode()
def test_a_store_deleted_in_use_is_only_empty(stored, nanochat_fixtures, memory):
    """A store that is deleted while a server uses it is no more than empty."""
    engine = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder)
    assert len(engine.keeper.kept.store.index) >= stored.pages
    for path in segment_paths(stored.folder):
        path.unlink()
    engine.keeper.kept.looked_s = -1e9
    engine.keeper.kept.look_at_store()
    assert not engine.keeper.kept.store.index and tokens_of(engine, [stored.work]) == stored.tokens


@torch.inference_mode()
def test_a_silent_disk_delays_a_prompt_by_its_grace(stored, nanochat_fixtures, monkeypatch):
    """A disk that does not answer holds a prompt up no longer than its grace."""
    engine = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder)
    answers, began = Event(), Event()

    def hang(key):
        began.set()
        assert answers.wait(60)

    monkeypatch.setattr(engine.keeper.kept, "read", hang)
    engine.keeper.pace.GRACE_S = engine.keeper.pace.GRACE_SHARE = engine.keeper.STUCK_S = 0.0
    assert tokens_of(engine, [stored.work]) == stored.tokens and began.is_set()
    answers.set()
    engine.keeper.reader.threads.shutdown()
    engine.step()
    assert engine.pool.available == engine.pool.num_pages and engine.keeper.counts["restored_tokens"] == 0


@torch.inference_mode()
def test_memory_of_copied_pages_is_read_into_again(stored, nanochat_fixtures, monkeypatch):
    """One page at a time is under way here, so one buffer is enough, for pages and for a state; then it is given back."""
    monkeypatch.setattr(PageReader, "BATCHES", 1)
    monkeypatch.setattr(PageReader, "BATCH_BYTES", 1)
    engine = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder)
    kept = engine.keeper.kept
    read, places = kept.read, []

    def noted(key):
        found = read(key)
        places.append(id(found[1].obj))
        return found

    monkeypatch.setattr(kept, "read", noted)
    assert tokens_of(engine, [stored.work]) == stored.tokens
    assert len(places) == stored.pages and len({*places}) <= 3, "one is read, one waits, one is copied"
    assert not kept.spare and engine.keeper.counts["restored_tokens"] == stored.pages * PAGE_SIZE


def test_a_buffer_that_is_too_small_is_replaced(tmp_path):
    """Records of states and of pages have different sizes."""
    memory = Memory()
    kept = KeptPages(memory.paths, memory.size, None, "m")
    kept.use_profile(b"p" * 16)
    payloads = [numpy.full(size, size % 251, numpy.uint8) for size in (100, 5000, 70, 5000)]
    for number, payload in enumerate(payloads):
        assert kept.add(PAGE, bytes([number]) * 16, payload)
    for number, payload in [*enumerate(payloads), *enumerate(payloads)]:
        record, view = kept.read(kept.key(PAGE, bytes([number]) * 16))
        assert record.size == len(view) == len(payload) and bytes(view) == payload.tobytes()
        kept.reuse(view)
    assert len(kept.spare) <= 2
    memory.close()


@pytest.mark.parametrize("ahead", [1, 32])
@torch.inference_mode()
def test_a_long_step_is_no_silent_disk(stored, nanochat_fixtures, monkeypatch, caplog, ahead):
    """All that the disk is asked for comes while the engine computes: as much as is read ahead of it, or the whole prompt."""
    monkeypatch.setattr(PageReader, "BATCHES", ahead)
    monkeypatch.setattr(PageReader, "BATCH_BYTES", 1)
    engine = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder)
    engine.add(stored.work)
    engine.step()
    engine.keeper.STUCK_S = 0.0
    [restoration] = engine.keeper.restorations
    while len(engine.keeper.reader.arrived) < min(ahead, stored.pages) or restoration.read_began_s < math.inf:
        engine.keeper.reader.wait(0.01)
    engine.keeper.settle()                      # the step is over, long after the first page came
    engine.keeper.STUCK_S = 60.0
    assert engine.keeper.restorations == [restoration] and not caplog.records
    tokens = []
    while engine.busy:
        tokens += [token for _, event in engine.step() for token in getattr(event, "tokens", ())]
    assert tokens == stored.tokens[stored.work.id] and engine.keeper.counts["restored_tokens"] == stored.pages * PAGE_SIZE


@pytest.mark.parametrize("prefill_chunk, max_batch, context", by_day([
    *itertools.product((1, 16, 48, 256), (1, 3, 16), (None,)), (256, 3, 96), (48, 1, 64)],
    (1, 1, None), (16, 3, None), (256, 16, None), (256, 3, 96), (48, 1, 64)))
@torch.inference_mode()
def test_computing_speed_is_known_before_any_prompt(
        nanochat_fixtures, memory, tmp_path, prefill_chunk, max_batch, context):
    """Else nothing would seem worth reading."""
    flags = {"prefill_chunk": prefill_chunk, "max_batch": max_batch, "context_length": context}
    engine = keep(make(nanochat_fixtures / "gen5", **flags), memory)
    engine.times.timed_tokens = make(nanochat_fixtures / "gen5", **flags).times.timed_tokens
    engine.times.token_s = 0.0
    WarmUp(engine).complete(lambda fraction: None)
    assert engine.keeper.pace.times is engine.times and engine.times.token_s > 0
    [work] = conversations(11, 1, most=60)
    work = dataclasses.replace(work, max_tokens=2)
    tokens_of(keep(engine, memory), [work])
    again = keep(make(nanochat_fixtures / "gen5", **flags), memory, token_s=engine.times.token_s)
    again.keeper._pays = lambda restoration: again.times.token_s > 0
    assert cached(again, work) == (len(work.prompt_ids) - 1) // PAGE_SIZE * PAGE_SIZE > 0


@torch.inference_mode()
def test_a_computing_prompt_takes_pages_that_arrive(stored, nanochat_fixtures, monkeypatch):
    """Computing begins although reading has, and takes over what is there first."""
    engine = keep(make(nanochat_fixtures / "gen5", prefill_chunk=32), Memory(), stored.folder)
    read, engine.keeper.pace.GRACE_S = engine.keeper.kept.read, 0.0
    steps = Event()

    def late(key):
        assert steps.wait(60)
        return read(key)

    monkeypatch.setattr(engine.keeper.kept, "read", late)
    engine.times.token_s = 1e-9    # as if computing were far ahead
    monkeypatch.setattr(engine.keeper, "_pays", lambda restoration: True)
    engine.add(stored.work)
    engine.step()
    [sequence] = engine.queue.running
    assert 0 < sequence.computed < 200
    steps.set()
    wait([engine.keeper.reader.threads.submit(lambda: None) for _ in range(2)])
    while not engine.keeper.reader.arrived or engine.keeper.reader.arrived[-1][1] is not None:
        engine.keeper.reader.wait(1)
    tokens, computed = [], []
    while engine.busy:
        before = sequence.computed
        tokens += [token for _, event in engine.step() for token in getattr(event, "tokens", ())]
        computed.append(sequence.computed - before)
    assert tokens == stored.tokens[stored.work.id] and max(computed) > 32 + PAGE_SIZE
    assert engine.pool.available == engine.pool.num_pages


@torch.inference_mode()
def test_a_failed_first_step_leaves_pages_kept(nanochat_fixtures, memory, monkeypatch):
    """A first step that fails while nobody asks leaves pages kept."""
    engine = keep(make(nanochat_fixtures / "gen5"), memory)
    engine.drafts = True
    warm_up = WarmUp(engine)
    warm_up.left = [(1, 1)]

    def fail(batch, rows):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(engine.runner, "start", fail)
        warm_up.more()
    engine.give_up()
    assert engine.queue.gates == [engine.keeper.awaits] and engine.drafts
    [work] = conversations(11, 1, most=60)
    tokens_of(engine, [work])
    assert engine.keeper.counts["kept_pages"] > 0


@torch.inference_mode()
def test_what_is_computed_faster_than_read_is_computed(stored, nanochat_fixtures):
    engine = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder)
    engine.times.token_s, engine.keeper.pace.byte_s = 1e-7, 1e-6
    assert cached(engine, stored.work) == 0 and engine.keeper.counts["missed_pages"] == 0
    engine = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder)
    engine.keeper.pace.byte_s = engine.keeper.kept.disk_byte_s()
    assert 0 < engine.keeper.pace.byte_s < 1e-3 and cached(engine, stored.work) == stored.pages * PAGE_SIZE


@torch.inference_mode()
def test_the_last_step_is_kept_before_the_end_is_told(nanochat_fixtures, memory):
    """What the last step has filled is kept before anybody hears of the end."""
    [work] = conversations(4, 1)
    engine, events = keep(make(nanochat_fixtures / "gen5", prefill_chunk=512), memory), []
    engine.add(changed(work, logprobs=0, max_tokens=1))     # so the step that ends it is that of the prompt
    while not any(isinstance(event, Ended) for event in events):
        events = [event for _, event in engine.step()]
    keys = {engine.keeper.kept.key(PAGE, engine.pool.addresses[content.serial]) for content in engine.pool.index.values()}
    assert len(keys) == len(work.prompt_ids) // PAGE_SIZE > 0 and keys <= engine.keeper.kept.memory.index.keys() and not engine.keeper.copier.behind


@torch.inference_mode()
def test_a_prompt_with_nothing_kept_waits_for_none(stored, nanochat_fixtures, monkeypatch):
    """A prompt of which nothing is kept waits for no other."""
    engine, answers = keep(make(nanochat_fixtures / "gen5", max_batch=8), Memory(), stored.folder), Event()
    read, [fresh] = engine.keeper.kept.read, conversations(5, 1)
    alone = tokens_of(make(nanochat_fixtures / "gen5"), [fresh])
    monkeypatch.setattr(engine.keeper.kept, "read", lambda key: answers.wait(60) and read(key))
    waiting = [changed(stored.work, id=f"kept {number}") for number in range(6)]
    for work in (*waiting, fresh):
        engine.add(work)
    tokens = []
    while len(tokens) < len(alone[fresh.id]):
        tokens += [token for id_, event in engine.step() if id_ == fresh.id for token in getattr(event, "tokens", ())]
    assert tokens == alone[fresh.id] and [sequence.work.id for sequence in engine.queue.waiting] == [work.id for work in waiting]
    engine.cancel("kept 0")
    answers.set()
    left = {work.id: [] for work in waiting}
    while engine.busy:
        for id_, event in engine.step():
            left.setdefault(id_, []).extend(getattr(event, "tokens", ()))
    assert [left[work.id] for work in waiting] == [[]] + 5 * [stored.tokens[stored.work.id]]
    assert engine.pool.available == engine.pool.num_pages


@torch.inference_mode()
def test_nothing_is_read_for_who_has_gone(stored, nanochat_fixtures, monkeypatch):
    engine, answers = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder), Event()
    read, keys = engine.keeper.kept.read, []
    monkeypatch.setattr(engine.keeper.kept, "read", lambda key: keys.append(key) or answers.wait(60) and read(key))
    engine.add(stored.work)
    while not keys:
        engine.step()
    engine.cancel(stored.work.id)
    answers.set()
    engine.keeper.reader.threads.shutdown()
    engine.step()
    assert len(keys) == 1 and not engine.keeper.restorations and engine.pool.available == engine.pool.num_pages


@torch.inference_mode()
def test_what_another_server_stored_is_found(stored, nanochat_fixtures):
    """It is looked for when a prompt comes, which waits for that: 1 ms."""
    [work], memory = conversations(6, 1), Memory()
    engine = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder)
    with writing(stored.folder, memory):
        expected = tokens_of(keep(make(nanochat_fixtures / "gen5"), memory), [work])
    engine.keeper.kept.looked_s = -1e9      # longer than LOOK_S ago
    assert tokens_of(engine, [work]) == expected and engine.keeper.counts["restored_tokens"] > 0
    memory.close()


def test_pages_on_disk_are_told_from_those_in_memory(stored, memory):
    """What lies on the disk is told from what is in memory."""
    kept = KeptPages(memory.paths, memory.size, stored.folder, "m")
    kept.profile = b"p" * 16
    kept.look_at_memory()
    in_memory = [*kept.memory.index]
    assert in_memory and not any(map(kept.on_disk, in_memory))
    kept = KeptPages([], 0, stored.folder, "m")
    kept.profile = b"p" * 16
    kept.look_at_store()
    assert {*in_memory} == {*kept.store.index} and all(map(kept.on_disk, in_memory))


def address(number):
    return b"n" + number.to_bytes(15, "big")


def keep_chain(kept, numbers, size=100_000, begin=ROOT):
    """Keep a chain of pages with these numbers; returns how many there was room for."""
    for done, number in enumerate(numbers):
        if not kept.add(PAGE, address(number), numpy.full(size, number % 251, numpy.uint8), parent=begin):
            return done
        begin = address(number)
    return len(numbers)


def opened(memory, store=None, profile=b"p" * 16):
    kept = KeptPages(memory.paths, memory.size, store, "the model")
    kept.profile = profile
    kept.look_at_memory()
    return kept


def length_of(kept, numbers):
    """How many of a chain's first pages can be read."""
    return next((done for done, number in enumerate(numbers) if kept.read(kept.key(PAGE, address(number))) is None), len(numbers))


def test_memory_drops_the_oldest_chain_ends_first(memory):
    """In memory, ends of chains go least recently used first, whichever worker kept them."""
    workers = [opened(memory) for _ in range(2)]
    chains = [range(1000 * number, 1000 * number + 50) for number in range(1, 61)]     # 5 MB each: ten times what there is room for
    for number, chain in enumerate(chains):
        assert keep_chain(workers[number % 2], chain) == len(chain)
        for kept in workers:
            kept.look_at_memory()
        assert sum(os.fstat(descriptor).st_size for descriptor in memory.descriptors) <= memory.size + 200_000
        assert length_of(kept, chain) == len(chain)
    lengths = [length_of(opened(memory), chain) for chain in chains]
    assert lengths[-6:] == [50] * 6 and not any(lengths[:-7]), lengths
    kept = workers[0]
    kept.use(kept.key(PAGE, address(chains[-6][-1])))
    assert keep_chain(kept, range(1, 51)) == 50
    lengths = [length_of(opened(memory), chain) for chain in chains[-6:]]
    assert lengths == [50, lengths[1], 50, 50, 50, 50] and lengths[1] < 50        # the one that was used stays, the next one goes from its end
    assert not kept.add(PAGE, b"x" * 16, numpy.zeros(memory.size, numpy.uint8))


def test_a_beginning_stays_while_chains_need_it(memory):
    """A beginning stays as long as chains go on from it."""
    kept = opened(memory)
    keep_chain(kept, range(1, 100))             # ten pages of a system prompt, and the first conversation after it
    for number in range(2, 40):
        assert keep_chain(kept, range(1000 * number, 1000 * number + 90), begin=address(10)) == 90
    assert length_of(opened(memory), range(1, 100)) == 10
    assert all(length_of(opened(memory), range(1000 * number, 1000 * number + 90)) == 90 for number in (38, 39))


def test_a_chain_longer_than_memory_keeps_its_start(memory):
    """Of a chain that is longer than memory the beginning is kept, and nothing without one."""
    kept = opened(memory)
    keep_chain(kept, range(1, 50))
    assert 300 < keep_chain(kept, range(1000, 2000)) < 335
    assert length_of(kept, range(1, 50)) == 0 and length_of(opened(memory), range(1000, 2000)) > 300


def test_a_store_keeps_an_end_for_each_segment(memory):
    """As many ends of chains are kept as there are segments."""
    kept = opened(memory)
    for number in range(1, 200):
        assert keep_chain(kept, range(10 * number, 10 * number + 3), size=100) == 3
    assert [length_of(opened(memory), range(10 * number, 10 * number + 3)) for number in range(1, 200)] == [0] * 135 + [3] * 64


def test_a_worker_that_dies_writing_harms_no_record(memory):
    """A worker that died over a record leaves the others and a segment to go on with."""
    kept = opened(memory)
    keep_chain(kept, range(1, 4), size=1000)
    [segment] = [segment for segment in kept.memory.segments.values() if segment.entries]
    os.ftruncate(segment.file.fileno(), segment.end - 1)
    after = opened(memory)
    assert len(after.memory.index) == 2
    keep_chain(after, [7], begin=address(2), size=10)
    assert after.memory.index[after.key(PAGE, address(7))].segment.name == segment.name
    assert opened(memory).memory.index.keys() == after.memory.index.keys() and len(after.memory.index) == 3


def test_a_checksum_tells_every_changed_byte():
    """A checksum tells every byte and sectors that are exchanged."""
    dice = random.Random(0)
    for size in (0, 1, 8, 5000, 100_000, 1 << 20):
        data = numpy.frombuffer(dice.randbytes(size), numpy.uint8)
        sums = {checksum(data)}
        for _ in range(30 if size else 0):
            other, place = data.copy(), dice.randrange(size)
            other[place] ^= 1 << dice.randrange(8)
            sums.add(checksum(other))
        for _ in range(30 if size > 9000 else 0):
            one, two = dice.sample(range(size // 512), 2)
            other = data.copy()
            other[one * 512:][:512], other[two * 512:][:512] = data[two * 512:][:512], data[one * 512:][:512]
            sums.add(checksum(other))
        assert len(sums) > 1 or not size
        assert checksum(data) == checksum(memoryview(data.tobytes()))
    header = Record(STATE, 3 << MOST_GROUPS - 2, b"p" * 16, b"a" * 16, b"b" * 16, (1,) * PAGE_SIZE, 7, b"c" * 16)
    assert Record.unpack(header.pack()) == header and len(header.pack()) == HEADER_BYTES
    assert Record.unpack(flip(bytearray(header.pack()), dice)) is None and Record.unpack(b"") is None


def fill(memory, first, count, size=100_000, begin=None):
    """Keep a chain, which continues the one that ended before its first number unless it has another beginning."""
    begin = begin or (address(first - 1) if first else ROOT)
    assert keep_chain(opened(memory), range(first, first + count), size, begin) == count


def stored_pages(folder):
    kept = KeptPages([], 0, folder, "")
    kept.profile = b"p" * 16
    kept.look_at_store()
    return {int.from_bytes(key[18:], "big") for key in [*kept.store.index] if kept.read(key)}


def test_two_servers_keep_a_store_to_its_size(tmp_path):
    """A store keeps to its size, and two servers write to it."""
    limit, memories = 16 << 20, [Memory(), Memory()]
    with writing(tmp_path, memories[0], limit) as one, writing(tmp_path, memories[1], limit) as two:
        for first in range(0, 400, 40):
            for number, memory in enumerate(memories):
                fill(memory, 1000 * number + first, 40, begin=ROOT)
            for writer in (one, two):
                while writer.pages < first + 40:
                    writer.thread.join(0.01)
                    assert not writer.trouble and writer.thread.is_alive()
    assert sum(path.stat().st_size for path in segment_paths(tmp_path)) <= limit + 2 * StoreWriter.BATCH_BYTES
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in segment_paths(tmp_path))
    pages = stored_pages(tmp_path)
    assert {399, 1399} <= pages and 0 not in pages and len(pages) > 100


@pytest.mark.parametrize("shared", by_day([0, 7], 7))
def test_a_refilled_store_has_the_newest_conversations(tmp_path, shared):
    """Conversations of 5 MB in 16 MB, which may have a beginning in common; each one's second half comes after another's first half."""
    limit, memory, begin, expected = 16 << 20, Memory(), ROOT, shared
    with writing(tmp_path, memory, limit) as writer:
        if shared:
            fill(memory, 0, shared)
            begin = address(shared - 1)
        for number, half in [(number, half) for newest in range(1, 33) for number, half in ((newest, 0), (newest - 1, 1)) if number]:
            fill(memory, 1000 * number + 25 * half, 25, begin=None if half else begin)
            expected += 25
            while writer.pages < expected:
                writer.thread.join(0.01)
                assert not writer.trouble and writer.thread.is_alive()
            assert sum(path.stat().st_size for path in segment_paths(tmp_path)) <= limit
    kept = opened(Memory(), tmp_path)
    kept.look_at_store()
    assert length_of(kept, range(shared)) == shared
    lengths = {number: length_of(kept, range(1000 * number, 1000 * number + 50)) for number in range(1, 33)}
    assert lengths[32] == 25 and lengths[31] == lengths[30] == 50 and not any(lengths[number] for number in range(1, 28)), lengths
    sizes = sum(path.stat().st_size for path in segment_paths(tmp_path))
    assert sizes > 0.9 * limit
    memory.close()


def test_what_is_too_long_keeps_its_beginning(tmp_path):
    """What is too long for a store keeps its beginning, and the next one comes whole."""
    memory = Memory()
    with writing(tmp_path, memory, 8 << 20):
        fill(memory, 0, 200)
    with writing(tmp_path, memory, 8 << 20):
        fill(memory, 1000, 40, begin=ROOT)
    kept = opened(Memory(), tmp_path)
    kept.look_at_store()
    assert 30 < length_of(kept, range(200)) < 45 and length_of(kept, range(1000, 1040)) == 40
    memory.close()


def test_memory_passes_long_conversations_to_the_store(tmp_path):
    """A conversation that is longer than memory reaches the store through it."""
    memory = Memory(size=8 << 20)
    with writing(tmp_path, memory):
        kept, begin = opened(memory, tmp_path), ROOT
        for number in range(400):       # 40 MB
            while not keep_chain(kept, [number], begin=begin):      # until the store has what was kept first
                kept.looked_s = -1e9
                kept.look_at_store()
            begin = address(number)
            assert sum(os.fstat(descriptor).st_size for descriptor in memory.descriptors) <= memory.size
    kept = opened(Memory(), tmp_path)
    kept.look_at_store()
    assert length_of(kept, range(400)) == 400
    memory.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_segment_leaves_a_beginning_to_go_on(tmp_path, seed):
    """As kill -9 leaves it, in the middle of a record, of a header, of the head of a segment."""
    dice, memory = random.Random(seed), Memory()
    with writing(tmp_path, memory):
        fill(memory, 0, 12, size=3000)
    memory.close()
    [path] = segment_paths(tmp_path)
    entries = [*(kept := opened(Memory(), tmp_path)).store.segments.values()] or kept.look_at_store() or [*kept.store.segments.values()][0].entries
    end = dice.choice([dice.randrange(path.stat().st_size), dice.choice(entries).begin + dice.randrange(HEADER_BYTES), dice.randrange(20)])
    os.truncate(path, end)
    whole, memory = sum(entry.end <= end for entry in entries), Memory()
    kept = opened(Memory(), tmp_path)
    kept.look_at_store()
    assert length_of(kept, range(12)) == whole
    fill(memory, 0, 20, size=3000)              # the conversation is computed anew, and goes on
    with writing(tmp_path, memory):
        pass
    kept.looked_s = -1e9
    kept.look_at_store()
    assert length_of(kept, range(20)) == 20
    memory.close()


def test_deleted_pages_leave_no_file_open_elsewhere(tmp_path):
    """Pages that a server deletes leave no file open in another one's workers."""
    memory = Memory()
    with writing(tmp_path, memory):
        for number in range(20):
            fill(memory, 1000 * number, 3, begin=ROOT)
    gc.collect()        # files of engines of other tests
    kept, before = opened(Memory(), tmp_path), {*os.listdir("/proc/self/fd")}
    kept.look_at_store()
    assert length_of(kept, range(3)) == 3 and {*os.listdir("/proc/self/fd")} == before
    assert prune(tmp_path, 0) == 20 and {*os.listdir("/proc/self/fd")} == before and length_of(kept, range(1000, 1003)) == 0
    kept.looked_s = -1e9
    kept.look_at_store()
    assert not kept.store.index and not kept.store.bytes
    memory.close()


def test_what_is_no_file_of_a_store_is_left_alone(tmp_path, memory, caplog):
    """A FIFO for which nobody is heard, a folder, a link to nowhere, files of other versions."""
    os.mkfifo(tmp_path / "a.pages")
    (tmp_path / "b.pages").mkdir()
    (tmp_path / "c.pages").symlink_to("/nowhere")
    (tmp_path / "d.pages").write_bytes(b"cskv0001" + bytes(5 << 20))
    (tmp_path / "e.pages").touch()
    fill(memory, 0, 5)
    with writing(tmp_path, memory, 4 << 20) as writer:
        while writer.pages < 5:
            writer.thread.join(0.01)
            assert writer.thread.is_alive() and not writer.trouble
    assert stored_pages(tmp_path) == {*range(5)} and not caplog.records
    assert {path.name for path in tmp_path.iterdir()} >= {"a.pages", "b.pages", "c.pages"} and not (tmp_path / "d.pages").exists()
    assert "the model: 80 tokens in 5 pages" in listed_store(tmp_path)[1]


@pytest.mark.parametrize("groups", by_day([17, 33, 66], 66))
@torch.inference_mode()
def test_a_model_of_many_groups_restores_its_pages(tmp_path, memory, monkeypatch, groups):
    """A model with many groups of layers keeps and restores its pages."""
    monkeypatch.setattr(model_pages, "MOST_GROUPS", groups - 1)
    layers = 32 if groups == 17 else groups - 1
    folder = save(make_model("gemma3", num_hidden_layers=layers, layer_types=["sliding_attention"] * (layers - 1) + ["full_attention"]), tmp_path)
    def made():
        return make(folder, "reference", apart=True, num_pages=40 * groups)
    [work] = conversations(12, 1, most=100)
    work = dataclasses.replace(work, max_tokens=4)
    first = keep(made(), memory)
    assert len(first.pool.windows) == (groups if groups == 17 else groups - 1)
    expected = tokens_of(first, [work])
    again = keep(made(), memory)
    assert tokens_of(again, [work]) == expected and again.keeper.counts["restored_tokens"] == (len(work.prompt_ids) - 1) // PAGE_SIZE * PAGE_SIZE > 0


def test_a_model_of_too_many_groups_keeps_nothing(caplog, nanochat_fixtures):
    """A model with more groups than a record names keeps nothing, and says so."""
    plan = PrefixPlan(WorkerConfig(Settings(), None, "cpu", 1, ("/nowhere",), 1 << 20))
    plan.fingerprint = "stamp"
    plan.keep(SimpleNamespace(page_groups=MOST_GROUPS + 1))
    assert [record.getMessage() for record in caplog.records] == ["prefixes are not kept: the layers of this model are in 257 groups, and at most 256 can be kept"]


def test_a_writer_goes_on_in_a_torn_segment(tmp_path, memory):
    """A writer goes on in a segment that another has left torn."""
    fill(memory, 0, 5)
    with writing(tmp_path, memory):
        pass
    [path] = segment_paths(tmp_path)
    with path.open("ab") as file:
        file.write(b"torn" * 100)
    fill(memory, 5, 5)
    with writing(tmp_path, memory) as writer:
        pass
    assert segment_paths(tmp_path) == [path] and stored_pages(tmp_path) == {*range(10)} and writer.pages == 5


def test_a_full_disk_stops_the_store_for_a_while(tmp_path, memory, caplog, monkeypatch):
    """A full disk costs one line, and the store goes on when there is room."""
    fill(memory, 0, 20)
    monkeypatch.setattr(StoreWriter, "RETRY_S", 0.01)
    with ExitStack() as limits:
        limits.enter_context(files_of_at_most(300_000))
        with writing(tmp_path, memory) as writer:
            while not writer.trouble:
                writer.thread.join(0.01)
            limits.close()
            while writer.pages < 20:
                writer.thread.join(0.01)
    assert [record.getMessage() for record in caplog.records] == [f"prefixes are not stored in {tmp_path}: File too large"]
    assert stored_pages(tmp_path) == {*range(20)}


@torch.inference_mode()
def test_missing_memory_stops_keeping_for_a_while(nanochat_fixtures, memory, caplog):
    """Memory that is not there costs one line, and pages are kept again when it is."""
    works = conversations(8, 3)
    alone = tokens_of(make(nanochat_fixtures / "gen5"), works)
    engine = keep(make(nanochat_fixtures / "gen5"), memory)
    with files_of_at_most(20_000):
        for work in works[:2]:
            assert tokens_of(engine, [work])[work.id] == alone[work.id]
    assert [record.getMessage() for record in caplog.records] == ["prefixes are not kept in memory for a while: File too large"]
    kept, engine.keeper.copier.retry_s = engine.keeper.counts["kept_pages"], 0.0
    assert tokens_of(engine, [works[2]])[works[2].id] == alone[works[2].id] and engine.keeper.counts["kept_pages"] > kept


@torch.inference_mode()
def test_a_read_only_store_is_read_and_says_so(stored, nanochat_fixtures, memory, caplog):
    [path], [other] = segment_paths(stored.folder), conversations(9, 1)
    path.chmod(0o400)
    stored.folder.chmod(0o500)
    try:
        with powerless():
            with pytest.raises(PermissionError):
                (stored.folder / "x").touch()
            assert check_folder(stored.folder) == stored.folder
            engine = keep(make(nanochat_fixtures / "gen5"), big := Memory(), stored.folder)
            with writing(stored.folder, big) as writer:
                assert tokens_of(engine, [stored.work]) == stored.tokens and engine.keeper.counts["restored_tokens"] == stored.pages * PAGE_SIZE
                tokens_of(engine, [other])
                while not writer.trouble:
                    writer.thread.join(0.01)
            assert whole_digest([path], fingerprint_of([path]), stored.folder)
            assert [record.getMessage() for record in caplog.records] == [f"prefixes are not stored in {stored.folder}: Permission denied"]
            data = bytearray(path.read_bytes())
            data[next(entry.end for entry in engine.keeper.kept.store.index.values()) - 1] ^= 1
            stored.folder.chmod(0o700)
            path.unlink()
            path.write_bytes(data)
            stored.folder.chmod(0o500)
            caplog.clear()
            for _ in range(2):
                again = keep(make(nanochat_fixtures / "gen5"), Memory(), stored.folder)
                assert tokens_of(again, [stored.work]) == stored.tokens
            assert path.exists() and [record.getMessage() for record in caplog.records] == [
                f"a page in {path} is unusable (its checksum does not match) and is computed again"] * 2
    finally:
        stored.folder.chmod(0o700)


def test_a_file_continued_elsewhere_is_not_damaged(tmp_path, memory, caplog):
    """A server saw records before they were synced, and their writer took them back."""
    fill(memory, 0, 3, size=1000)
    with writing(tmp_path, memory):
        pass
    [path] = segment_paths(tmp_path)
    reader = KeptPages([], 0, tmp_path, "")
    reader.profile = b"p" * 16
    reader.look_at_store()
    old = reader.store.index[reader.key(PAGE, address(2))]
    payload = numpy.full(1000, 9, numpy.uint8)
    with path.open("r+b") as file:
        file.seek(old.begin)
        file.write(Record(PAGE, 0, b"p" * 16, b"new".ljust(16), address(1), (0,) * PAGE_SIZE, 1000, checksum(payload)).pack() + payload.tobytes())
    old = old.key
    assert reader.read(old) is None and path.exists() and not caplog.records
    assert reader.read(reader.key(PAGE, address(0))) is not None


def test_a_store_waits_while_answers_are_computed(tmp_path):
    """A store waits while answers are computed, unless the memory fills."""
    memory = Memory()
    fill(memory, 0, 10)
    with writing(tmp_path, memory, busy=lambda: True) as writer:
        for _ in range(3):
            writer.thread.join(0.05)
        assert writer.pages == 0
        fill(memory, 10, 200)
        while not writer.pages:
            writer.thread.join(0.01)
        assert writer.thread.is_alive()
    assert len(stored_pages(tmp_path)) == 210       # the end stores the rest
    memory.close()


def test_listing_names_models_and_pruning_is_careful(tmp_path, memory):
    """The listing names models, and pruning leaves what is written."""
    fill(memory, 0, 30)
    with writing(tmp_path, memory):
        pass
    lines = listed_store(tmp_path)
    assert len(lines) == 2 and "the model: 480 tokens in 30 pages, 3.0 MB" in lines[1]
    path = segment_paths(tmp_path)[0]
    with path.open("rb") as file, locked(file.fileno()):
        assert prune(tmp_path, 0) == len(segment_paths(tmp_path)) - 1 == 0
    assert listed_store(tmp_path, 0) == ["1 segments deleted", f"{tmp_path}: 0 segments, 0.0 MB"]


@torch.inference_mode()
def test_the_default_model_restores_a_prompt(default_model_path, memory, tmp_path):
    if decode_core() is None:
        pytest.skip("the promise is decode_core's")
    first = keep(make_engine(default_model_path, num_pages=100, max_batch=4, as_stored=True), big := Memory(size=256 << 20), tmp_path)
    work = chat_work(first, "a", "Tell me of the sea, of its tides, its winds and what lives in it. " * 20, 16)
    with writing(tmp_path, big):
        expected = tokens_of(first, [work])
    again = keep(make_engine(default_model_path, num_pages=100, max_batch=4, as_stored=True), Memory(), tmp_path)
    assert tokens_of(again, [work]) == expected
    assert again.keeper.counts["restored_tokens"] == (len(work.prompt_ids) - 1) // PAGE_SIZE * PAGE_SIZE > 200
    pages, known = bits_of(again)[0], bits_of(first)[0]
    assert all(pages[address] == known[address] for address in pages.keys() & known.keys())
