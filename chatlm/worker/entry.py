"""The entry point of a worker or a rank: it joins its parent before it imports libraries."""

from __future__ import annotations

import importlib
import mmap
import os
import sys
import traceback
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from chatlm.common.errors import (
    ConfigError, RanksFailed, error_text, lack_of_memory, line_of, printable, require_library)
from chatlm.common.log import CalmLog, log, start_logging
from chatlm.common.memory import uncollected
from chatlm.common.messages.doctor import DOCTOR_PIPE
from chatlm.common.messages.protocol import SURVEY_PIPE, WORKER_PIPE, Crashed, Loading, Unusable
from chatlm.common.messages.quantizing import IMATRIX_PIPE, QUANTIZE_PIPE
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.child import join_parent
from chatlm.common.program import stamp_at_start
from chatlm.worker.ranks.messages import RANK_PIPE, RankConfig

if TYPE_CHECKING:
    from chatlm.common.messages.doctor import DoctorConfig
    from chatlm.common.messages.protocol import SurveyConfig, WorkerConfig
    from chatlm.common.messages.wire import Channel, Pipe


def run_worker(channel: Channel, config: WorkerConfig):
    from chatlm.worker import process
    process.run_worker(channel, config)


def run_rank(channel: Channel, config: RankConfig):
    from chatlm.worker import other_rank
    other_rank.run_rank(channel, config)


def run_survey(channel: Channel, config: SurveyConfig):
    from chatlm.worker.survey import survey_models
    survey_models(channel, config)


def run_doctor(channel: Channel, config: DoctorConfig):
    from chatlm.worker.doctor.examine import examine
    examine(channel, config)


AHEAD = {  # what a process imports while it waits for its first message, by its pipe
    WORKER_PIPE: "chatlm.worker.process", RANK_PIPE: "chatlm.worker.other_rank",
    SURVEY_PIPE: "chatlm.worker.survey", DOCTOR_PIPE: "chatlm.worker.doctor.examine",
    QUANTIZE_PIPE: "chatlm.export.gguf.export", IMATRIX_PIPE: "chatlm.export.gguf.measure"}
# modules that read the models which most servers have
READERS_AHEAD = "chatlm.worker.weights.formats.gguf.model", "chatlm.worker.weights.families.plain"


def worker_main(run: Callable[[Channel, Any], None], pipe: Pipe, arguments: Seq[str]) -> int:
    """Join the parent and `run` until the other end hangs up."""
    channel = join_parent(arguments, pipe)
    if pipe is WORKER_PIPE:
        stamp_at_start()  # before any module of which others, imported later, must be of the same version
    # it may have been started ahead; what is missing is said below
    with suppress(ImportError), uncollected():
        for module in (AHEAD[pipe], *READERS_AHEAD):
            importlib.import_module(module)
    reserve = mmap.mmap(-1, 32 << 20)  # address space reserved for reporting that memory ran out
    try:
        [config] = channel.receive(wait=True, most=1)
        if type(config) is not pipe.kinds[0]:
            raise BadMessage(f"its first message is {type(config).__name__}")
        start_logging(config.settings)
        CalmLog.over_bar = True  # the front shows this process's progress
        channel.send(Loading("importing libraries", 0.0))
        require_library("numpy", "chat_server")
        run(channel, config)
    except hung_up():
        pass
    except BadMessage as error:
        log.error("the other end of the connection sends messages that are not ours: %s", error)
        return 1
    except RanksFailed as error:
        log.error("%s", error)
        os._exit(1)  # a thread may still be waiting for another rank
    except Exception as error:
        reserve.close()
        error = gpu_memory_error(error, config) or lack_of_memory(error) or error
        if isinstance(error, ConfigError):
            channel.send(Unusable(str(error)))
        elif pipe is WORKER_PIPE:
            channel.send(Crashed(printable(f"{error_text(error)} ({line_of(error)})"),
                                 traceback.format_exc()[-1 << 16:]))
        else:
            raise
        with suppress(EOFError, ConnectionError):
            channel.receive(wait=True)  # wait until the front has read it and hung up
    return 0


def hung_up() -> tuple[type[Exception], ...]:
    """The errors that say that the other end of the connection has gone. Only connections with TLS have
    imported ssl."""
    tls = sys.modules.get("ssl")
    return EOFError, ConnectionError, TimeoutError, *([tls.SSLError] if tls else [])


def gpu_memory_error(error: Exception, config) -> ConfigError | None:
    """The advice if a GPU's memory has run out; None for any other error."""
    if "torch" not in sys.modules:
        return None
    from chatlm.worker.device import lack_of_gpu_memory
    return lack_of_gpu_memory(error, config)


worker_role = partial(worker_main, run_worker, WORKER_PIPE)  # the role `worker FD PARENT`
rank_role = partial(worker_main, run_rank, RANK_PIPE)        # the role `rank FD PARENT`
survey_role = partial(worker_main, run_survey, SURVEY_PIPE)  # the role `survey FD PARENT`
doctor_role = partial(worker_main, run_doctor, DOCTOR_PIPE)  # the role `doctor FD PARENT`
