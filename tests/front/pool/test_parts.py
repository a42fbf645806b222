"""Each part of the pool without the others: worker, dispatcher, supervisor, and the two placements."""

import asyncio
import itertools
import json
import sys
from types import SimpleNamespace

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError, EngineFailure
from chatlm.common.messages.protocol import (WORKER_PIPE, ActorAddress, Crashed, EndActor, Loading, ModelCard, ModelText, NewAnswer, Node, Nodes, Ready,
                                             StartActor, Unusable, WorkerConfig)
from chatlm.common.messages.requests import Accepted, Finished, Request, TextSpec
from chatlm.front.admission.admission import Admission, SharedAdmission
from chatlm.front.pool.pool_adapters import PoolAdapters
from chatlm.front.pool.dispatcher import Dispatcher
from chatlm.front.pool.local_devices import LocalDevices
from chatlm.front.pool.ray_nodes import RayNodes
from chatlm.front.pool.memory import OwnMemory
from chatlm.front.pool.supervisor import Supervisor
from chatlm.front.pool.model_use import ModelUse
from chatlm.front.pool.worker import NEXT_STATES, Worker, WorkerState
from answers import ending, said

PATHS = {       # how a worker gets into each state
    WorkerState.LOADING: (), WorkerState.AWAITING_NODE: (WorkerState.AWAITING_NODE,), WorkerState.READY: (WorkerState.READY,), WorkerState.DEAD: (WorkerState.DEAD,),
    WorkerState.UNLOADED: (WorkerState.READY, WorkerState.UNLOADED), WorkerState.LEFT_OUT: (WorkerState.LEFT_OUT,)}


def worker_in(state, worker_class=Worker, placement=None):
    worker = worker_class(Settings(max_batch=1), placement, 0)
    for step in PATHS[state]:
        worker.become(step)
    return worker


def test_a_worker_changes_only_to_what_may_follow():
    """What was ended on purpose does not die."""
    for state, successor in itertools.product(WorkerState, WorkerState):
        worker = worker_in(state)
        if successor is WorkerState.DEAD and state in (WorkerState.UNLOADED, WorkerState.LEFT_OUT):
            worker.become(successor)
            assert worker.state is state
        elif successor in NEXT_STATES[state]:
            worker.become(successor, "why")
            assert (worker.state, worker.problem) == (successor, "why")
        else:
            with pytest.raises(AssertionError, match=f"{state.value} -> {successor.value}"):
                worker.become(successor)


class SilentWorker(Worker):
    """A worker without a pipe: the test sees what it would be sent."""

    sent = property(lambda self: self.__dict__.setdefault("messages", []))

    def send(self, message):
        self.sent.append(message)


async def test_an_answer_moves_from_a_dead_worker():
    """A dispatcher moves it to another."""
    workers = [worker_in(WorkerState.READY, SilentWorker), worker_in(WorkerState.LOADING, SilentWorker)]
    dispatcher = Dispatcher(Settings(max_batch=1), workers, PoolAdapters(Settings(), workers))
    events = dispatcher.answer(Request("a", prompt_ids=((1, 2),), max_tokens=5), [5], 0.0)
    assert await anext(events) == Accepted(2)
    dispatcher.deliver(workers[0], [("a", said("A", tokens=(65,)))])
    workers[1].become(WorkerState.READY)
    workers[0].become(WorkerState.DEAD)
    dispatcher.requeue(workers[0])
    assert [(message.id, message.resumed_ids) for message in workers[1].sent if isinstance(message, NewAnswer)] == [("a", (65,))]
    dispatcher.deliver(workers[1], ending("a", said("B", tokens=(66,))))
    pieces = [event async for event in events]
    assert [piece.text for piece in pieces[:-1]] == ["A", "B"] and isinstance(pieces[-1], Finished)
    assert not dispatcher.jobs and not workers[0].jobs and not workers[1].jobs


class PlayedPlacement:
    """A worker whose process is played: it says these messages, and ends when `reader` does."""

    source, renews = None, True

    def changed_source(self):
        return None

    def __init__(self, *messages):
        self.messages, self.workers, self.killed = messages, [Worker(Settings(), self, 0)], 0
        self.process = SimpleNamespace(pid=7, kill=self.kill, wait=lambda timeout=None: None)

    async def open(self, worker):
        worker.become(WorkerState.LOADING)
        worker.process, self.reader = self.process, asyncio.StreamReader()
        worker.writer = SimpleNamespace(write=lambda data: None, close=lambda: None)
        self.reader.feed_data(b"".join(map(WORKER_PIPE.packed, self.messages)))
        return self.reader, WorkerConfig(Settings(), None, "cpu", 1)

    def kill(self):
        self.killed += 1
        self.reader.feed_eof()

    def end_in_words(self, worker):
        return "played to its end"


def supervisor_of(placement, **settings):
    """A supervisor whose dispatcher only notes that jobs were taken from a worker, and the cards that it got ready for."""
    dispatcher = SimpleNamespace(use=ModelUse(), idle_s=lambda now: now, jobs={}, pending=(), dispatch=lambda: None, requeued=asyncio.Event())
    dispatcher.requeue = lambda worker: dispatcher.requeued.set()
    cards = []

    async def prepare(card):
        cards.append(card)

    async def expect(text):
        if text.chat_template == "broken":
            raise ConfigError("the template is broken")

    settings = Settings(**settings)
    supervisor = Supervisor(settings, placement.workers, dispatcher, PoolAdapters(settings, placement.workers), prepare=prepare,
                            report=lambda stage, fraction: None, expect=expect)
    return supervisor, dispatcher, cards


async def test_a_supervisor_hears_ready_and_end():
    """It takes the jobs of a worker away when it ends."""
    card = ModelCard(TextSpec("letters", b""), "m", 64, (), {}, False, place="cpu with 1 thread")
    placement = PlayedPlacement(Loading("weights", 0.5), card, Ready({}))
    [worker] = placement.workers
    supervisor, dispatcher, cards = supervisor_of(placement)
    supervisor.run("running it", lambda: supervisor.keep_alive(worker))
    await asyncio.wait_for(supervisor.became_ready.wait(), 20)
    assert (supervisor.failure, supervisor.loading, cards, worker.place) == (None, ("weights", 0.5), [card], card.place)
    assert worker.state is WorkerState.READY and supervisor.ready and not dispatcher.requeued.is_set()
    placement.reader.feed_eof()
    await asyncio.wait_for(dispatcher.requeued.wait(), 20)
    assert worker.state is WorkerState.DEAD and not supervisor.ready
    await supervisor.close()
    assert placement.killed


async def test_a_broken_template_ends_the_start_early():
    """The weights have not been read then."""
    placement = PlayedPlacement(ModelText(TextSpec("letters", b"", "broken")), Loading("weights", 0.1))     # a card never comes
    supervisor, _, cards = supervisor_of(placement)
    supervisor.run("running it", lambda: supervisor.keep_alive(placement.workers[0]))
    await asyncio.wait_for(supervisor.became_ready.wait(), 20)
    assert str(supervisor.failure) == "the template is broken" and not cards
    await supervisor.close()


async def test_a_template_is_compiled_before_its_card():
    """The card comes later."""
    admission = Admission(lambda request, client, low, goes_on: None, SharedAdmission())
    text = TextSpec("hf", json.dumps({"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
                                      "decoder": None, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}).encode(), "{% if %}")
    with pytest.raises(ConfigError, match="chat template does not parse: line 1"):
        await admission.expect(text, Settings())
    await admission.shared.close()


async def test_an_unusable_worker_is_left_out():
    """Without another one start-up has failed."""
    placement = PlayedPlacement(Unusable("no such GPU"))
    supervisor, dispatcher, _ = supervisor_of(placement)
    await asyncio.wait_for(supervisor.keep_alive(placement.workers[0]), 20)     # it is not tried again
    assert placement.workers[0].stats()["state"] == "left out" and placement.workers[0].left_out.endswith("left out: no such GPU")
    assert isinstance(supervisor.failure, ConfigError) and supervisor.became_ready.is_set()


async def test_a_worker_failing_alike_twice_is_left_out(caplog):
    """It ends by one exception while it loads; by another it is tried again."""
    placement, lives = PlayedPlacement(), [("KeyError: 'a'", ""), ("KeyError: 'b'", ""), ("KeyError: 'b'", "Traceback ...")]
    [worker] = placement.workers
    opens = placement.open

    async def open_and_crash(worker):
        placement.messages = [Loading("reading x", 0.0), Crashed(*lives.pop(0))]
        return await opens(worker)

    placement.open = open_and_crash
    supervisor, _, _ = supervisor_of(placement)
    await asyncio.wait_for(supervisor.keep_alive(worker), 60)
    assert lives == [] and isinstance(supervisor.failure, EngineFailure)
    assert str(supervisor.failure).startswith("worker 0 cannot start: it ended 3 times, the last time at 'reading x' (KeyError: 'b'; ")
    assert "Traceback" not in caplog.text


async def test_a_worker_killed_alike_twice_is_left_out():
    """So is one that is killed twice in the same way."""
    placement, ends = PlayedPlacement(), ["exit status 1", "killed by SIGBUS", "killed by SIGBUS", "killed by SIGBUS"]
    [worker] = placement.workers
    opens = placement.open

    async def open_and_end(worker):
        opened = await opens(worker)
        placement.reader.feed_eof()
        return opened

    placement.open, placement.end_in_words = open_and_end, lambda worker: ends.pop(0)
    supervisor, _, _ = supervisor_of(placement)
    await asyncio.wait_for(supervisor.keep_alive(worker), 60)
    assert ends == ["killed by SIGBUS"] and "it ended 3 times" in str(supervisor.failure) and "(killed by SIGBUS; " in str(supervisor.failure)


async def test_idle_workers_are_unloaded_once():
    """A request would still be served."""
    placement = PlayedPlacement()
    [worker] = placement.workers
    supervisor, dispatcher, _ = supervisor_of(placement)
    memory = OwnMemory(SimpleNamespace(supervisor=supervisor, dispatcher=dispatcher, workers=placement.workers,
                                       settings=Settings(idle_unload=1.0)))
    supervisor.revision.note_opened()
    memory.unload_when_idle()
    assert worker.state is WorkerState.LOADING and not supervisor.asleep
    await placement.open(worker)
    worker.become(WorkerState.READY)
    for _ in range(2):
        memory.unload_when_idle()
    assert worker.state is WorkerState.UNLOADED and placement.killed == 1 and supervisor.unloaded and supervisor.ready
    placement.workers.clear()
    supervisor.asleep = False
    memory.unload_when_idle()
    assert not supervisor.asleep                # there is nothing to unload


async def test_a_local_worker_s_end_is_told():
    """It has a process."""
    placement = LocalDevices(Settings(num_workers=2, device_type="cpu"), (sys.executable, "-c", "raise SystemExit(3)"))
    worker, other = placement.workers
    await worker.listen(lambda worker, message: None)
    await worker.end()
    assert (worker.state, other.state, other.process) == (WorkerState.LOADING, WorkerState.LOADING, None)
    assert worker.process.returncode == 3 and placement.end_in_words(worker) == "exit status 3"


async def test_ray_workers_follow_the_nodes():
    """An actor that nobody awaits is ended."""
    placement, sent, tasks = RayNodes(Settings(ray_address="auto", num_workers=0, device_type="cpu"), ()), [], []
    placement.tell = sent.append
    supervisor = SimpleNamespace(run=lambda what, work: tasks.append(what), keep_alive=print, progress=lambda stage, fraction: tasks.append(stage))
    placement._handle(Nodes([]), supervisor)
    assert tasks.pop() == "waiting for a node of Ray's cluster" and placement.stats()["ray"]["nodes"] == []
    placement._handle(Nodes([Node("a", "host of a", 4.0, 0), Node("b", "host of b", 2.0, 0)]), supervisor)
    first, second = placement.workers
    assert (first.node, second.node) == ("host of a", "host of b")
    assert tasks == ["running worker 0 (cpu on host of a)", "running worker 1 (cpu on host of b)"]
    opening = asyncio.ensure_future(placement.open(second))
    await asyncio.sleep(0)
    assert second.state == "waiting for Ray" and sent == [StartActor(second.process.request.actor, "b", 2.0, 0)]
    placement._handle(ActorAddress("unknown", "127.0.0.1", 1, "00"), supervisor)
    assert sent[1:] == [EndActor("unknown")]
    placement._handle(Nodes([Node("a", "host of a", 4.0, 0)]), supervisor)
    with pytest.raises(ConnectionError, match="its node has left"):
        await opening
    assert placement.workers == [first] and placement.end_in_words(second) == "its node has left"
    assert placement.stats() == {"ray": {"state": "connected", "nodes": ["host of a"]}}
