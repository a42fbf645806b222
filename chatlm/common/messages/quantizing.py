"""The messages between the commands `quantize` and `imatrix` and the processes that do their work."""

from __future__ import annotations

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Crashed, Loading, Unusable
from chatlm.common.messages.requests import ModelSource
from chatlm.common.messages.wire import Pipe, wire_message


@wire_message(1 << 20)
class QuantizeConfig:
    """Command to process, first: write the model as a GGUF file of --type."""

    settings: Settings  # without API keys
    source: ModelSource
    output: str
    threads: int


@wire_message(1 << 20)
class ImatrixConfig:
    """Command to process, first: measure the importance of the model's weights while it reads --text."""

    settings: Settings  # without API keys
    source: ModelSource
    output: str
    threads: int


@wire_message(1 << 20)
class FileWritten:
    """Process to command, last: the file is complete."""

    lines: tuple[str, ...]  # about it, for the terminal


QUANTIZE_PIPE = Pipe(QuantizeConfig, FileWritten, Loading, Unusable, Crashed)
IMATRIX_PIPE = Pipe(ImatrixConfig, FileWritten, Loading, Unusable, Crashed)
