"""The command `quantize`: a model becomes one GGUF file of a smaller type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.messages.quantizing import QUANTIZE_PIPE, QuantizeConfig
from chatlm.terminal.file_maker import make_file

if TYPE_CHECKING:
    from chatlm.common.config import Settings


async def quantize(settings: Settings) -> int:
    return await make_file(settings, "quantize", QUANTIZE_PIPE, QuantizeConfig)
