"""The table of towers. Those that need more than a row have modules of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.worker.weights.towers import families, pixtral, qwen

if TYPE_CHECKING:
    from chatlm.worker.weights.towers.families import TowerFamily

# model_type of a folder
TOWERS: dict[str, TowerFamily] = families.TOWERS | qwen.TOWERS | pixtral.TOWERS
# clip.projector_type of a GGUF file
FILE_TOWERS: dict[str, TowerFamily] =  families.FILE_TOWERS | qwen.FILE_TOWERS | pixtral.FILE_TOWERS
