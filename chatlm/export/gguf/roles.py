"""The roles `quantize` and `imatrix`: what the processes of these commands run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError, visible
from chatlm.common.files import read_text_of
from chatlm.common.messages.protocol import Loading
from chatlm.common.messages.quantizing import FileWritten
from chatlm.export.gguf.export import export_gguf
from chatlm.export.gguf.importance import write_importance
from chatlm.export.gguf.measure import measure_importance

if TYPE_CHECKING:
    from chatlm.common.messages.quantizing import ImatrixConfig, QuantizeConfig
    from chatlm.common.messages.wire import Channel

REPORT_S = 0.1  # between two reports of progress


class Reporter:
    """Tells the command how far the work is, not too often."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.next_s = 0.0

    def __call__(self, stage: str, fraction: float):
        now_s = time.monotonic()
        if now_s >= self.next_s:
            self.next_s = now_s + REPORT_S
            self.channel.send(Loading(stage, fraction))


def run_quantize(channel: Channel, config: QuantizeConfig):
    settings = config.settings
    imatrix = Path(settings.imatrix).expanduser() if settings.imatrix else None
    result = export_gguf(config.source, Path(config.output), type=settings.type, imatrix=imatrix,
                         progress=Reporter(channel), threads=config.threads, softcap=settings.softcap)
    channel.send(FileWritten(tuple(result.lines())))
    channel.receive(wait=True)  # until the command hangs up


def run_imatrix(channel: Channel, config: ImatrixConfig):
    settings = config.settings
    name = settings.text
    if name is None:
        raise ConfigError("imatrix needs -f FILE, a text like those that the model will read")
    text = read_text_of(name, "-f")
    measured = measure_importance(config.source, settings, text, Path(name).name, chunks=settings.chunks,
                                  progress=Reporter(channel))
    write_importance(measured.importance, Path(config.output))
    channel.send(FileWritten(tuple(measured.lines(visible(config.output)))))
    channel.receive(wait=True)
