"""check_integrity names each fault that is planted in an engine, and finds none while answers come and go."""

import re
from types import SimpleNamespace

import pytest
import torch

import checked
from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.messages.protocol import NewAnswer, NewPrompt, NewRequest, Ping
from chatlm.common.messages.requests import AnswerParams, SamplingParams
from chatlm.worker.engine.integrity import IntegrityError, check_integrity, integrity_faults
from chatlm.worker.engine.keeper import Restoration
from chatlm.worker.engine.kvcache import Content
from chatlm.worker.loop import WorkerLoop
from engines import make_engine
from families import make_model, save
from lora import random_adapter
from worker_front import Front
from works import assignment

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = SimpleNamespace(settings=Settings())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with an adapter, and one whose layers keep states."""
    root, llama = tmp_path_factory.mktemp("models"), make_model("llama3.1")
    config = llama.config
    shapes = {"mlp.down_proj": (config.hidden_size, config.intermediate_size)}
    return {"llama": save(llama, root / "llama"), "lfm2": save(make_model("lfm2"), root / "lfm2"),
            "adapter": random_adapter(root / "adapter", config.num_hidden_layers, shapes, 1)}


def work(name, first, adapter="", length=50):
    """The prompts of two works with equal `first` begin with the same two pages."""
    ids = [(first + i) % 200 for i in range(2 * PAGE_SIZE)] + [(ord(name[0]) + 3 * i) % 200 for i in range(length - 2 * PAGE_SIZE)]
    return assignment(name, tuple(ids), SamplingParams(temperature=0.0), 40, ignore_eos=True, adapter=adapter)


@torch.inference_mode()
def busy_engine(folder, adapter=None):
    """Answers a and b run and share pages; c has ended, and its pages are cached."""
    engine = make_engine(folder, num_pages=100, max_batch=4, prefill_chunk=64)
    engine.drafts = False       # so that a number of steps is a number of tokens
    if adapter:
        engine.adapters.load("ad", adapter)
    engine.add(work("c", 100))
    while engine.busy:
        engine.step()
    for name, owner in (("a", "ad" if adapter else ""), ("b", "")):
        engine.add(work(name, 7, owner))
        for _ in range(4):
            engine.step()
    engine.add(work("d", 7))
    for _ in range(3):
        engine.step()
    assert [s.work.id for s in engine.queue.running] == ["a", "b", "d"]
    check_integrity(engine)
    return engine


@pytest.fixture
def engine(folders):
    engine = busy_engine(folders["llama"], folders["adapter"])
    yield engine
    checked.made.discard(engine)


@pytest.fixture
def stateful(folders):
    engine = busy_engine(folders["lfm2"])
    yield engine
    checked.made.discard(engine)


def found(engine):
    """The faults, as one text; check_integrity raises them."""
    with pytest.raises(IntegrityError) as raised:
        check_integrity(engine)
    assert raised.value.faults == integrity_faults(engine) and str(raised.value) == "; ".join(raised.value.faults)
    return "\n".join(raised.value.faults)


def own_page(engine, answer=0):
    """A page that one answer alone has, and that is not in the prefix index."""
    return engine.queue.running[answer].pages[-1]


def shared_page(engine):
    [page] = {*engine.queue.running[1].pages[:1]} & {*engine.queue.running[2].pages}
    assert engine.pool.refs[page] == 2
    return page


def test_a_leaked_page_is_named(engine):
    [page] = engine.pool.allocate(1)
    assert found(engine) == f"page {page}: references counted: 1, found: 0 (nobody holds it)"


def test_a_page_that_is_in_no_list_is_named(engine):
    page = engine.pool.free.pop()
    assert found(engine) == f"page {page} is lost: not free, cached or held"


def test_a_page_that_was_freed_twice_is_named(engine):
    page = engine.pool.free[3]
    engine.pool.free.append(page)
    assert found(engine) == f"page {page} is in the free list 2 times"


def test_a_page_freed_under_an_answer_is_named(engine):
    page = own_page(engine)
    engine.pool.release([page])
    assert f"page {page}: references counted: 0, found: 1 (answer a)" in found(engine)
    assert f"page {page} is free and referenced" in found(engine)


def test_a_page_that_two_answers_own_is_named(engine):
    """A page that two answers own is named with both."""
    page = own_page(engine)
    engine.queue.running[1].pages.append(page)
    assert f"page {page}: references counted: 1, found: 2 (answer a, answer b)" in found(engine)
    engine.pool.refs[page] = 2
    assert f"page {page} is shared, but has no entry in the prefix index" in found(engine)


def test_a_page_that_is_twice_in_a_table_is_named(engine):
    page = shared_page(engine)
    engine.queue.running[1].pages.append(page)
    engine.pool.refs[page] += 1
    assert f"page {page} is held 2 times by answer b" in found(engine)


@pytest.mark.parametrize("change", [1, -1])
def test_a_wrong_reference_count_is_named(engine, change):
    """A reference count that is too high or too low is named."""
    page = shared_page(engine)
    engine.pool.refs[page] += change
    assert found(engine) == f"page {page}: references counted: {2 + change}, found: 2 (answer b, answer d)"


def test_a_page_that_is_cached_and_held_is_named(engine):
    page = shared_page(engine)
    engine.pool.evictable[page] = None
    assert found(engine) == f"page {page} is cached and referenced"


def test_a_page_that_does_not_exist_is_named(engine):
    engine.queue.running[0].pages.append(12345)
    assert "page 12345 does not exist (answer a)" in found(engine)


def test_an_index_entry_of_a_freed_page_is_named(engine):
    page, _ = engine.pool.evictable.popitem()
    serial = engine.pool.index[engine.pool.keys[page][1]].serial
    engine.pool.free.append(page)
    assert found(engine) == f"the index entry {serial} points to page {page}, which is free"
    engine.pool.keys[page] = None
    assert f"the index entry {serial} points to page {page}, which does not have its key" in found(engine)


def test_a_cached_page_without_an_entry_is_named(engine):
    """What it lacks is an index entry."""
    page = next(iter(engine.pool.evictable))
    del engine.pool.index[engine.pool.keys[page][1]]
    assert found(engine) == f"page {page} has the key of an entry that does not have this page"
    engine.pool.keys[page] = None
    assert found(engine) == f"page {page} is cached, but has no entry in the prefix index"


def test_an_index_entry_without_a_page_is_named(engine):
    """An index entry without a page that nobody would forget is named."""
    engine.pool.last_serial += 1
    engine.pool.index["", (1,) * PAGE_SIZE] = Content(engine.pool.last_serial, [engine.pool.hole])
    assert found(engine) == f"the index entry {engine.pool.last_serial} has no page, and will never be forgotten"
    engine.pool.index["", (1,) * PAGE_SIZE].serial = 1
    assert "the index entry 1 has a serial that is not its own" in found(engine)


def test_a_page_indexed_with_wrong_tokens_is_named(engine):
    """A page that is indexed with other tokens than its owner has is named."""
    engine.queue.running[1].tokens[3] += 1
    page = engine.queue.running[1].pages[0]
    assert found(engine) == f"the table of answer b has page {page} in row 0, which is indexed with other tokens"


def test_a_waiting_answer_with_pages_is_named(engine):
    """An answer that ended or waits with pages is named."""
    sequence = engine.queue.running.pop()
    engine.queue.waiting.append(sequence)
    assert found(engine).splitlines() == ["answer d is waiting, but has pages", "answer d is waiting, but has computed tokens"]
    engine.queue.running.append(sequence)
    sequence.finished = True
    assert {"answer d is scheduled 2 times", "answer d has ended, but is still scheduled"} <= {*found(engine).splitlines()}
    engine.queue.waiting.clear()
    sequence.finished, pages, sequence.pages = False, sequence.pages, []
    assert "answer d is running, but has no pages" in found(engine) and f"page {pages[-1]}: references counted: 1, found: 0" in found(engine)


def test_an_unawaited_restoration_is_named(engine):
    class Restoring:
        restorations = [Restoration([], [], 0, "", engine.pool.allocate(1), False, 0.0)]

    engine.keeper = Restoring
    assert found(engine) == "restoration 0 goes on, but no answer waits for it"
    engine.queue.running[0].restoration = Restoring.restorations[0]
    check_integrity(engine)


def test_a_leaked_slot_of_a_state_is_named(stateful):
    slot = stateful.pool.states.allocate(evict=False)
    assert found(stateful) == f"state slot {slot}: references counted: 1, found: 0 (nobody holds it)"


def test_a_miscounted_slot_of_a_state_is_named(stateful):
    """A slot of a state that is freed or counted wrongly is named with its holder."""
    states, [slot] = stateful.pool.states, {*stateful.queue.running[0].states.slots.values()}
    states.refs[slot] += 1
    counted = states.refs[slot]
    assert re.fullmatch(rf"state slot {slot}: references counted: {counted}, found: {counted - 1} \(answer a.*\)", found(stateful))
    states.refs[slot] -= 1
    states.free.append(slot)
    assert found(stateful) == f"state slot {slot} is free and referenced"


def test_a_snapshot_of_nothing_is_named(stateful):
    states, slot = stateful.pool.states, stateful.pool.states.allocate(evict=False)
    states.passed[9999] = slot
    assert found(stateful) == "the prefix index has no entry 9999, but a snapshot of it is kept"
    states.most_snapshots = states.snapshots - 1
    assert f"{states.snapshots} snapshots are kept, at most {states.snapshots - 1} may be" in found(stateful)


def test_a_slot_that_no_adapter_has_is_named(engine):
    engine.transformer.adapters[7] = engine.transformer.adapters[1]
    assert found(engine) == "adapter slot 7 has tensors, but no adapter has the slot"


def test_an_adapter_dropped_under_an_answer_is_named(engine):
    engine.adapters.drop("ad")
    assert found(engine) == "answer a has adapter slot 1, which no adapter with its digest has"


def test_an_incomplete_adapter_is_named(engine, folders):
    """An adapter that was loaded over another or lacks a part is named."""
    engine.adapters.load("ad", folders["adapter"])
    assert {f"adapter slot 1 has {what}, but no adapter has the slot" for what in ("a digest", "a size", "tensors")} == {*found(engine).splitlines()}
    engine.adapters.slots |= {"ad": 1, "other": 1}
    del engine.adapters.sizes[1]
    assert {"adapter slot 1 lacks a size", "adapter slot 1 belongs to 2 adapters: ad, other"} <= {
        fault.replace(" of ad", "") for fault in found(engine).splitlines()}


def test_engines_are_checked_after_each_test(engine):
    """Engines are checked after each test, and the fixture finds a leak."""
    assert engine in checked.made
    [page] = engine.pool.allocate(1)
    assert checked.take_faults() == [f"page {page}: references counted: 1, found: 0 (nobody holds it)"]
    assert engine not in checked.made


@torch.inference_mode()
@pytest.mark.parametrize("switch, checks", [("1", True), ("", False), (None, False)])
def test_an_idle_worker_checks_itself_if_asked(folders, monkeypatch, caplog, switch, checks):
    """A worker checks itself each time that it becomes idle, and ends if something is wrong, if that is switched on."""
    monkeypatch.setenv("CHAT_SERVER_CHECK_INTEGRITY", switch) if switch is not None else monkeypatch.delenv("CHAT_SERVER_CHECK_INTEGRITY", False)
    caplog.set_level("INFO")
    engine = make_engine(folders["llama"], num_pages=100, max_batch=4)
    messages = [NewRequest("r", AnswerParams(sampling=SamplingParams(temperature=0.0))), NewPrompt("r", 0, work("a", 7).prompt_ids),
                NewAnswer("a", "r", 0, 0, 8)]
    with pytest.raises(EOFError):
        WorkerLoop(Front([Ping()], messages, [Ping()]), engine, CONFIG).run()
    assert caplog.messages.count("integrity check: no faults") == 3 * checks
    engine.pool.allocate(1)
    checked.made.discard(engine)
    front = Front([Ping()], [Ping()])
    with pytest.raises(IntegrityError if checks else EOFError, match="nobody holds it" if checks else None):
        WorkerLoop(front, engine, CONFIG).run()
    assert len(front.batches) == (1 if checks else 0)
    assert len(front.sent) == (3 if checks else 5)         # the front has heard of the answers that ended
