"""A server from its start to its end: it listens, loads, serves until a signal, drains, and stops."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence as Seq
from contextlib import suppress
from functools import partial

from chatlm.common.config import Settings
from chatlm.common.hub.better import MEMORY_RATE, advice_of, only_demonstrates
from chatlm.common.log import ProgressDisplay, log, tell
from chatlm.common.memory import give_memory_back
from chatlm.common.program import other_program, program_root
from chatlm.front.aio import first_of, stop_signals, supervised
from chatlm.front.annex import Annex
from chatlm.front.annexes import ANNEXES
from chatlm.front.evals.checkpoint_evaluator import CheckpointEvaluator
from chatlm.front.front import create_app, routes_with
from chatlm.front.held import MeasuredThreads
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.many import many_models
from chatlm.front.pool.pool import free_memory, make_pool
from chatlm.front.server.access import listen_on, server_urls
from chatlm.front.server.connections import room_for_connections, serving
from chatlm.front.server.host_names import is_loopback
from chatlm.front.server.routes import RouteTable
from chatlm.front.store.store import Store, open_store
from chatlm.front.tools.toolbox import Toolbox


def announce(catalogue: Catalogue, settings: Settings, port: int):
    """Tell the operator what is served, and where."""
    path = f"{settings.prefix}/" if settings.prefix else ""
    urls = [f"  {url}{path}" for url in server_urls(settings.host, port)]
    for line in catalogue.describe():
        tell(line, file=sys.stdout)
    if not settings.keys and not is_loopback(settings.host):
        tell("Warning: anyone who can reach this port can use the server; --api-key KEY or --host 127.0.0.1 "
             "prevents that", logging.WARNING, sys.stdout)
    for line in ("Application startup complete", *urls):
        tell(line, file=sys.stdout)


async def advise(catalogue: Catalogue):
    """Name a better model than the default one, once nothing is answered: the memory is measured for it."""
    pool = catalogue.pools[0] if catalogue.pools else None
    if pool is None or not only_demonstrates(pool.model_name):
        return
    while pool.dispatcher.running:
        await asyncio.sleep(1.0)
    if all(worker.device.startswith("cpu") for worker in pool.workers):
        await asyncio.to_thread(MEMORY_RATE.measure)
    if advice := advice_of(pool.model_name, free_memory(pool)):
        tell(advice, file=sys.stdout)


def warn_of_another_program():
    """If there are two chatlm packages that differ, log which one runs: each may have half of an edit."""
    with suppress(OSError):
        if other := other_program():
            log.warning("the chatlm in %s runs; the one in %s differs", program_root(), other)


async def database_of(settings: Settings, annexes: Seq[Annex]) -> Store | None:
    """The store of --database, with the tables of annexes; None without the flag. Raises ConfigError if it
    can't be used."""
    if settings.database is None:
        return None
    return await open_store(settings, {annex.name: annex.tables() for annex in annexes if annex.tables})


async def serve_forever(settings: Settings, catalogue: Catalogue | None = None,
                        annexes: Seq[Annex] = ANNEXES) -> int:
    """Listen, load, serve until a signal, drain, and stop. Returns the exit status.

    Raises ConfigError if the server cannot start."""
    toolbox = Toolbox.of(settings) if settings.mcp_config else None
    asyncio.get_running_loop().set_default_executor(MeasuredThreads(None, "threads"))
    with listen_on(settings.host, settings.port) as listener:
        drain, now = stop_signals()
        if settings.serves_many and not catalogue:
            catalogue = many_models(settings, make_evaluator=CheckpointEvaluator)
        catalogue = catalogue or Catalogue(settings, make_pool(settings))
        progress = ProgressDisplay()
        catalogue.on_progress = progress
        try:
            await catalogue.start()
            store = await database_of(settings, annexes)
        except Exception:
            await catalogue.close()
            raise
        room = room_for_connections(settings)
        routes = RouteTable(routes_with(annexes), settings.prefix)
        app = create_app(catalogue, settings, store, toolbox, annexes)
        async with serving(app, listener, room, routes.is_polled):
            try:
                catalogue.get_ahead()
                if await first_of(catalogue.wait_ready(), drain.wait()) == 0:
                    progress.close()
                    await asyncio.to_thread(warn_of_another_program)
                    announce(catalogue, settings, listener.getsockname()[1])
                    await asyncio.to_thread(give_memory_back)
                    advising = asyncio.create_task(supervised(
                        "naming a better model", partial(advise, catalogue)))
                    await drain.wait()
                    advising.cancel()
                    tell("Stopping: running answers may finish; a second signal stops now.")
                    await first_of(catalogue.drain(settings.drain_timeout), now.wait())
            finally:
                progress.close()
                await catalogue.close()
    return 2 if store and store.damaged else 0
