"""Tiny random models that embed or rank texts, in the form of Qwen3-Embedding and Qwen3-Reranker, and what they must compute."""

import json

import numpy as np
import torch

from families import TINY, as_gguf
from tiny_gguf import small_gguf_metadata

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["y e", "ye s", "n o"]
END, YES, NO = 259, 257, 258        # the end token of a text, and the two answers of a reranker
QWEN = {**TINY, "head_dim": 16, "eos_token_id": 261, "bos_token_id": END}
MODULES = [{"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
           for index, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])]
POOLING = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")} | {"include_prompt": True}
PROMPTS = {"query": "Instruct: Find it\nQuery:", "document": ""}


def write_qwen_tokenizer(folder, ends=True):
    """Bytes, three merges and Qwen's special tokens; of an embedder it ends texts."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *("".join(merge.split()) for merge in MERGES)]
    made = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [tuple(merge.split()) for merge in MERGES]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    if ends:
        made.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=[("<|endoftext|>", END)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 131072, "tokenizer_class": "Qwen2Tokenizer"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n")
    return made


def make_qwen(kind="Qwen3Model", seed=0, scale=0.15, **changes):
    import transformers
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(**{**QWEN, **changes})
    model = getattr(transformers, kind)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):        # ones would hide faults
            parameter.data = torch.rand_like(parameter) + 0.5
        elif parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * scale
    return model


def write_json(folder, **files):
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def embedder_folder(folder, model=None, modules=MODULES, pooling=POOLING, prompts=PROMPTS, **files):
    """What sentence-transformers writes of Qwen3-Embedding: the model without a head, so its names lack `model.`."""
    model = model or make_qwen()
    model.save_pretrained(folder)
    write_qwen_tokenizer(folder)
    write_json(folder, **{"modules": modules, "1_Pooling__config": pooling,
                          "config_sentence_transformers": {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}} | files)
    return folder


def reranker_folder(folder, model=None):
    """Qwen3-Reranker: a chat model's folder that only its name tells apart."""
    folder = folder / "Tiny-Qwen3-Reranker"
    (model or make_qwen("Qwen3ForCausalLM", tie_word_embeddings=True)).save_pretrained(folder)
    write_qwen_tokenizer(folder, ends=False)
    return folder


def qwen_metadata(**changes):
    """The vocabulary above as GGUF metadata."""
    from tokenizers import pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *("".join(merge.split()) for merge in MERGES), *SPECIALS]
    return small_gguf_metadata("qwen2") | {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.token_type": [1] * 259 + [3] * 3,
        "tokenizer.ggml.eos_token_id": 261, "tokenizer.ggml.bos_token_id": 259, "tokenizer.ggml.add_bos_token": False} | changes


def gguf_of(path, model, quantized=False, classes=None, **changes):
    """A GGUF file of a model with a head; `classes`: the rows of a classifier that it has besides."""
    return as_gguf(path, model, quantized, qwen_metadata(**changes), {} if classes is None else {"cls.output.weight": classes})


@torch.no_grad()
def last_state(model, ids):
    """The last token's final hidden state, float64, by transformers."""
    return getattr(model, "model", model)(torch.tensor([ids])).last_hidden_state[0, -1].double().numpy()


def unit(vector):
    return vector / np.linalg.norm(vector)


INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@torch.no_grad()
def score(model, tokenizer, query, document, instruction=INSTRUCTION):
    """Qwen3-Reranker's, as its makers compute it: prefix, the pair and suffix are tokenized each by itself."""
    prefix = ('<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. '
              'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n')
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    pair = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    ids = [token for part in (prefix, pair, suffix) for token in tokenizer.encode(part).ids]
    logits = model(torch.tensor([ids])).logits[0, -1].double()
    return float(logits[YES] - logits[NO]), len(ids)
