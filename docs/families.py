"""Makes the table of families in docs/models/families.md: the families from the program's rows, the comparisons from the tests' rows.

    python docs/families.py
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests" / "support")]

from chatlm.worker.weights.families import FAMILIES, GGUF_FAMILIES, VISION      # noqa: E402
from encoders import FILES, MODELS as ENCODERS       # noqa: E402  of the tests
from families import CONVERTED, GGUF_MODELS, MODELS        # noqa: E402
from generations import GENERATIONS        # noqa: E402

HEADING = """\
## Families

`.venv/bin/python docs/families.py` makes this table from the rows of the program and of the tests, and a test checks it. "transformers, 4" means that four tiny
random models give transformers' logits and tokens. "converter, 3" means that llama.cpp's converter made files of three models, which are the same models as their
folders. [What has been tested](#what-has-been-tested) says more.

| family | `model_type` of a folder | compared with | architecture of a GGUF file | compared with |
|---|---|---|---|---|
"""
END = "\nAny other family is an error"
# headings, of that page unless another is named
STATES, IMAGES, GEMMA_4 = "#models-whose-layers-keep-a-state", "#images", "#gemma-4"
LATENTS = "#latent-attention"
POSITIONS, VOCABULARIES, GGUF = "#positions-sizes-and-tokens", "#checkpoints-without-a-vocabulary", "#where-a-gguf-file-and-its-folder-differ"
ENCODES = "embedders.md#embedders-and-rerankers"
NOTES = {       # by model_type: what a reader wants to know beside the title
    "llama": f"3.1, 3.2, 3.3 too; SmolVLM and Idefics 3 [with images]({IMAGES}); LLaVA's text model",
    "mistral": "the text model of Small 3.1 and 3.2",
    "ministral3": f"the text model of `mistral3`, [up to 16,384 tokens]({POSITIONS})",
    "qwen2": "the text model of Qwen2-VL and Qwen2.5-VL",
    "qwen3": "the text model of Qwen3-VL",
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
    "mistral4": f"the text model of `mistral3`: [latents]({LATENTS})", "minicpm3": f"[latents]({LATENTS})",
    "bailing_moe_v2": "Ling-mini, Ling-flash and Ring; GLM-4.5's arithmetic by other names",
    "cohere2_moe": "North-Mini-Code; shared experts are refused",
    "ernie4_5": "dense", "ernie4_5_moe": "21B-A3B, 300B-A47B; without the draft head",
    "laguna": "XS.2, S and M.1", "muse_glimmer_text": "the text model of those with images",
    "minicpm": "without the sparse attention of 4.1; MiniCPM5 is a Llama", "olmo": "OLMo 1 and 1.7",
    "hunyuan_v1_dense": "Hunyuan-MT and Hy-MT too",
    "gpt2": "DistilGPT-2 too",
    "cohere": "Command R and R+, Aya",
    "phimoe": f"[its rotary factor in a GGUF file]({GGUF})",
    "cohere2": "Command R7B, Command A",
    "qwen3_5_text": f"the text model of those with images, [its states]({STATES})",
    "qwen3_5_moe_text": f"the text model of those with images, [its states]({STATES})",
    "qwen3_next": f"[its states]({STATES})",
    "lfm2": f"350M, 700M, 1.2B, 2.6B and dense LFM2.5; LFM2-VL [with images]({IMAGES}), [its states]({STATES})",
    "lfm2_moe": f"8B-A1B, 24B-A2B, LFM2.5 with experts, [its states]({STATES})",
    "nemotron_h": f"Nemotron Nano v2, 3 Nano and 3 Super, [its states]({STATES})",
    "nanochat": "in transformers' format",
    "bert": f"MiniLM, bge, e5, arctic-embed: [an encoder]({ENCODES})", "roberta": f"XLM-R too: bge-m3, multilingual-e5: [encoders]({ENCODES})",
    "mpnet": f"all-mpnet-base-v2: [an encoder]({ENCODES})", "modernbert": f"[an encoder]({ENCODES})",
    "nomic_bert": f"nomic-embed-text v1, v1.5: [an encoder]({ENCODES})", "gte": f"from 2024 on: [an encoder]({ENCODES})",
    "nomic_bert_moe": f"nomic-embed-text-v2-moe, whose config says `nomic_bert`; its files lack a bias: [an encoder]({ENCODES})"}
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


def compared(names: list[str], **tables) -> str:
    """For each table: its name, and how many of its tiny models have one of these model_types."""
    kinds = MODELS | ENCODERS
    counts = {what: sum(kinds[model][0] in names for model in models) for what, models in tables.items()}
    return "; ".join(f"{what}, {count}" for what, count in counts.items() if count)


def row(names: list[str]) -> str:
    """A row of the table."""
    def quoted(words):
        return ", ".join(f"`{word}`" for word in words)
    notes = [NOTES[name] for name in names if name in NOTES]
    cells = (" ".join((FAMILIES[names[0]].title, *(f"({note})" for note in notes))),
             quoted((*names, *(kind for kind, text in VISION.items() if text in names))),
             compared(names, transformers=[*MODELS, *ENCODERS]) or FORMULAS.get(names[0], ""),
             quoted(architectures(names)),
             compared(names, transformers=[*GGUF_MODELS, *FILES], converter=CONVERTED) or FORMULAS.get(names[0], ""))
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|\n"


def page(text: str) -> str:
    """The text of docs/models/families.md with its table made anew."""
    before, rest = text.split("## Families\n", 1)
    after = rest.split(END, 1)[1]
    return before + HEADING + "".join(map(row, groups())) + CHECKPOINTS + END + after


if __name__ == "__main__":
    path = DOCS / "models" / "families.md"
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
