"""The life of a worker: it loads its model, warms up, and answers until the front hangs up."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.answering import AnswerLease
from chatlm.common.config import ranks_per_replica
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.stamps import refuse_changed
from chatlm.common.log import CalmLog, log
from chatlm.common.memory import give_memory_back
from chatlm.common.messages.protocol import Loading, ModelText
from chatlm.common.processes.start import threads_per_worker
from chatlm.common.processes.launch import ranks_here
from chatlm.worker.build import build_engine
from chatlm.worker.card import facts_of, make_card
from chatlm.worker.device import bind_to_node, prepare_device
from chatlm.worker.drafting import DraftHelp
from chatlm.worker.engine.warm_up import WarmUp
from chatlm.worker.loop import WorkerLoop
from chatlm.worker.prefixes import PrefixPlan
from chatlm.worker.ranks.ranks import gather_ranks

if TYPE_CHECKING:
    from chatlm.common.hub.local import Progress
    from chatlm.common.messages.protocol import WorkerConfig
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.engine.engine import Engine
    from chatlm.worker.ranks.ranks import RankZero


def run_worker(channel: Channel, config: WorkerConfig):
    """Load the model, then answer until the front hangs up, which raises EOFError."""
    config = with_source(channel, config)
    engine, warm_up = start_engine(channel, config)
    loop = WorkerLoop(channel, engine, config, warm_up)
    loop.report_ready()
    with engine.computing():
        loop.run()


def with_source(channel: Channel, config: WorkerConfig) -> WorkerConfig:
    """The config with the files of the model, and no more threads than this worker may have."""
    source = config.source or resolve_model(config.settings, lambda *at: channel.send(Loading(*at)))
    refuse_changed(source, config.settings)
    threads = min(config.threads, threads_per_worker(ranks_here(config.settings)))
    return replace(config, source=source, threads=threads)


class LoadingProgress:
    """Tells the front what is loaded: a new activity at once, and how far it is ten times a second. A message
    for each of a model's tensors would take the front as long as a twentieth of its start."""

    EVERY_S = 0.1

    def __init__(self, channel: Channel, device: str):
        self.channel = channel
        self.device = device
        self.activity = ""
        self.next_s = 0.0

    def __call__(self, activity: str, fraction: float):
        now_s = time.monotonic()
        if activity != self.activity or now_s >= self.next_s:
            self.activity = activity
            self.next_s = now_s + self.EVERY_S
            self.channel.send(Loading(f"{activity} on {self.device}", fraction))


def start_engine(channel: Channel, config: WorkerConfig) -> tuple[Engine, WarmUp]:
    """Load the model, compute its first steps, and have what the worker computes outlive it."""
    settings = config.settings

    progress = LoadingProgress(channel, config.device)
    ranks = None
    if ranks_per_replica(settings) > 1:
        ranks = gather_ranks(config, progress)  # processes that it starts may run where this one still may
    device = prepare_device(config)
    bound = bind_to_node(config, 0)
    prefixes = PrefixPlan(config)
    engine = load_engine(channel, config, device, bound, ranks, progress)
    if ranks:
        ranks.wait_ready(progress)
    if config.source:
        refuse_changed(config.source, settings)  # while they were read
    on_cpu = device.type == "cpu"
    warm_up = WarmUp(engine)
    with engine.computing():
        if on_cpu and not ranks:
            warm_up.begin()
        else:
            warm_up.complete(partial(progress, "warming up"))
    if on_cpu and not ranks and not engine.of_texts:
        prefixes.keep(engine)
    if on_cpu and config.answering:
        share_lease(engine, config.answering, bool(bound))
    if not warm_up.is_due:  # else the loop does it after the warm-up, without keeping anybody waiting
        give_memory_back()
    CalmLog.over_bar = False
    return engine, warm_up


def load_engine(channel: Channel, config: WorkerConfig, device: Device, bound: str, ranks: RankZero | None,
                progress: Progress) -> Engine:
    """Read the model; tell the front its text before any weight is read, and its card once all are."""
    draft_help = DraftHelp(config.drafts)
    assert config.source  # see with_source
    model, engine = build_engine(
        config.source, config.settings, device, progress, ranks,
        opened=lambda model: channel.send(ModelText(model.text)), draft_help=draft_help)
    card = make_card(model, facts_of(engine), config, bound)
    channel.send(replace(card, without=tuple(draft_help.without)))
    return engine


def share_lease(engine: Engine, path: str, apart: bool = False):
    """The server's workers tell each other when they write answers; see `Engine.share_lease`. apart: has each
    worker processors and memory of its own?"""
    try:
        lease = AnswerLease(path)
    except OSError as error:
        log.warning("embedding will not yield to answers: %s", error)
        return
    engine.share_lease(lease, apart)
