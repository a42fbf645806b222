"""Models that are known and not computed yet: what this server lacks for them.

configs.py gives these reasons for folders, for GGUF files, and for both before they are downloaded."""

from __future__ import annotations

from typing import NamedTuple


class Refused(NamedTuple):
    reason: str      # begins after "this server cannot run NAME: ", ends before "not computed yet"
    types: str       # model_types of folders, those of text models beside images too
    files: str = ""  # architectures of GGUF files


ROWS = (
    Refused("beyond index_topk tokens its layers see only the keys that a sparse indexer chooses",
            "deepseek_v32 glm_moe_dsa axk2 mistral_large4 mistral_large4_text dots3_note dots3_note_text "
            "minimax_m3 minimax_m3_vl minimax_m3_vl_text", "deepseek32 glm-dsa dots3note minimax-m3"),
    Refused("its layers are joined by hyper-connections, several streams instead of one",
            "deepseek_v4 hy_v4 glm5_next glm5_next_text qwen4_exp qwen4_exp_text",
            "deepseek4 hy_v4 glm5-next qwen4exp"),
    Refused("most of its layers are Kimi Delta Attention (KDA), a linear attention whose channels decay "
            "apart", "kimi_linear kimi_k3", "kimi-linear kimi-k3"),
    Refused("some of its layers have a linear attention of their own kind", "bailing_hybrid", "bailingmoe3"),
    Refused("each of its layers has two attentions, experts on a path beside them, and experts that compute "
            "nothing", "longcat_flash"),
    Refused("it has AltUp, several streams of which a layer computes one, and Laurel, low-rank paths beside "
            "attention (Gemma 4 came after it)", "gemma3n gemma3n_text", "gemma3n"),
    Refused("its layers see only their own chunk of 8,192 tokens, and scale the input of experts, not their "
            "output", "llama4 llama4_text", "llama4"),
    Refused("each of its layers has Mamba-2 and attention side by side", "falcon_h1", "falcon-h1"),
    Refused("its ternary weights are multiplied with inputs that are rounded to 8 bits, and it has norms "
            "inside blocks", "bitnet", "bitnet bitnet-b1.58"),
    Refused("a gate multiplies what attention gives, and norms stand before and after each block", "afmoe",
            "afmoe"),
    Refused("it has EXAONE 4's attention and DeepSeek-V3's experts in one model", "exaone_moe", "exaone-moe"),
    Refused("it is a DeepSeek-V3 with one more norm, after the experts of a layer", "axk1"),
    Refused("it is a DeepSeek-V3 whose rotary scaling is deepseek_yarn", "sarvam_mla"),
    Refused("it is a Ling 2 that rotates whole heads, and centres the biases of its router", "sarvam_moe"),
    Refused("its layers have different numbers of key heads, and keys are wider than values",
            "mimo_v2 mimo_v2_flash", "mimo2"),
    Refused("its layers have different numbers of heads, each with a gate, and clamped feed-forward parts",
            "step3p5 step3p7", "step35"),
    Refused("it has MiniMax-M2's router with a shared expert and norms of single heads", "hy_v3", "hy_v3"))
REFUSED = {name: f"{row.reason}; that is not computed yet"
           for row in ROWS for name in f"{row.types} {row.files}".split()}
