"""An idle worker checks what its engine counts: what is broken is told once by name and counted, and ends nothing."""

from types import SimpleNamespace

import pytest
import torch

import checked
from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.messages.protocol import BROKEN_INVARIANTS, NewAnswer, NewPrompt, NewRequest, Ping
from chatlm.common.messages.requests import AnswerParams, Ended, SamplingParams
from chatlm.worker.engine import integrity
from chatlm.worker.engine.drafts import DraftRecord
from chatlm.worker.engine.encoded_pictures import EncodedPicture, Pictures
from chatlm.worker.engine.idle_check import IdleCheck
from chatlm.worker.engine.integrity import integrity_faults, integrity_slices, picture_faults
from chatlm.worker.engine.sequence import Sequence
from chatlm.worker.loop import WorkerLoop
from engines import make_engine
from families import make_model, save
from worker_front import Front
from works import assignment

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = SimpleNamespace(settings=Settings())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save(make_model(name), root / name) for name in ("llama3.1", "lfm2")}


@torch.inference_mode()
def worked(folder):
    """An engine that has given answers, of which pages and states are cached."""
    engine = make_engine(folder, num_pages=60, max_batch=3)
    for number in range(6):
        ids = tuple((number // 2 * 50 + i) % 200 for i in range(3 * PAGE_SIZE + number))
        engine.add(assignment(f"a{number}", ids, SamplingParams(temperature=0.0), 40, ignore_eos=True))
    engine.step()
    engine.cancel("a1")
    while engine.busy:
        engine.step()
    assert engine.pool.evictable
    return engine


@pytest.fixture
def engine(folders):
    engine = worked(folders["llama3.1"])
    yield engine
    checked.made.discard(engine)


@pytest.fixture
def stateful(folders):
    engine = worked(folders["lfm2"])
    yield engine
    checked.made.discard(engine)


def check_all(check):
    while not check.more():
        pass
    return {name: count for name, count in check.broken.items() if count}


def leak(engine):
    engine.pool.allocate(1)


def double_reference(engine):
    engine.pool.refs[next(iter(engine.pool.evictable))] += 1


def free_twice(engine):
    engine.pool.free.append(engine.pool.free[0])


def lose(engine):
    engine.pool.free.pop()


def free_and_cached(engine):
    engine.pool.free.append(next(iter(engine.pool.evictable)))


def point_elsewhere(engine):
    """Two prefixes exchange their pages: who has one reads the other's keys and values."""
    one, other = [content for content in engine.pool.index.values()][:2]
    one.pages, other.pages = other.pages, one.pages


def keep_running(engine):
    sequence = Sequence(assignment("gone", (1, 2), SamplingParams(), 3), [1, 2], 5)
    sequence.finished = True
    engine.drafting.records[sequence] = DraftRecord()


def give_tensors(engine):
    engine.transformer.adapters[3] = {}


@pytest.mark.parametrize("breaks, name, count", [
    (leak, "pages", 1), (double_reference, "pages", 2), (free_twice, "pages", 1), (lose, "pages", 1), (free_and_cached, "pages", 1),
    (point_elsewhere, "prefixes", 4), (keep_running, "drafts", 1), (give_tensors, "adapters", 1)])
def test_what_is_broken_is_counted_once_and_logged_by_name(engine, breaks, name, count, caplog):
    check = IdleCheck(engine)
    assert check_all(check) == {} and not caplog.records
    breaks(engine)
    found = check_all(check)
    assert found[name] == count and check.gauges()[BROKEN_INVARIANTS[name]] == count
    assert check_all(check) == found and check.ended == 3
    assert sum(f"broken invariant of the engine's {name}," in line for line in caplog.messages) == 1
    assert len(caplog.messages) == len(found)
    assert sum(found.values()) == len({*integrity_faults(engine)})


def test_a_leaked_state_is_counted(stateful):
    check = IdleCheck(stateful)
    assert check_all(check) == {}
    stateful.pool.states.allocate()
    assert check_all(check) == {"states": 1}


def test_the_log_has_no_text_of_a_client(engine, caplog):
    """An entry of the prefix index has the tokens of a prompt, and so has an error about it."""
    key = next(iter(engine.pool.index))
    engine.pool.index[key] = None
    check = IdleCheck(engine)
    assert check_all(check)["answers"] == 1 and check.ended == 1
    assert "the check failed with AttributeError" in caplog.text and str(key[1]) not in caplog.text


def test_many_faults_are_counted_up_to_a_limit(engine, monkeypatch):
    monkeypatch.setattr(IdleCheck, "MOST_KNOWN", 7)
    taken = engine.pool.allocate(5)
    check = IdleCheck(engine)
    assert check_all(check) == {"pages": 5}
    taken += engine.pool.allocate(5)
    assert check_all(check) == check_all(check) == {"pages": 7}


def test_a_check_in_parts_sees_all(engine, monkeypatch):
    """A fault in any part of a pool is found, however short the parts are."""
    monkeypatch.setattr(integrity, "SLICE", 5)
    whole = [*integrity_slices(engine)]
    assert len(whole) > 60 / 5 and not any(faults for _, faults in whole)
    for page in range(engine.pool.num_pages):
        key, engine.pool.keys[page] = engine.pool.keys[page], (0, ("", (1,)))
        assert f"page {page} has the key of an entry that does not have this page" in integrity_faults(engine)
        engine.pool.keys[page] = key


def test_work_begins_a_check_anew(engine):
    check = IdleCheck(engine)
    check.more()
    first = check.slices
    check.note_work()
    assert check.slices is None and check.wait_s == 0
    assert check_all(check) == {} and check.slices is not first
    assert check.wait_s is None                     # it sleeps until there is something new
    check.note_work()
    assert 0 < check.wait_s <= check.EVERY_S


def test_pictures_that_nobody_waits_for_are_named():
    held = EncodedPicture(SimpleNamespace(pixels=b"x" * 10), None)
    nobody = SimpleNamespace(running=[], waiting=[])
    pictures = SimpleNamespace(work=None, tiles={}, by_digest={b"a": held, b"b": held}, KEPT_BYTES=Pictures.KEPT_BYTES)
    assert picture_faults(pictures, nobody) == []
    pictures.work, pictures.KEPT_BYTES = (held, None), 15
    assert picture_faults(pictures, nobody) == ["a picture is being encoded, but no answer waits for it",
                                                "20 bytes of pictures are kept, at most 15 may be"]
    waits = SimpleNamespace(running=[SimpleNamespace(placeholders=object())], waiting=[])
    assert len(picture_faults(pictures, waits)) == 1


def asks(name):
    return [NewRequest(name, AnswerParams(sampling=SamplingParams(temperature=0.0))), NewPrompt(name, 0, tuple(range(40))), NewAnswer(f"{name}~0", name, 0, 0, 8)]


@torch.inference_mode()
def test_an_idle_worker_tells_the_front_and_serves_on(engine, monkeypatch, caplog):
    """Each idle time after work is checked; what is broken ends neither the worker nor an answer."""
    monkeypatch.setattr(IdleCheck, "EVERY_S", 0.0)
    monkeypatch.delenv("CHAT_SERVER_CHECK_INTEGRITY", raising=False)
    front = Front([Ping()], asks("r"), [Ping()], asks("s"))
    receive, broken = front.receive, []

    def breaking(wait, patience_s=None):
        if wait and len(front.batches) == 1 and not broken:
            broken.append(engine.pool.allocate(1))
        return receive(wait, patience_s)

    front.receive = breaking
    with pytest.raises(EOFError):
        WorkerLoop(front, engine, CONFIG).run()
    checks = [message.gauges["integrity_checks"] for message in front.sent if message.gauges]
    assert checks == sorted(checks) and checks[-1] >= 3
    assert front.sent[-1].gauges["broken_pages"] == 1
    assert sum("broken invariant" in line for line in caplog.messages) == 1
    assert len([event for _, event in front.events if isinstance(event, Ended)]) == 2
    assert broken


@torch.inference_mode()
def test_a_check_does_not_wait_for_a_warm_up_that_rests(engine, monkeypatch):
    """It rests as long as requests keep coming."""
    monkeypatch.setattr(IdleCheck, "EVERY_S", 0.0)
    monkeypatch.setattr(type(engine.answers), "may_be_faster", True)
    front = Front(*(asks(name) for name in "rst"))
    with pytest.raises(EOFError):
        WorkerLoop(front, engine, CONFIG).run()
    assert front.sent[-1].gauges["integrity_checks"] >= 3
