"""The entry point of a worker or a rank: it joins its parent before it imports libraries."""

from __future__ import annotations

import gc
import mmap
import os
import ssl
import sys
import traceback
from collections.abc import Sequence as Seq
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.errors import (
    ConfigError, RanksFailed, error_text, lack_of_memory, line_of, printable, require_library)
from chatlm.common.late import importer
from chatlm.common.log import CalmLog, log, start_logging
from chatlm.common.messages.doctor import DOCTOR_PIPE
from chatlm.common.messages.protocol import SURVEY_PIPE, WORKER_PIPE, Crashed, Loading, Unusable
from chatlm.common.messages.quantizing import IMATRIX_PIPE, QUANTIZE_PIPE
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.child import join_parent
from chatlm.common.program import stamp_at_start
from chatlm.worker.ranks.messages import RANK_PIPE

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Pipe


def worker_main(place: str, pipe: Pipe, arguments: Seq[str]) -> int:
    """Join the parent, and run the function at `place`, MODULE:NAME, until the other end hangs up. It gets
    the channel and the first message."""
    channel = join_parent(arguments, pipe)
    load = importer(place)
    if pipe is WORKER_PIPE:
        stamp_at_start()  # before any module of which others, imported later, must be of the same version
    with suppress(ImportError):  # what is missing is said below
        load()  # while the first message is on its way
    gc.freeze()  # as run_role does
    reserve = mmap.mmap(-1, 32 << 20)  # address space reserved for reporting that memory ran out
    try:
        [config] = channel.receive(wait=True, most=1)
        if type(config) is not pipe.kinds[0]:
            raise BadMessage(f"its first message is {type(config).__name__}")
        start_logging(config.settings)
        CalmLog.over_bar = True  # the front shows this process's progress
        channel.send(Loading("importing libraries", 0.0))
        require_library("numpy", "chat_server")
        load()(channel, config)
    except (EOFError, ConnectionError, TimeoutError, ssl.SSLError):  # the other end has gone
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


def gpu_memory_error(error: Exception, config) -> ConfigError | None:
    """The advice if a GPU's memory has run out; None for any other error."""
    if "torch" not in sys.modules:
        return None
    from chatlm.worker.device import lack_of_gpu_memory  # needs numpy, which may be what is missing
    return lack_of_gpu_memory(error, config)


worker_role = partial(worker_main, "chatlm.worker.process:run_worker", WORKER_PIPE)  # `worker FD PARENT`
rank_role = partial(worker_main, "chatlm.worker.other_rank:run_rank", RANK_PIPE)     # and so on
survey_role = partial(worker_main, "chatlm.worker.survey:survey_models", SURVEY_PIPE)
doctor_role = partial(worker_main, "chatlm.worker.doctor.examine:examine", DOCTOR_PIPE)
quantize_role = partial(worker_main, "chatlm.export.gguf.roles:run_quantize", QUANTIZE_PIPE)
imatrix_role = partial(worker_main, "chatlm.export.gguf.roles:run_imatrix", IMATRIX_PIPE)
