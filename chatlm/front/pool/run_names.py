"""The names of the runs that --watch finds, and of their steps.

A run is one stage of a nanochat tag, `d4-base`; all stages of the tag are its lineage, `d4`. Other runs have
the name of their folder, and each is a lineage of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.hub.nanochat_checkpoints import AS_TRAINED

if TYPE_CHECKING:
    from pathlib import Path
    from chatlm.common.hub.run_checkpoints import CheckpointFiles


class RunName(NamedTuple):
    run: str
    lineage: str
    stage: str              # "" if it is unknown
    older: tuple[str, ...]  # its names in earlier versions of this server; requests may still use them

    def checkpoint_name(self, number: int) -> str:
        return f"{self.run}@{number}"

    def older_steps(self, number: int) -> tuple[str, ...]:
        """Other names of a step. One of them may also be the name of another run's step."""
        return tuple(f"{name}@{number}" for name in self.older)

    @property
    def latest(self) -> str:
        return f"{self.run}@latest"

    @property
    def latest_of_lineage(self) -> str:
        return f"{self.lineage}@latest"

    @property
    def order(self) -> tuple[str, int, str]:
        """A sort key: lineages by name, and the stages of each in the order of training."""
        return self.lineage, AS_TRAINED.index(self.stage) if self.stage else -1, self.run


class RunNames:
    """The names of all runs below a folder. A run keeps its name while the server runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[Path, RunName] = {}
        self.furthest: dict[str, int] = {}  # by lineage: how far its training has come, of AS_TRAINED

    def learn(self, checkpoints: Iterable[CheckpointFiles]):
        """Give names to the runs of these steps, which are all that are there."""
        checkpoints = [*checkpoints]
        folders = {checkpoint.tag for checkpoint in checkpoints}
        for checkpoint in checkpoints:
            if checkpoint.run not in self.known:
                self.known[checkpoint.run] = self._make_name(checkpoint, folders)

    def of(self, run: Path) -> RunName:
        return self.known[run]

    def _make_name(self, checkpoint: CheckpointFiles, folders: set[str]) -> RunName:
        """The names of a step's run. If its name is taken, its path is used instead; a folder that is called
        like a stage, such as `d4-base`, has the first right to that name."""
        place = checkpoint.place
        run = checkpoint.run
        inside = run.is_relative_to(self.folder) and run != self.folder
        path = str(run.relative_to(self.folder)) if inside else run.name
        taken = {name.run for name in self.known.values()} | {name.lineage for name in self.known.values()}
        if place is None or place.alone:
            name = path if checkpoint.tag in taken else checkpoint.tag
            return RunName(name, name, place.stage if place else "", (checkpoint.tag, path))
        lineage = place.lineage
        name = f"{lineage}-{place.stage}"
        name = path if name in taken | folders else name
        return RunName(name, lineage, place.stage, (checkpoint.tag, path))

    def is_furthest(self, run: Path) -> bool:
        """Is it the latest stage in the training of its lineage? A stage that was seen once stays the latest
        even if its files are removed, so that an earlier one does not take its name silently."""
        name = self.known[run]
        stage = name.order[1]
        self.furthest[name.lineage] = max(stage, self.furthest.get(name.lineage, stage))
        return self.furthest[name.lineage] == stage
