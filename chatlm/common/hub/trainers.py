"""Checkpoints of trainers other than nanochat and nanoGPT: whose they are, and what to do with each.

A file is told by its first bytes and, if torch.save wrote it, by the names in its pickle. These are read as
opcodes: nothing is unpickled."""

from __future__ import annotations

import functools
import itertools
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import opened
from chatlm.common.hub.archives import archive_in, first_bytes
from chatlm.common.hub.nanochat_checkpoints import meta_of, step_of
from chatlm.common.hub.trainer_files import LITGPT_CONFIG, LITGPT_FILE, NANOGPT_FILE, is_litgpt_folder

BUILD_NANOGPT = "build-nanogpt"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".distcp")
MOST_PICKLED = 1 << 20  # bytes of a pickle that are looked at: names come first, and tensors take none of it
MOST_OPCODES = 100_000  # of it that are looked at, in 0.1 s; a tensor takes about 40
# of folders that are searched for a checkpoint of which an error tells
MOST_DEPTH = 4
MOST_ENTRIES = 2000
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a file of torch.save until 2020

TO_FOLDER = "convert it to a Hugging Face folder (config.json, *.safetensors, tokenizer.json)"


class Trainer(NamedTuple):
    """Who writes a kind of checkpoint."""

    name: str
    advice: str  # how to get a model of it that this server opens; {} stands for the path

    def sentence(self, path: Path) -> str:
        return f"{path} is a checkpoint of {self.name}: {self.advice.replace('{}', str(path))}"


BUILD = Trainer(BUILD_NANOGPT, "give it, or its folder")  # it opens
MODDED = Trainer("modded-nanogpt", (
    "its architecture is another in each record, and this server does not run it. Sample with the script "
    "that wrote it (the file holds its text under the key \"code\"); checkpoints of nanochat, nanoGPT and "
    "build-nanogpt open as they are"))
LLAMA2C = Trainer("llama2.c", (
    "write a Hugging Face folder with its export.py (`python export.py FOLDER --version -1 --checkpoint {}`) "
    "and add a tokenizer.json"))
LLAMA2C_BIN = Trainer("llama2.c", (
    "write a Hugging Face folder from the ckpt.pt that it was exported from (`python export.py FOLDER "
    "--version -1 --checkpoint out/ckpt.pt`), and add a tokenizer.json"))
LLMC = Trainer("llm.c", (
    "write a Hugging Face folder with its dev/eval/export_hf.py (`python export_hf.py --input {} "
    "--output FOLDER`)"))
LLMC_STATE = Trainer("llm.c", (
    "it holds the state of the optimizer; the model is model_*.bin beside it, which dev/eval/export_hf.py "
    "writes as a Hugging Face folder"))
NANOGPT = Trainer("nanoGPT", (
    "name it ckpt.pt, in a folder of its own with the vocabulary (meta.pkl, or GPT-2's tokenizer.json), and "
    "give that"))
LITGPT = Trainer("litgpt", f"give its folder, which must also have {LITGPT_CONFIG} and tokenizer.json")
LITGPT_LORA = Trainer("litgpt", (
    f"it holds only what LoRA adds: `litgpt merge_lora FOLDER` writes a whole {LITGPT_FILE}"))
LITGPT_ADAPTER = Trainer("litgpt", (
    "it holds only an adapter of the LLaMA-Adapter kind, which this server does not run: fine-tune with "
    "`litgpt finetune_lora` or `litgpt finetune_full`"))
LITGPT_PARTS = Trainer("litgpt", (
    "it is in parts, as FSDP saves it: join them with `python -m "
    "lightning.fabric.utilities.consolidate_checkpoint {}`, and name the result lit_model.pth"))
TORCHTUNE = Trainer("torchtune", (
    "have its FullModelHFCheckpointer write safetensors (safe_serialization: True), and give that folder"))
TORCHTUNE_STATE = Trainer("torchtune", (
    "it holds the state of the training; the model's *.safetensors are in the folder of an epoch"))
LIGHTNING = Trainer("Lightning", (
    "load it into its LightningModule, and save_pretrained of the transformers model in it writes a Hugging "
    "Face folder"))
DEEPSPEED = Trainer("DeepSpeed", (
    "join its parts with the zero_to_fp32.py that lies beside them (`python zero_to_fp32.py . OUT "
    "--safe_serialization`), and add config.json and the tokenizer"))
MEGATRON = Trainer("Megatron", (
    "export it as a Hugging Face folder, with Megatron Bridge (AutoBridge.export_ckpt) or the converter of "
    "the framework that trained it"))
DCP = Trainer("torch.distributed.checkpoint", (
    "it is in parts: use the converter of its trainer (torchtitan: "
    "scripts/checkpoint_conversion/convert_to_hf.py; accelerate and the Trainer of transformers: `accelerate "
    "merge-weights FOLDER OUT`), and give the Hugging Face folder that it writes"))
META = Trainer("Meta's Llama", (
    "this server reads the Hugging Face form: transformers' convert_llama_weights_to_hf.py writes it, and "
    "the hub has it"))
HUGGING_FACE = Trainer("transformers, in PyTorch's form", (
    "load it with transformers (from_pretrained of its folder), and save_pretrained writes safetensors"))
OLD = Trainer("PyTorch, in the form from before 2020", (
    f"load it in Python and save it again; then {TO_FOLDER}"))

# Texts that are all in the pickle of a trainer's files: keys, mostly. The first row that fits counts.
BY_TEXTS: Seq[tuple[Trainer, Seq[str]]] = (
    (MODDED, ("step", "code", "model", "optimizers")), (LLAMA2C, ("model_args", "multiple_of", "n_layers")),
    (NANOGPT, ("model", "model_args", "n_layer", "n_head")), (LIGHTNING, ("pytorch-lightning_version",)),
    (DEEPSPEED, ("ds_version",)), (DEEPSPEED, ("ds_config",)), (MEGATRON, ("checkpoint_version", "args")))
# A tensor's name, where keys say nothing
BY_TENSOR: Seq[tuple[Trainer, str]] = (
    (LITGPT, r"(\w+\.)?transformer\.h\.\d+\.attn\.(qkv|attn)\.weight"), (META, r"tok_embeddings\.weight"),
    (HUGGING_FACE, r"(model\.layers|h|gpt_neox\.layers|(\w+\.)?encoder\.layer)\.\d+\.[\w.]+\.weight"))
BY_NAME = (  # of a file; its contents would not say it
    (r"lit_model\.pth\.lora", LITGPT_LORA), (r"lit_model\.pth\.adapter(_v2)?", LITGPT_ADAPTER),
    (r"(hf_model_\d+_\d+|meta_model_\d+)\.pt", TORCHTUNE), (r"recipe_state\.pt", TORCHTUNE_STATE),
    (r"consolidated\.\d+\.pth", META), (r"model_optim_rng\.pt", MEGATRON),
    (r"(\w+_)?(mp_rank_\d+_model|zero_pp_rank_\d+_mp_rank_\d+_optim)_states\.pt", DEEPSPEED),
    (r"__\d+_\d+\.distcp", DCP), (r"pytorch_model(-\d+-of-\d+)?\.bin", HUGGING_FACE))
BESIDE_MODELS = re.compile(  # files of a training that are no models
    r"(optim|optimizer|scheduler|rng_state|training_args|scaler|random_states|events).*")


def trainer_of(path: Path) -> Trainer | None:
    """Who wrote a file; None if that is unknown, or it is no checkpoint. OSError or ConfigError if it cannot
    be read."""
    status = path.stat()
    return known_trainer(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def known_trainer(path: Path, size: int, changed_ns: int) -> Trainer | None:
    """`trainer_of` this version of a file."""
    if path.is_dir():
        return trainer_of_folder(path)
    for pattern, trainer in BY_NAME:
        if re.fullmatch(pattern, path.name):
            return trainer
    if not path.is_file() or path.suffix not in SUFFIXES:
        return None
    with opened(path) as file:
        begin = file.read(1024)
    if begin.startswith(OLD_TORCH):
        return OLD
    if begin.startswith(b"PK"):
        return trainer_of_zip(path)
    return trainer_of_bytes(begin, size)


def trainer_of_folder(path: Path) -> Trainer | None:
    """Who wrote a checkpoint that is a folder of parts."""
    names = {entry.name for entry in itertools.islice(path.iterdir(), MOST_ENTRIES)}
    if any(name.endswith(".distcp") for name in names):
        if path.name == LITGPT_FILE:
            return LITGPT_PARTS
        return MEGATRON if {"common.pt", "metadata.json"} <= names else DCP
    if "latest_checkpointed_iteration.txt" in names:
        return MEGATRON
    if "zero_to_fp32.py" in names:
        return DEEPSPEED
    return None


def trainer_of_zip(path: Path) -> Trainer | None:
    """Who wrote a file of torch.save."""
    texts, classes = names_in(path)
    if "GPTConfig" in {*classes, *texts} and texts.keys() >= {"model", "config", "step", "val_loss"}:
        return BUILD
    for trainer, needed in BY_TEXTS:
        if texts.keys() >= {*needed}:
            return trainer
    for trainer, pattern in BY_TENSOR:
        if any(re.fullmatch(pattern, text) for text in texts):
            return trainer
    return None


def names_in(path: Path) -> tuple[dict[str, None], set[str]]:
    """The texts in the pickle of a torch.save file, in order, and the names of the classes in it. Nothing is
    unpickled; of a damaged file there may be none."""
    texts = dict[str, None]()
    classes = set[str]()
    with opened(path) as file:
        try:
            with archive_in(file) as archive:
                [name] = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                pickled = first_bytes(archive, name, MOST_PICKLED)
            for opcode, argument, _ in itertools.islice(pickletools.genops(pickled), MOST_OPCODES):
                if opcode.name == "GLOBAL":
                    classes.add(str(argument).rpartition(" ")[2])
                elif isinstance(argument, str) and "UNICODE" in opcode.name:
                    texts[argument] = None
        except Exception:  # what is damaged or hostile can raise nearly anything
            pass
    return texts, classes


def trainer_of_bytes(begin: bytes, size: int) -> Trainer | None:
    """Who wrote a plain binary file, by the numbers that it begins with."""
    if len(begin) < 28:
        return None
    numbers = struct.unpack("<7i", begin[:28])
    if numbers[0] == 20240326:
        return LLMC
    if numbers[0] == 20240527:
        return LLMC_STATE
    if begin.startswith(b"24ka") or size == llama2c_bytes(*numbers):
        return LLAMA2C_BIN
    return None


def llama2c_bytes(C: int, F: int, L: int, H: int, Hkv: int, V: int, T: int) -> int | None:
    """The bytes of a file in the oldest form of llama2.c with these sizes; None if no model has them. The
    head is the embedding where V is positive."""
    if min(C, F, L, H, Hkv, abs(V), T) < 1 or C % H or H % Hkv:
        return None
    D = C // H
    layer = 2 * C + 2 * C * C + 2 * C * Hkv * D + 3 * C * F
    numbers = abs(V) * C * (2 if V < 0 else 1) + L * layer + C + 2 * T * (D // 2)
    return 28 + 4 * numbers


def foreign(path: Path) -> str:
    """What a checkpoint of another trainer is and what to do with it; "" for none, and for one that opens."""
    try:
        trainer = trainer_of(path)
    except (OSError, ConfigError):
        return ""
    if trainer is None or trainer is BUILD or trainer is NANOGPT and path.name == NANOGPT_FILE:
        return ""
    return trainer.sentence(path)


def unknown_torch_file(path: Path) -> str:
    """What to say of a file of torch.save that nobody is known to write; "" if it is no such file, or
    nanochat's."""
    if step_of(path.name) is not None and meta_of(path).exists():
        return ""
    try:
        with opened(path) as file:
            is_zip = file.read(4) == b"PK\3\4"
            is_whole = zipfile.is_zipfile(file)
        if is_zip and not is_whole:
            return f"{path} is a file of torch.save without its end: it is being written, or copy it again"
        texts = names_in(path)[0] if is_zip else {}
    except (OSError, ConfigError):
        return ""
    names = [text for text in texts if not re.fullmatch(r"storage|cpu|(cuda:)?\d+", text)]
    if not names or any(name.endswith("transformer.h.0.attn.c_q.weight") for name in names):
        return ""
    return (f"{path} is a file of torch.save by no trainer that this server knows (in it: "
            f"{', '.join(map(shown, names[:6]))}): {TO_FOLDER}")


def is_build_nanogpt(path: Path) -> bool:
    """Is this file a checkpoint of build-nanogpt? nanochat's have such a name too, and a meta file beside."""
    if step_of(path.name) is None or meta_of(path).exists():
        return False
    with suppress(OSError, ConfigError):
        return trainer_of(path) is BUILD
    return False


def build_nanogpt_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of build-nanogpt in a folder, by step."""
    steps = dict[int, Path]()
    for path in folder.glob("model_*.pt"):
        if (step := step_of(path.name)) is not None and is_build_nanogpt(path):
            steps[step] = path
    return dict(sorted(steps.items()))


def foreign_in(folder: Path) -> str:
    """What to say of a checkpoint of another trainer in a folder or in those below it, first of all of one
    that opens by its own path; "" without any."""
    first = foreign(folder)
    for path in itertools.islice(entries_below(folder), MOST_ENTRIES):
        known = path.suffix in SUFFIXES and not BESIDE_MODELS.fullmatch(path.name)
        if known or path.name in LITGPT_PARTIAL or os.path.isdir(path):
            if opens := opens_below(path):
                return opens
            first = first or foreign(path)
    return first


LITGPT_PARTIAL = "lit_model.pth.lora", "lit_model.pth.adapter", "lit_model.pth.adapter_v2"


def opens_below(path: Path) -> str:
    """What to say of a checkpoint that would open by its own path; "" if this is none."""
    if path.name == LITGPT_FILE and is_litgpt_folder(path.parent):
        beside = itertools.islice(path.parent.parent.iterdir(), MOST_ENTRIES)
        folders = sorted(str(folder) for folder in beside if is_litgpt_folder(folder))
        if len(folders) == 1:
            return f"{path.parent} is a folder of litgpt: give it"
        return f"{path.parent.parent} has folders of litgpt; give one of them: {', '.join(folders[:20])}"
    if is_build_nanogpt(path):
        return BUILD.sentence(path)
    return ""


def entries_below(folder: Path) -> Iterator[Path]:
    """What is in a folder and in those below it, down to MOST_DEPTH: nearer ones first, the last name of each
    first, which of steps is the last one."""
    level = [folder]
    for _ in range(MOST_DEPTH):
        below = []
        for place in level:
            with suppress(OSError):
                for entry in sorted(os.scandir(place), key=lambda entry: entry.name, reverse=True):
                    yield Path(entry.path)
                    if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                        below.append(Path(entry.path))
        level = below
