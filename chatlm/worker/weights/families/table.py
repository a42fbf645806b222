"""The table of families: their names, and the modules of their rows, each imported when a model is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.worker.weights.families.family import Family

Rows = Mapping[str, "Family"]


class Place(NamedTuple):
    """Where a family's row is."""

    rows: Callable[[], Rows]  # imports its module
    architectures: str = ""   # what general.architecture of GGUF files calls it, one or several names


def encoders() -> Rows:
    from chatlm.worker.weights.families.encoders import FAMILIES
    return FAMILIES


def gemma4() -> Rows:
    from chatlm.worker.weights.families.gemma4 import FAMILIES
    return FAMILIES


def granite() -> Rows:
    from chatlm.worker.weights.families.granite import FAMILIES
    return FAMILIES


def laguna() -> Rows:
    from chatlm.worker.weights.families.laguna import FAMILIES
    return FAMILIES


def latents() -> Rows:
    from chatlm.worker.weights.families.latents import FAMILIES
    return FAMILIES


def layernorms() -> Rows:
    from chatlm.worker.weights.families.layernorms import FAMILIES
    return FAMILIES


def lfm2() -> Rows:
    from chatlm.worker.weights.families.lfm2 import FAMILIES
    return FAMILIES


def minicpm() -> Rows:
    from chatlm.worker.weights.families.minicpm import FAMILIES
    return FAMILIES


def mixtures() -> Rows:
    from chatlm.worker.weights.families.mixtures import FAMILIES
    return FAMILIES


def muse() -> Rows:
    from chatlm.worker.weights.families.muse import FAMILIES
    return FAMILIES


def nemotron() -> Rows:
    from chatlm.worker.weights.families.nemotron import FAMILIES
    return FAMILIES


def plain() -> Rows:
    from chatlm.worker.weights.families.plain import FAMILIES
    return FAMILIES


def qwen35() -> Rows:
    from chatlm.worker.weights.families.qwen35 import FAMILIES
    return FAMILIES


def rotary_encoders() -> Rows:
    from chatlm.worker.weights.families.rotary_encoders import FAMILIES
    return FAMILIES


def wide_mixtures() -> Rows:
    from chatlm.worker.weights.families.wide_mixtures import FAMILIES
    return FAMILIES


class Families(Mapping[str, "Family"]):
    """The rows by config.json's model_type. Names are known without the modules of rows."""

    def __init__(self, places: Mapping[str, Place]):
        self.places = places

    def __getitem__(self, name: str) -> Family:
        return self.places[name].rows()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places


FAMILIES = Families({
    "llama": Place(plain, "llama"),
    "mistral": Place(plain),
    "ministral3": Place(plain, "mistral3"),
    "mixtral": Place(plain),
    "qwen2": Place(plain, "qwen2 qwen2vl"),
    "qwen3": Place(plain, "qwen3 qwen3vl"),
    "qwen3_moe": Place(plain, "qwen3moe"),
    "qwen3_vl_moe_text": Place(wide_mixtures, "qwen3vlmoe"),
    "qwen2_moe": Place(plain, "qwen2moe"),
    "gpt_oss": Place(plain, "gpt-oss"),
    "smollm3": Place(plain, "smollm3"),
    "gemma2": Place(plain, "gemma2"),
    "gemma3_text": Place(plain, "gemma3 gemma-embedding"),
    "gemma4_text": Place(gemma4, "gemma4"),
    "gemma4_unified_text": Place(gemma4),
    "phi3": Place(plain, "phi3"),
    "phimoe": Place(wide_mixtures, "phimoe"),
    "nanochat": Place(plain),
    "granite": Place(granite, "granite"),
    "granitemoe": Place(granite),
    "granitemoeshared": Place(granite, "granitemoe"),
    "granitemoehybrid": Place(granite, "granitehybrid"),
    "olmo2": Place(plain, "olmo2"),
    "olmo3": Place(plain),
    "olmoe": Place(plain, "olmoe"),
    "glm4": Place(plain, "glm4"),
    "exaone4": Place(plain, "exaone4"),
    "ernie4_5": Place(plain, "ernie4_5"),
    "seed_oss": Place(plain, "seed_oss"),
    "hunyuan_v1_dense": Place(plain, "hunyuan-dense"),
    "hunyuan_v1_moe": Place(wide_mixtures, "hunyuan-moe"),
    "glm4_moe": Place(mixtures, "glm4moe"),
    "bailing_moe_v2": Place(mixtures, "bailingmoe2"),
    "minimax_m2": Place(mixtures, "minimax-m2"),
    "ernie4_5_moe": Place(mixtures, "ernie4_5-moe"),
    "laguna": Place(laguna, "laguna"),
    "muse_glimmer_text": Place(muse, "muse-glimmer"),
    "minicpm": Place(minicpm, "minicpm"),
    "deepseek_v3": Place(latents, "deepseek2"),
    "deepseek_v2": Place(latents),
    "kimi_k2": Place(latents),
    "glm4_moe_lite": Place(latents),
    "youtu": Place(latents),
    "mistral4": Place(latents, "mistral4"),
    "minicpm3": Place(latents, "minicpm3"),
    "gpt2": Place(layernorms, "gpt2"),
    "gpt_neox": Place(layernorms, "gptneox"),
    "starcoder2": Place(layernorms, "starcoder2"),
    "cohere": Place(layernorms, "command-r"),
    "cohere2": Place(layernorms, "cohere2"),
    "cohere2_moe": Place(layernorms, "cohere2moe"),
    "olmo": Place(layernorms, "olmo"),
    "qwen3_5_text": Place(qwen35, "qwen35"),
    "qwen3_5_moe_text": Place(qwen35, "qwen35moe"),
    "qwen3_next": Place(qwen35, "qwen3next"),
    "lfm2": Place(lfm2, "lfm2"),
    "lfm2_moe": Place(lfm2, "lfm2moe"),
    "nemotron_h": Place(nemotron, "nemotron_h nemotron_h_moe"),
    "bert": Place(encoders, "bert"),
    "roberta": Place(encoders),
    "xlm-roberta": Place(encoders),
    "mpnet": Place(encoders),
    "modernbert": Place(rotary_encoders, "modern-bert"),
    "nomic_bert": Place(rotary_encoders, "nomic-bert"),
    "nomic_bert_moe": Place(rotary_encoders, "nomic-bert-moe"),
    "gte": Place(rotary_encoders),
    "new": Place(rotary_encoders)})
GGUF_FAMILIES = {architecture: name for name, place in FAMILIES.places.items()
                 for architecture in place.architectures.split()}
VISION = {  # model_type of an image model, read as text only -> its text model's default
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text",
    "mistral3": "mistral", "llava": "llama",
    "smolvlm": "llama", "idefics3": "llama", "kimi_k25": "kimi_k2", "muse_glimmer": "muse_glimmer_text",
    "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_vl_moe_text", "lfm2_vl": "lfm2",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
TEXT_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
