"""What nanochat's training has written about a checkpoint: in its meta file, and in the log of its stage.

The names of metrics are upstream's where it has some. As base_train.py, chat_sft.py and chat_rl.py at 92d63d4
write them; what is missing, broken or no number is left out."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from chatlm.common.hub.nanochat_checkpoints import (
    checkpoint_at, is_told_a_depth, part_of, read_meta, step_of)

SMOOTHING = 0.9       # of the average that training keeps of its loss
TAIL_BYTES = 8 << 20  # of a log that are read: its end
MOST_LINES = 20_000   # of these that are kept
LOGS = {"mid": ("mid_train.log", "mid.log"), "sft": ("sft.log", "chat_sft.log"),
        "chat": ("chat.log", "sft.log", "chat_sft.log"), "rl": ("rl.log", "chat_rl.log")}  # by stage, as in
# upstream's runs/run.sh. base_train's has nothing that the meta file does not have
# chat_rl: "Step 3/99 | Average reward: 0.5 | Average ..."; each pass has a line with other words in between
REWARD = re.compile(rb"^Step (\d{1,15})/\d+ \| Average reward: (\S{1,40}) \|", re.MULTILINE)
# chat_sft: "step 00450 (99.9%) | loss: 1.25 | ...", of the weights after so many steps. base_train's lines,
# "step 00450/00999 ...", count from 0; its loss is in the meta file
LOSS = re.compile(rb"^step (\d{1,15}) \([^)\n]{1,20}\) \| loss: (\S{1,40}) \|", re.MULTILINE)


class RecordedMetrics(NamedTuple):
    """What is known of a checkpoint without computing anything."""

    metrics: dict[str, float]
    stale: tuple[str, ...] = ()  # names of metrics that belong to an earlier step


def written_beside(model: Path) -> RecordedMetrics:
    """What the meta file of `model_<step>.pt` says of it. Nothing of other files."""
    step = step_of(model.name)
    return RecordedMetrics({}) if step is None else written_in(read_meta(model), step)


def written_in(meta: Mapping[str, Any], step: int) -> RecordedMetrics:
    """What the object in the meta file of a step says of it."""
    loop = part_of(meta, "loop_state")
    found: dict[str, Any] = {"val_bpb": meta.get("val_bpb"), "min_val_bpb": loop.get("min_val_bpb"),
                             "total_training_time": loop.get("total_training_time"),
                             "train_loss": unbiased(loop.get("smooth_train_loss"), step),
                             "reward": meta.get("reward", loop.get("reward"))}
    if is_number(batch := meta.get("total_batch_size")):
        found["tokens"] = batch * step
    metrics = {name: value for name, value in found.items() if is_number(value)}
    return RecordedMetrics(metrics, ("val_bpb",) if "val_bpb" in metrics and is_stale(meta, step) else ())


def unbiased(average: Any, step: int) -> float | None:
    """The loss of training as its log says it. The average begins at 0, so after few steps it is too low."""
    return average / (1 - SMOOTHING ** step) if is_number(average) and step > 0 else None


def is_stale(meta: Mapping[str, Any], step: int) -> bool:
    """Was the model last evaluated before this step? base_train evaluates every `eval_every` steps and at its
    end, and saves every `save_every` steps and at its end; chat_sft does both at its end.

    Where only the size of the model says how long training lasts, a step that is saved in turn counts as not
    the last one."""
    config = part_of(meta, "user_config")
    eval_every = config.get("eval_every")
    save_every = config.get("save_every")
    if type(eval_every) is not int or eval_every > 0 and step % eval_every == 0:
        return False
    in_turn = type(save_every) is int and save_every > 0 and step % save_every == 0
    is_last = not in_turn or config.get("num_iterations") == step
    return not is_last or eval_every <= 0 and is_told_a_depth(meta)


def is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < 1e300  # neither NaN nor infinite


# --- logs --------------------------------------------------------------------------------------------------


class Logs:
    """What the logs of stages say of steps: the training loss of chat_sft and the reward of chat_rl, which no
    meta file has. A log lies in the folder of the checkpoints or, in an experiment, in that of the tag."""

    def __init__(self):
        self.read: dict[Path, tuple[tuple, dict[int, dict[str, float]]]] = {}  # by log: version, what it says

    def metrics_of(self, model: Path) -> dict[int, dict[str, float]]:
        """By step, of the stage that a checkpoint belongs to; {} without a log. Only the end of a log is
        read, and only after it has changed."""
        checkpoint = checkpoint_at(model)
        if checkpoint is None:
            return {}
        place = checkpoint.place
        folders = [model.parent, *([checkpoint.tag_folder] if place.experiment else [])]
        for path in (folder / name for folder in folders for name in LOGS.get(place.stage, ())):
            try:
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                version = status.st_ino, status.st_size, status.st_mtime_ns
                if path not in self.read or self.read[path][0] != version:
                    self.read[path] = version, read_log(path, place.stage)
            except OSError:
                continue
            return self.read[path][1]
        return {}


def read_log(path: Path, stage: str) -> dict[int, dict[str, float]]:
    """Of a step that the log has twice, the later line counts."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
        tail = file.read(TAIL_BYTES)
    name, pattern = ("reward", REWARD) if stage == "rl" else ("train_loss", LOSS)
    found = dict[int, dict[str, float]]()
    for step, text in pattern.findall(tail)[-MOST_LINES:]:
        try:
            value = float(text)
        except ValueError:
            continue
        if is_number(value):
            found[int(step)] = {name: value}
    return found
