"""A worker's loop: it obeys the front, computes a step, reports, and sleeps while there is nothing to do."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from chatlm.common.errors import RanksFailed
from chatlm.common.log import log
from chatlm.common.memory import give_memory_back
from chatlm.common.messages.protocol import Ping, Ready
from chatlm.common.messages.requests import Failed
from chatlm.worker.device import lack_of_gpu_memory
from chatlm.worker.engine.drawn import failure_text
from chatlm.worker.engine.idle_check import IdleCheck
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.reports import Reports
from chatlm.worker.engine.warm_up import WarmUp
from chatlm.worker.gauges import Gauges
from chatlm.worker.inbox import Inbox

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import WorkerConfig
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.engine.engine import Engine


class WorkerLoop:
    """Turn after turn: the messages of the front, then a step, whose events are sent while the next one is
    computed. While nobody asks for anything the worker warms up, restores stored prefixes and checks its
    engine's counts, then sleeps until a message comes."""

    ADAPTER_LOOK_S = 0.05  # between two looks at adapters that are being read, while nothing is computed
    MAX_FAILURES = 3       # failed steps in a row that a worker survives; after one more it is replaced

    def __init__(self, channel: Channel, engine: Engine, config: WorkerConfig, warm_up: WarmUp | None = None):
        self.channel = channel
        self.engine = engine
        self.config = config
        self.warm_up = warm_up or WarmUp(engine)
        self.holds_leftovers = self.warm_up.is_due  # memory that only loading needed
        self.idle_check = IdleCheck(engine)
        self.gauges = Gauges(engine, self.idle_check)
        self.inbox = Inbox(engine, channel.send)
        interval_s = config.settings.stream_interval / 1000
        self.reports = Reports(channel, engine, self.gauges.read, interval_s)
        self.failures = 0  # failed steps in a row
        self.checks_integrity = os.environ.get("CHAT_SERVER_CHECK_INTEGRITY") == "1"  # slow: for soaks

    def report_ready(self):
        """Tell the front that requests may come."""
        self.channel.send(Ready(self.gauges.read(), self.engine.kernel_faults))

    def run(self):
        """EOFError when the front is gone."""
        while True:
            self.turn()

    def turn(self):
        self.inbox.adapters.finish()
        idle = self.engine.idle
        warms_up = idle and self.warm_up.is_due
        restores = idle and not warms_up and self.engine.restores_ahead
        checks = idle and self._may_check(warms_up, restores)
        if checks:
            messages = self._wait_for_check()
        elif restores:
            messages = self._restore_ahead()
        elif warms_up and self.warm_up.rests:
            messages = self.channel.receive(wait=True, patience_s=self.warm_up.REST_S)
        else:
            messages = self._receive(wait=idle and not warms_up)
        for message in messages:
            self.inbox.obey(message)
        if checks and not messages:
            self._check_more()
            return
        self.idle_check.interrupt()
        if any(not isinstance(message, Ping) for message in messages):
            self.idle_check.note_work()
        if self.engine.busy:
            self.warm_up.skip()  # what was asked warms up as well
        elif warms_up and not messages:
            self._warm_up_more()
            return
        elif restores and not messages:
            return
        self._step()
        if not self.engine.busy:
            self._rest()

    def _restore_ahead(self) -> list:
        """Restore a little of what nobody has asked for yet; returns the messages that have come."""
        assert self.engine.keeper
        ahead = self.engine.keeper.ahead
        if ahead.rests and (messages := self.channel.receive(wait=True, patience_s=ahead.REST_S)):
            return messages
        ahead.more()
        return self.channel.receive(wait=ahead.waits, patience_s=ahead.WAIT_S)

    def _may_check(self, warms_up: bool, restores: bool) -> bool:
        """Is the engine to be checked before it does anything else? What rests may do so for hours if
        requests keep coming, so a check whose time has come goes first."""
        if self.inbox.adapters.folders:
            return False
        if warms_up or restores:
            rests = self.warm_up.rests if warms_up else self.engine.keeper and self.engine.keeper.ahead.rests
            return bool(rests) and self.idle_check.wait_s == 0
        return self.idle_check.is_due

    def _wait_for_check(self) -> list:
        """The messages that have come by the time when the engine is to be checked."""
        wait_s = self.idle_check.wait_s
        return self.channel.receive(wait=bool(wait_s), patience_s=wait_s)

    def _check_more(self):
        """Look at a part of the engine, unless it is too early, and tell the front once all was seen."""
        if not self.idle_check.wait_s and self.idle_check.more():
            self.reports.send()

    def _receive(self, wait: bool) -> list:
        """The messages that have come; if there are none, `wait` for one, or for an adapter to be read."""
        patience_s = self.ADAPTER_LOOK_S if self.inbox.adapters.folders else None
        return self.channel.receive(wait=wait, patience_s=patience_s)

    def _warm_up_more(self):
        self.warm_up.more()
        self._give_leftovers_back()

    def _give_leftovers_back(self):
        """Return what loading needed to the system, once, after the warm-up or what was asked instead."""
        if self.holds_leftovers and not self.warm_up.is_due:
            self.holds_leftovers = False
            give_memory_back()

    def _step(self):
        """Compute a step. One that fails fails one request, not the server."""
        try:
            self.engine.check_ranks()
            self.reports.add(self.engine.step(self.reports.send))
            self.failures = 0
        except Exception as error:
            if self.engine.ranks:
                raise RanksFailed(str(error)) from error
            self.failures += 1
            if self.failures > self.MAX_FAILURES or "CUDA error" in str(error):
                raise  # only a fresh process can help
            self._log_failure(error)
            given_up = self.engine.give_up()
            self.reports.add((answer_id, Failed(failure_text(error))) for answer_id in given_up)

    def _log_failure(self, error: Exception):
        advice = lack_of_gpu_memory(error, self.config)
        if advice:
            log.error("a step failed: %s", advice)
            importlib.import_module("torch").cuda.empty_cache()
        else:
            log.error("a step failed", exc_info=error)

    def _rest(self):
        """Nothing is computed now: do what had to wait for that, and send what is left to send."""
        self.inbox.empty_cache_if_asked()
        self.reports.send()
        self._give_leftovers_back()
        if self.checks_integrity:
            check_integrity(self.engine)
            log.info("integrity check: no faults")
