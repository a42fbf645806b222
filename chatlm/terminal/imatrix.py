"""The command `imatrix`: measures which weights of a model matter, for `quantize --imatrix`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.messages.quantizing import IMATRIX_PIPE, ImatrixConfig
from chatlm.terminal.file_maker import make_file

if TYPE_CHECKING:
    from chatlm.common.config import Settings


async def imatrix(settings: Settings) -> int:
    return await make_file(settings, "imatrix", IMATRIX_PIPE, ImatrixConfig)
