"""The table of towers. Those that need more than a row have modules of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.worker.weights import pixtral_tower, qwen_towers, towers

if TYPE_CHECKING:
    from chatlm.worker.weights.towers import TowerFamily

# model_type of a folder
TOWERS: dict[str, TowerFamily] = towers.TOWERS | qwen_towers.TOWERS | pixtral_tower.TOWERS
# clip.projector_type of a GGUF file
FILE_TOWERS: dict[str, TowerFamily] = (
    towers.FILE_TOWERS | qwen_towers.FILE_TOWERS | pixtral_tower.FILE_TOWERS)
