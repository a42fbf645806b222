"""Makes the tables of families in docs/models/families.md: the families from the program's rows, the comparisons from the tests' rows.
It also writes their number into the README.

    python docs/families.py
"""

import re

import sys
from collections import Counter
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests" / "support")]

from chatlm.worker.weights.families.table import FAMILIES, GGUF_FAMILIES, VISION      # noqa: E402
from chatlm.worker.weights.formats.refused import ROWS       # noqa: E402
from encoders import FILES, MODELS as ENCODERS       # noqa: E402  of the tests
from families import CONVERTED, GGUF_MODELS, MODELS        # noqa: E402
from generations import GENERATIONS        # noqa: E402
from other_names import OTHER_NAMES        # noqa: E402
from sight_families import CONVERTED as CONVERTED_SEEING, MODEL_TYPES        # noqa: E402
from sight_qwen import KINDS        # noqa: E402
from tiny_sight import SHAPES        # noqa: E402

HEADING = """\
## Families

{numbers}

`.venv/bin/python docs/families.py` makes this table from the rows of the program and of the tests, and a test checks it. "transformers, 4" means that four tiny
random models give transformers' logits and tokens; "images, 2" that two models that see give its logits from pixels. "converter, 3" means that llama.cpp's converter made files of three models, which are the same models as their
folders, and "converted images, 1" that it made one of a model that sees. [What has been tested](#what-has-been-tested) says more.

| family | `model_type` of a folder | compared with | architecture of a GGUF file | compared with |
|---|---|---|---|---|
"""
END = "\nAny other family is an error"
REFUSED_HEADING = """\
### Families that are not computed yet

They are known, and refused before anything large of them is downloaded. Everything else about them is as the error says.

| `model_type` of a folder | architecture of a GGUF file | what is missing |
|---|---|---|
"""
REFUSED_END = "\n### What some families need"
# headings, of that page unless another is named
STATES, IMAGES, GEMMA_4 = "#models-whose-layers-keep-a-state", "#images", "#gemma-4"
LATENTS = "#latent-attention"
POSITIONS, VOCABULARIES, GGUF = "#positions-sizes-and-tokens", "#checkpoints-without-a-vocabulary", "#where-a-gguf-file-and-its-folder-differ"
ENCODES = "embedders.md#embedders-and-rerankers"
NOTES = {       # by model_type: what a reader wants to know beside the title
    "llama": f"3.1, 3.2, 3.3 too; SmolVLM and Idefics 3 [with images]({IMAGES}); LLaVA's text model",
    "mistral": f"Small 3.1, 3.2 and Devstral [with images]({IMAGES})",
    "ministral3": f"[with images]({IMAGES}), [up to 16,384 tokens]({POSITIONS})",
    "qwen2": "the text model of Qwen2-VL and Qwen2.5-VL",
    "qwen3": f"Qwen3-VL [with images]({IMAGES})",
    "qwen3_vl_moe_text": f"30B-A3B, 235B-A22B, [with images]({IMAGES})",
    "qwen3_moe": "30B-A3B, 235B-A22B",
    "gemma3_text": f"with and without [images]({IMAGES}); EmbeddingGemma is [an encoder]({ENCODES})",
    "gemma4_text": f"E2B, E4B, 12B, 26B-A4B, 31B; [with images]({IMAGES}), [its embeddings of each layer]({GEMMA_4})",
    "gpt_oss": "20b, 120b, with experts in MXFP4 or bfloat16",
    "granite": "3.1, 3.2, 3.3 too",
    "granitemoehybrid": f"most layers of the h- models are Mamba-2, [their states]({STATES})",
    "glm4": "GLM-Z1 too",
    "glm4_moe": "GLM-4.5-Air too, without its draft head",
    "deepseek_v3": f"V3.1, Moonlight and GigaChat 3 too, [latents]({LATENTS}) and no draft head",
    "deepseek_v2": f"V2-Lite, V2.5, Coder-V2: [latents]({LATENTS})", "kimi_k2": f"K2; the text model of K2.5: [latents]({LATENTS})",
    "glm4_moe_lite": f"[latents]({LATENTS}), no draft head", "youtu": f"[latents]({LATENTS})",
    "mistral4": f"[with images]({IMAGES}), [latents]({LATENTS})", "minicpm3": f"[latents]({LATENTS})",
    "bailing_moe_v2": "Ling-mini, Ling-flash and Ring; GLM-4.5's arithmetic by other names",
    "cohere2_moe": "North-Mini-Code; shared experts are refused",
    "ernie4_5": "dense", "ernie4_5_moe": "21B-A3B, 300B-A47B; without the draft head",
    "laguna": "XS.2, S and M.1", "muse_glimmer_text": "images are refused",
    "minicpm": "without the sparse attention of 4.1; MiniCPM5 is a Llama", "olmo": "OLMo 1 and 1.7",
    "hunyuan_v1_dense": "Hunyuan-MT and Hy-MT too",
    "gpt2": "DistilGPT-2 too",
    "cohere": "Command R and R+, Aya",
    "phimoe": f"[its rotary factor in a GGUF file]({GGUF})",
    "cohere2": "Command R7B, Command A",
    "qwen3_5_text": f"[with images]({IMAGES}), [its states]({STATES})",
    "qwen3_5_moe_text": f"[with images]({IMAGES}), [its states]({STATES})",
    "qwen3_next": f"[its states]({STATES})",
    "lfm2": f"350M, 700M, 1.2B, 2.6B and dense LFM2.5; LFM2-VL [with images]({IMAGES}), [its states]({STATES})",
    "lfm2_moe": f"8B-A1B, 24B-A2B, LFM2.5 with experts, [its states]({STATES})",
    "nemotron_h": f"Nemotron Nano v2, 3 Nano and 3 Super, [its states]({STATES})",
    "nanochat": "in transformers' format",
    "bert": f"MiniLM, bge, e5, arctic-embed: [an encoder]({ENCODES})", "roberta": f"XLM-R too: bge-m3, multilingual-e5: [encoders]({ENCODES})",
    "mpnet": f"all-mpnet-base-v2: [an encoder]({ENCODES})", "modernbert": f"[an encoder]({ENCODES})",
    "nomic_bert": f"nomic-embed-text v1, v1.5: [an encoder]({ENCODES})", "gte": f"from 2024 on: [an encoder]({ENCODES})",
    "nomic_bert_moe": f"nomic-embed-text-v2-moe, whose config says `nomic_bert`; its files lack a bias: [an encoder]({ENCODES})"}
# model_types of the models that appeared from 2024 to 2026 and are run today, as far as we know them
RECENT = """afmoe axk1 axk2 bailing_hybrid bailing_moe_v2 bitnet cohere cohere2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots3_note
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text gemma4_unified glm4 glm4_moe glm4_moe_lite
    glm5_next glm_moe_dsa gpt_oss granite granitemoe granitemoehybrid hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 idefics3 kimi_k2 kimi_k25 kimi_linear laguna
    lfm2 lfm2_moe lfm2_vl llama llama4 longcat_flash mimo_v2_flash minicpm minicpm3 minimax_m2 minimax_m3 ministral3 mistral mistral3 mistral4
    mistral_large4 mixtral muse_glimmer nemotron_h olmo olmo2 olmo3 olmoe phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe
    qwen3_next qwen3_vl qwen3_vl_moe qwen4_exp sarvam_mla sarvam_moe seed_oss smollm3 smolvlm starcoder2 step3p7 youtu""".split()
FORMULAS = {"nomic_bert_moe": "its formulas", "bailing_moe_v2": "GLM-4.5", "kimi_k2": "DeepSeek-V3", "minicpm": "Granite 3"}   # families that transformers lacks are compared with these
LIKE_OTHERS = {"xlm-roberta": ("bert",), "granitemoehybrid": ("granite", "granitemoe")}     # such models without Mamba layers have these files
CHECKPOINTS = (
    f"| nanochat, generations 1 to {len(GENERATIONS)} ([layouts](checkpoints.md#checkpoints-of-nanochat)) | a checkpoint | upstream's answers, 5; "
    "a second implementation, 1 | | |\n"
    f"| nanoGPT, build-nanogpt ([their vocabulary]({VOCABULARIES})) | a checkpoint | its formula | | |\n")


def groups() -> list[list[str]]:
    """The model_types of each row. A family without a title belongs to the row before it."""
    found: list[list[str]] = []
    for name, family in FAMILIES.items():
        if family.title:
            found.append([])
        found[-1].append(name)
    return found


def architectures(names: list[str]) -> list[str]:
    """The architectures of these families' GGUF files, also of files that another family's row tells apart."""
    found = [architecture for name in names for architecture in LIKE_OTHERS.get(name, ())]
    found += [architecture for architecture, name in GGUF_FAMILIES.items()
              if {name, *FAMILIES[name].gguf.variants.values()} & {*names}]
    return found


def seeing() -> tuple[Counter, Counter]:
    """How many tiny models that see have a model_type; how many of these llama.cpp's converter makes files of."""
    return (Counter([*MODEL_TYPES.values(), *KINDS, *SHAPES]),
            Counter(MODEL_TYPES.get(kind, kind) for kind in CONVERTED_SEEING))


def image_types(names: list[str]) -> list[str]:
    """The model_types of models with images whose text models these are."""
    return [kind for kind, text in VISION.items() if text in names]


def compared(names: list[str], seen: Counter, called: str, **tables) -> str:
    """For each table: its name, and how many of its tiny models have one of these model_types. Then how many see, of which `seen` has the numbers."""
    kinds = MODELS | ENCODERS
    counts = {what: sum(kinds[model][0] in names for model in models) for what, models in tables.items()}
    if "converter" in counts:
        counts["converter"] += sum(kind in names for kind in OTHER_NAMES.values())
    counts[called] = sum(seen[kind] for kind in image_types(names))
    return "; ".join(f"{what}, {count}" for what, count in counts.items() if count)


def row(names: list[str]) -> str:
    """A row of the table."""
    def quoted(words):
        return ", ".join(f"`{word}`" for word in words)
    seen, converted = seeing()
    notes = [NOTES[name] for name in names if name in NOTES]
    formulas = FORMULAS.get(names[0], "")
    files = compared(names, converted, "converted images", transformers=[*GGUF_MODELS, *FILES], converter=CONVERTED)
    cells = (" ".join((FAMILIES[names[0]].title, *(f"({note})" for note in notes))),
             quoted((*names, *image_types(names))),
             compared(names, seen, "images", transformers=[*MODELS, *ENCODERS]) or formulas,
             quoted(architectures(names)),
             files if "transformers" in files else "; ".join(filter(None, (formulas, files))))
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|\n"


def count() -> int:
    """The families of the table, nanochat's and nanoGPT's checkpoints too."""
    return len(groups()) + CHECKPOINTS.count("\n")


def numbers() -> str:
    """What the tables say, in numbers."""
    rows = groups()
    seen, _ = seeing()
    served = {*FAMILIES, *VISION}
    refused = {name for refusal in ROWS for name in refusal.types.split()}
    unknown = [name for name in RECENT if name not in served | refused]
    others = f", and {', '.join(f'`{name}`' for name in unknown)} are still to come" if unknown else ""
    return (f"{count()} families are served: {sum(bool(architectures(names)) for names in rows)} of them from folders and GGUF files, the others from folders or checkpoints. "
            f"Models of {len(seen)} `model_type`s see images.\n"
            f"Of {len(RECENT)} `model_type`s from 2024 to 2026 that are run today {sum(name in served for name in RECENT)} are served, "
            f"{sum(name in refused for name in RECENT)} are [refused by name](#families-that-are-not-computed-yet){others}.")


def refused_row(refusal) -> str:
    types, files = (", ".join(f"`{name}`" for name in names.split()) for names in (refusal.types, refusal.files))
    return f"| {types} |{f' {files} ' if files else ' '}| {refusal.reason} |\n"


def page(text: str) -> str:
    """The text of docs/models/families.md with its tables made anew."""
    before, rest = text.split("## Families\n", 1)
    after, rest = rest.split(END, 1)[1].split("### Families that are not computed yet\n", 1)
    last = rest.split(REFUSED_END, 1)[1]
    families = HEADING.format(numbers=numbers()) + "".join(map(row, groups())) + CHECKPOINTS
    return before + families + END + after + REFUSED_HEADING + "".join(map(refused_row, ROWS)) + REFUSED_END + last


def readme(text: str) -> str:
    """The text of the README with the number of families in it."""
    return re.sub(r"\[all \d+ families\]", f"[all {count()} families]", text)


if __name__ == "__main__":
    for path, made in ((DOCS / "models" / "families.md", page), (DOCS.parent / "README.md", readme)):
        path.write_text(made(path.read_text(encoding="utf-8")), encoding="utf-8")
