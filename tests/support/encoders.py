"""Tiny random models that embed or rank whole texts, as their makers and llama.cpp write them, and what they must compute: transformers is the oracle."""

import base64
import json

import numpy as np
import torch

from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import AnswerParams, Embedding, Ended, Failed
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.build import build_engine
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.sequence import Assignment
from retrieval import write_json
from tiny_gguf import sentencepiece_metadata, small_gguf_metadata, write_gguf

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"), *"0123456789.,?!", "the", "cat", "dog", "##ing", "query", "passage"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"), *"abcdefghijklmnopqrstuvwxyz.,?!",
          "\u2581the", "\u2581cat", "\u2581dog", "ing"]
ROWS = 320      # of the table of embeddings: more than there are tokens
LOCAL, FULL = "sliding_attention", "full_attention"
SIZES = dict(vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
BERT, ROBERTA = dict(max_position_embeddings=512), dict(max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, layer_norm_eps=1e-5)
MODELS = {                  # name -> (model_type, what differs from SIZES)
    "bert": ("bert", BERT),
    "bert-tanh": ("bert", BERT | dict(hidden_act="gelu_new", num_attention_heads=2, num_hidden_layers=2)),
    "roberta": ("roberta", ROBERTA),
    "xlm-roberta": ("xlm-roberta", ROBERTA),
    "mpnet": ("mpnet", dict(max_position_embeddings=514, pad_token_id=1, layer_norm_eps=1e-5)),
    "modernbert": ("modernbert", dict(max_position_embeddings=512, num_hidden_layers=4, local_attention=24, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)),
    "nomic": ("nomic_bert", dict(max_position_embeddings=512)),
    "gte": ("gte", dict(max_position_embeddings=512)),
    "gemma": ("gemma3_text", dict(num_hidden_layers=4, num_key_value_heads=2, layer_types=[LOCAL, FULL, LOCAL, LOCAL], head_dim=32, query_pre_attn_scalar=32, sliding_window=24, max_position_embeddings=512,
                                  use_bidirectional_attention=True, rms_norm_eps=1e-6, pad_token_id=None, rope_parameters={
                                      "full_attention": dict(rope_type="default", rope_theta=1e6), "sliding_attention": dict(rope_type="default", rope_theta=1e4)})),
}
OF_PIECES = "roberta", "xlm-roberta"      # whose vocabularies are sentencepiece's
ARCHITECTURES = {"nomic": "nomic-bert", "modernbert": "modern-bert", "bert": "bert", "roberta": "bert", "xlm-roberta": "bert", "gemma": "gemma-embedding"}
FILES = "bert", "xlm-roberta", "nomic", "modernbert", "gemma"      # those that are written as GGUF files too
TEXTS = ["a", "the cats", "the cat, the dog and 12 mice?", "dogs " * 40, "query: " + "abc xyz. " * 30]


def randomized(model, seed=0):
    """Every norm and bias off its default: ones and zeros would hide faults."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3 if "embed" in name else 0.15)
            elif name.endswith("bias"):
                weight.normal_(0, 0.2)
            else:
                weight.mul_(0.5).add_(torch.randn_like(weight), alpha=0.2).add_(0.6)
    return model.eval()


def make_encoder(name, ranks=False, seed=0, **changes):
    import transformers
    kind, own = MODELS[name]
    labels = {"num_labels": 1} if ranks else {}
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **own, **labels, **changes})
    torch.manual_seed(seed)
    maker = transformers.AutoModelForSequenceClassification if ranks else transformers.AutoModel
    return randomized(maker.from_config(config, attn_implementation="eager"), seed)


def write_tokenizer(folder, name):
    """tokenizer.json with the family's kind of vocabulary, and special tokens around texts. -> the tokenizer"""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    if name in OF_PIECES:
        made = tokenizers.Tokenizer(models.Unigram([(piece, -float(i) / 8) for i, piece in enumerate(PIECES)], unk_id=3))
        mark = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark]), decoders.Metaspace()
        made.add_special_tokens(PIECES[:4])
        around, pair, ids = "<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)]
    else:
        specials = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"] if name == "mpnet" else SPECIALS     # it does not count padding in positions
        tokens = specials + WORDS
        made = tokenizers.Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer, made.decoder = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        made.add_special_tokens(specials)
        around, pair, ids = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [(token, specials.index(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single=around, pair=pair, special_tokens=ids)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    return made


def modules(*kinds):
    return [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(("Transformer", *kinds))]


def save_folder(folder, name, model, pooling="mean", dense=(), **files):
    """What sentence-transformers writes. dense: (out, in, activation, bias?) of each Dense module, with random weights. -> their weights"""
    from safetensors.torch import save_file
    model.save_pretrained(folder)
    write_tokenizer(folder, name)
    kinds = ("Pooling", *("Dense" for _ in dense), "Normalize")
    flag = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}[pooling]
    write_json(folder, **{"modules": modules(*kinds), "1_Pooling__config": {f"pooling_mode_{flag}": True, "word_embedding_dimension": 64}} | files)
    made = []
    for i, (out, size, activation, has_bias) in enumerate(dense, 2):
        weight, bias = torch.randn(out, size) / size**0.5, torch.randn(out) / 4
        (folder / f"{i}_Dense").mkdir()
        save_file({"linear.weight": weight} | ({"linear.bias": bias} if has_bias else {}), folder / f"{i}_Dense/model.safetensors")
        write_json(folder, **{f"{i}_Dense__config": {"in_features": size, "out_features": out, "bias": has_bias, "activation_function": f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"}})
        made.append((weight, bias if has_bias else torch.zeros(out), activation))
    return made


def vocabulary(name):
    """A family's vocabulary as llama.cpp's converter writes it."""
    if name in OF_PIECES:
        types = [3, 3, 3, 2] + [1] * (len(PIECES) - 4)
        return {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": PIECES, "tokenizer.ggml.scores": [-float(i) / 8 for i in range(len(PIECES))],
                "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 3,
                "tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.remove_extra_whitespaces": True, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    if name == "gemma":
        return sentencepiece_metadata() | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    if name == "modernbert":
        size = len(small_gguf_metadata("gpt-2")["tokenizer.ggml.tokens"])
        return small_gguf_metadata("modern-bert") | {"tokenizer.ggml.bos_token_id": size - 1, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    words = [token[2:] if token.startswith("##") else f"\u2581{token}" for token in WORDS]
    return {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": SPECIALS + words, "tokenizer.ggml.token_type": [3] * 5 + [1] * len(words), "tokenizer.ggml.cls_token_id": 2,
            "tokenizer.ggml.seperator_token_id": 3, "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.mask_token_id": 4, "tokenizer.ggml.padding_token_id": 0}


def filled(metadata, rows):
    """A vocabulary with as many tokens as the table has rows: llama.cpp takes no fewer, and its converter writes such tokens."""
    more = [f"[PAD{i}]" for i in range(len(metadata["tokenizer.ggml.tokens"]), rows)]
    fill = {"tokens": more, "token_type": [5] * len(more), "scores": [-1000.0] * len(more)}
    return metadata | {key: metadata[key] + values for name, values in fill.items() if (key := f"tokenizer.ggml.{name}") in metadata}


POOLING_TYPES = {"mean": 1, "cls": 2, "last": 3, "rank": 4}


def save_gguf(path, name, model, kind="F32", pooling="mean", dense=(), **changes):
    """What llama.cpp's converter writes of a model: its tensors as `kind`, vectors and tables of positions and types as F32."""
    import gguf
    config, arch, inner = model.config, ARCHITECTURES[name], getattr(model, model.base_model_prefix, model)
    table = gguf.get_tensor_name_map({name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    state = {key: tensor for key, tensor in inner.state_dict().items() if not key.startswith("pooler.") and not key.endswith("position_ids")}
    if name == "nomic":     # whose modules have other names than its files
        from safetensors.torch import load_file
        model.save_pretrained(path.parent / "named")
        state = load_file(path.parent / "named" / "model.safetensors")
    if name in OF_PIECES:
        key = "embeddings.position_embeddings.weight"
        state[key] = state[key][2:]
    tensors = {table.get_name(key, (".weight", ".bias")): tensor.numpy() for key, tensor in state.items()}
    if pooling == "rank":
        tensors |= {f"cls{ours}.{part}": model.state_dict()[f"classifier.{theirs}.{part}"].numpy() for ours, theirs in (("", "dense"), (".output", "out_proj")) for part in ("weight", "bias")}
    assert None not in tensors, [key for key in state if not table.get_name(key, (".weight", ".bias"))]
    stored = gguf.GGMLQuantizationType[kind]
    tensors = {key: (gguf.quantize(tensor, stored), stored) if tensor.ndim > 1 and "position" not in key and "types" not in key and kind != "F32" else tensor for key, tensor in tensors.items()}
    if name == "gemma":
        tensors = {key: tensor + 1 if key.endswith("norm.weight") else tensor for key, tensor in tensors.items()}
        own = {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": config.head_dim,
               "attention.value_length": config.head_dim, "attention.sliding_window": MODELS[name][1]["sliding_window"], "rope.freq_base": 1e6,
               "attention.sliding_window_pattern": [kind == LOCAL for kind in config.layer_types]}
        for i, (weight, *_) in enumerate(dense, 2):
            tensors[f"dense_{i}.weight"] = weight.numpy()
            own |= {f"dense_{i}_feat_in": weight.shape[1], f"dense_{i}_feat_out": weight.shape[0]}
    elif name == "modernbert":
        own = {"attention.layer_norm_epsilon": config.norm_eps, "attention.sliding_window": config.local_attention, "attention.sliding_window_pattern": 3, "rope.freq_base": 160_000.0,
               "rope.freq_base_swa": 10_000.0}
    else:
        own = {"attention.layer_norm_epsilon": float(config.layer_norm_eps)} | ({"rope.freq_base": 1000.0} if name == "nomic" else {})
    unused, types = 2 if name in OF_PIECES else 0, getattr(config, "type_vocab_size", 0)
    counted = {"tokenizer.ggml.token_type_count": types} if types else {}
    numbers = {f"{arch}.{key}": value for key, value in {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings - unused, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.causal": False, "pooling_type": POOLING_TYPES[pooling],
        **own, **changes}.items()}
    return write_gguf(path, tensors, numbers, filled(vocabulary(name), config.vocab_size) | counted | {"general.architecture": arch})


def engine_of(path, dtype="float32", **settings):
    settings = Settings(model=str(path), dtype=dtype, **settings)
    model, engine = build_engine(resolve_model(settings), settings, Device("cpu"))
    return model, engine


def framed(embedder, tokenizer, text, other=None):
    """The ids of a text, or of a pair, as the front makes them."""
    second = () if other is None else (*embedder.between, *tokenizer.encode(other))
    return (*embedder.begins, *tokenizer.encode(text), *second, *embedder.ends)


def vectors(engine, inputs, together=True, **params):
    """What the engine makes of token ids, float32 each: all at once, or one after another."""
    params = AnswerParams(**params)
    found, groups = {}, [list(enumerate(inputs))] if together else [[each] for each in enumerate(inputs)]
    for group in groups:
        for i, ids in group:
            engine.add(Assignment(str(i), tuple(ids), params, 0))
        while engine.busy or engine.events:
            for name, event in engine.step():
                assert not isinstance(event, Failed), event
                if isinstance(event, Embedding):
                    found[int(name)] = np.frombuffer(base64.b64decode(event.vector), "<f4")
                else:
                    assert isinstance(event, Ended) and event.reason == "stop"
            check_integrity(engine)
    return [found[i] for i in range(len(inputs))]


@torch.no_grad()
def expected(model, ids, pooling="mean", dense=()):
    """transformers' vector of a text."""
    states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    for weight, bias, activation in dense:
        pooled = getattr(torch.nn, activation)()(weight.double() @ pooled + bias.double())
    return (pooled / pooled.norm()).numpy()


@torch.no_grad()
def expected_score(model, encoding):
    """transformers' raw score of an encoded pair."""
    inputs = {"input_ids": torch.tensor([encoding.ids])}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
    return float(model(**inputs).logits[0, 0])


def cosine(one, other):
    one, other = (np.asarray(vector, np.float64) for vector in (one, other))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


