"""The table of families: their names, and the modules of their rows, each imported when a model is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.late import importer

if TYPE_CHECKING:
    from chatlm.worker.weights.families.family import Family

Rows = Mapping[str, "Family"]


class RowPlace(NamedTuple):
    """Where a family's row is."""

    rows: Callable[[], Rows]  # imports its module
    architectures: str = ""   # what general.architecture of GGUF files calls it, one or several names


def rows_in(module: str) -> Callable[[], Rows]:
    return importer(f"chatlm.worker.weights.families.{module}:FAMILIES")


encoders = rows_in("encoders")
gemma4 = rows_in("gemma4")
granite = rows_in("granite")
laguna = rows_in("laguna")
latents = rows_in("latents")
layernorms = rows_in("layernorms")
lfm2 = rows_in("lfm2")
minicpm = rows_in("minicpm")
mixtures = rows_in("mixtures")
muse = rows_in("muse")
nemotron = rows_in("nemotron")
plain = rows_in("plain")
qwen35 = rows_in("qwen35")
rotary_encoders = rows_in("rotary_encoders")
wide_mixtures = rows_in("wide_mixtures")


class Families(Mapping[str, "Family"]):
    """The rows by config.json's model_type. Names are known without the modules of rows."""

    def __init__(self, places: Mapping[str, RowPlace]):
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
    "llama": RowPlace(plain, "llama"),
    "mistral": RowPlace(plain),
    "ministral3": RowPlace(plain, "mistral3"),
    "mixtral": RowPlace(plain),
    "qwen2": RowPlace(plain, "qwen2 qwen2vl"),
    "qwen3": RowPlace(plain, "qwen3 qwen3vl"),
    "qwen3_moe": RowPlace(plain, "qwen3moe"),
    "qwen3_vl_moe_text": RowPlace(wide_mixtures, "qwen3vlmoe"),
    "qwen2_moe": RowPlace(plain, "qwen2moe"),
    "gpt_oss": RowPlace(plain, "gpt-oss"),
    "smollm3": RowPlace(plain, "smollm3"),
    "gemma2": RowPlace(plain, "gemma2"),
    "gemma3_text": RowPlace(plain, "gemma3 gemma-embedding"),
    "gemma4_text": RowPlace(gemma4, "gemma4"),
    "gemma4_unified_text": RowPlace(gemma4),
    "phi3": RowPlace(plain, "phi3"),
    "phimoe": RowPlace(wide_mixtures, "phimoe"),
    "nanochat": RowPlace(plain),
    "granite": RowPlace(granite, "granite"),
    "granitemoe": RowPlace(granite),
    "granitemoeshared": RowPlace(granite, "granitemoe"),
    "granitemoehybrid": RowPlace(granite, "granitehybrid"),
    "olmo2": RowPlace(plain, "olmo2"),
    "olmo3": RowPlace(plain),
    "olmoe": RowPlace(plain, "olmoe"),
    "glm4": RowPlace(plain, "glm4"),
    "exaone4": RowPlace(plain, "exaone4"),
    "ernie4_5": RowPlace(plain, "ernie4_5"),
    "seed_oss": RowPlace(plain, "seed_oss"),
    "hunyuan_v1_dense": RowPlace(plain, "hunyuan-dense"),
    "hunyuan_v1_moe": RowPlace(wide_mixtures, "hunyuan-moe"),
    "glm4_moe": RowPlace(mixtures, "glm4moe"),
    "bailing_moe_v2": RowPlace(mixtures, "bailingmoe2"),
    "minimax_m2": RowPlace(mixtures, "minimax-m2"),
    "ernie4_5_moe": RowPlace(mixtures, "ernie4_5-moe"),
    "laguna": RowPlace(laguna, "laguna"),
    "muse_glimmer_text": RowPlace(muse, "muse-glimmer"),
    "minicpm": RowPlace(minicpm, "minicpm"),
    "deepseek_v3": RowPlace(latents, "deepseek2"),
    "deepseek_v2": RowPlace(latents),
    "kimi_k2": RowPlace(latents),
    "glm4_moe_lite": RowPlace(latents),
    "youtu": RowPlace(latents),
    "mistral4": RowPlace(latents, "mistral4"),
    "minicpm3": RowPlace(latents, "minicpm3"),
    "gpt2": RowPlace(layernorms, "gpt2"),
    "gpt_neox": RowPlace(layernorms, "gptneox"),
    "starcoder2": RowPlace(layernorms, "starcoder2"),
    "cohere": RowPlace(layernorms, "command-r"),
    "cohere2": RowPlace(layernorms, "cohere2"),
    "cohere2_moe": RowPlace(layernorms, "cohere2moe"),
    "olmo": RowPlace(layernorms, "olmo"),
    "qwen3_5_text": RowPlace(qwen35, "qwen35"),
    "qwen3_5_moe_text": RowPlace(qwen35, "qwen35moe"),
    "qwen3_next": RowPlace(qwen35, "qwen3next"),
    "lfm2": RowPlace(lfm2, "lfm2"),
    "lfm2_moe": RowPlace(lfm2, "lfm2moe"),
    "nemotron_h": RowPlace(nemotron, "nemotron_h nemotron_h_moe"),
    "bert": RowPlace(encoders, "bert"),
    "roberta": RowPlace(encoders),
    "xlm-roberta": RowPlace(encoders),
    "mpnet": RowPlace(encoders),
    "modernbert": RowPlace(rotary_encoders, "modern-bert"),
    "nomic_bert": RowPlace(rotary_encoders, "nomic-bert"),
    "nomic_bert_moe": RowPlace(rotary_encoders, "nomic-bert-moe"),
    "gte": RowPlace(rotary_encoders),
    "new": RowPlace(rotary_encoders)})
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
