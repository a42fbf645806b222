"""What the files of a model that embeds texts say about it: pooling, lengths, prompts, special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import MOST_OBJECT, parse_json, read_small
from chatlm.common.messages.requests import Embedder
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.model.head import ACTIVATIONS, Dense, Head
from chatlm.worker.weights.files.safetensors_file import read_safetensors_file
from chatlm.worker.weights.files.weight_files import weight_files
from chatlm.worker.weights.rules import MOST_CHANNELS, Rule, checked, read_json

if TYPE_CHECKING:
    from chatlm.common.messages.requests import TextSpec
    from chatlm.worker.model.blocks.model import Model


TWO_SIDED = "bert", "nomic-bert", "nomic-bert-moe", "modern-bert", "gemma-embedding"  # GGUF architectures
CLASSES = "cls.output.weight"  # a GGUF file's rows for yes and no, of a reranker
POOLING_TYPES = "none", "mean", "cls", "last", "rank"  # a GGUF file's pooling_type
MODES = {"cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean", "lasttoken": "last"}
CAUSAL = "mean", "last"  # the first token of a causal model has seen nothing else
SIMILARITIES = "cosine", "dot", "euclidean", "manhattan"
# family -> the fewest numbers that its makers let a vector be cut to
LEAST = {"qwen3": 32, "gemma3_text": 128, "nomic_bert": 64}
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
QWEN_PROMPTS = (("query", f"Instruct: {WEB_SEARCH}\nQuery:"), ("document", ""))
LONG_PROMPT = 2_000      # characters: it is read again for each text
PROMPTS = (  # of models whose files may not say them, by their names
    (r"(^|[-_/])e5[-_]", (("query", "query: "), ("passage", "passage: "))),
    (r"nomic[-_]embed[-_]text", (("query", "search_query: "), ("document", "search_document: "))),
    (r"embedding[-_]?gemma", (
        ("query", "task: search result | query: "), ("document", "title: none | text: "))))


def usual_prompts(*names: str) -> tuple[tuple[str, str], ...]:
    return next((prompts for pattern, prompts in PROMPTS
                 if any(re.search(pattern, name, re.IGNORECASE) for name in names)), ())


def pooling_of_gguf(path: Path, own: str, metadata: Mapping) -> str:
    """A GGUF file's pooling: none, mean, last or rank; of a model whose tokens see the whole text, also cls.
    ConfigError for one that such a model cannot have.

    `own` is the architecture and a dot. Without the key, llama.cpp's default is none: a chat model."""
    architecture = own[:-1]
    sees_both_sides = architecture in TWO_SIDED
    causal = f"{own}attention.causal"
    says_both_sides = metadata.get(causal) is False
    if causal in metadata and says_both_sides != sees_both_sides:
        computed = "attention to both sides" if sees_both_sides else "causal attention"
        raise ConfigError(f"{path}: {causal} is {json.dumps(not says_both_sides)}: such embeddings "
                          f"are not supported; this server computes {architecture} models with {computed}")
    number = metadata.get(f"{own}pooling_type", 0)
    is_known = type(number) is int and 0 <= number < len(POOLING_TYPES)
    pooling = POOLING_TYPES[number] if is_known else "unknown"
    allowed = ("none", "mean", "last", "rank")
    if sees_both_sides:
        allowed = ("mean", "cls", "last", "rank")
    if pooling not in allowed:
        *others, last = (f"{POOLING_TYPES.index(name)} ({name})" for name in allowed)
        raise ConfigError(f"{path}: {own}pooling_type is {shown(number)} ({pooling}); in a {architecture} "
                          f"model it must be {', '.join(others)} or {last}")
    return pooling


def gguf_embedder(path: Path, metadata: Mapping, text: TextSpec, family: str,
                  model: Model) -> Embedder | None:
    """How a GGUF file's model embeds texts; None if it chats or ranks.

    Older files of Qwen3-Embedding do not say add_eos_token, but the token that is pooled must be the end
    token."""
    pooling = pooling_of_gguf(path, f"{metadata['general.architecture']}.", metadata)
    if model.of_texts:
        begins, between, ends = frame_of(path, pipeline_of(path, text))
        if not (begins or ends):  # of a vocabulary whose makers have no frame, as Gemma's
            begins = as_frame(text.bos_token, text.add_bos)
            ends = as_frame(text.eos_token, metadata.get("tokenizer.ggml.add_eos_token", True))
        return Embedder(pooling, 1 if pooling == "rank" else model.width, model.max_positions,
                        LEAST.get(family, 0), begins, ends, between,
                        usual_prompts(str(metadata.get("general.name")), path.name))
    if pooling not in CAUSAL:
        return None
    end = text.eos_token
    adds = metadata.get("tokenizer.ggml.add_eos_token", pooling == "last")
    tokens = metadata["tokenizer.ggml.tokens"]
    if family == "qwen3" and "<|endoftext|>" in tokens:  # whichever token its answers would end with
        end = tokens.index("<|endoftext|>")
    is_qwens = re.search("qwen3.?embedding", f"{metadata.get('general.name')} {path.name}".lower())
    return Embedder(pooling, model.width, model.max_positions, LEAST.get(family, 0),
                    begins=as_frame(text.bos_token, text.add_bos), ends=as_frame(end, adds),
                    prompts=QWEN_PROMPTS if is_qwens else ())


def as_frame(token: int | None, is_added: bool) -> tuple[int, ...]:
    """The special tokens on one side of a text: this one, if the vocabulary has it and it is added."""
    return (token,) if token is not None and is_added else ()


class Modules(NamedTuple):
    """What the modules of a sentence-transformers folder make of a model's hidden states."""

    pooling: str = "mean"
    pools_prompt: bool = True
    dense: tuple[Dense, ...] = ()
    normalized: bool = False


def folder_modules(folder: Path, model: Model) -> Modules:
    """What a folder's modules.json lists. ConfigError for a module or a pooling that this server does not
    have."""
    path = folder / "modules.json"
    modules = Modules()
    for index, module in enumerate(modules_of(path) if path.exists() else []):
        kind = str(module.get("type")).rpartition(".")[2]
        place = module.get("path", "")
        if not isinstance(place, str) or not re.fullmatch(r"[\w-][\w .-]*|", place, re.ASCII):
            raise ConfigError(f"{path}: [{index}].path is {shown(place)}; it must be the name of a folder "
                              "there")
        config = folder / place / "config.json"
        if kind == "Pooling":
            modules = modules._replace(pooling=folder_pooling(config, model.of_texts),
                                       pools_prompt=pools_prompts(config))
        elif kind == "Dense" and not modules.normalized:
            width = modules.dense[-1].weight.shape[0] if modules.dense else model.width
            modules = modules._replace(dense=(*modules.dense, folder_dense(folder / place, width)))
        elif kind == "Normalize":
            modules = modules._replace(normalized=True)
        elif kind != "Transformer" or place:
            where = f" in {place}" if kind == "Transformer" else ""
            raise ConfigError(f"{path}: [{index}].type is {shown(module.get('type'))}{where}; this server "
                              "has Transformer, at the top of the folder, Pooling, Dense and, last, "
                              "Normalize")
    return modules


def folder_embedder(folder: Path, pipeline, family: str, model: Model,
                    names: Seq[str] = ()) -> tuple[Embedder, Head]:
    """How the model of a sentence-transformers folder embeds texts, and its Dense modules.

    Without a modules.json it takes the mean. `pipeline` is the folder's tokenizer in the library
    `tokenizers`, `names` are what the model is called."""
    modules = folder_modules(folder, model)
    begins, between, ends = frame_of(folder, pipeline)
    path = folder / "config_sentence_transformers.json"
    more = read_json(path, needed=False)
    prompts = prompts_of(path, more.get("prompts") or dict(usual_prompts(*names)))
    default = checked(path, "default_prompt_name", more.get("default_prompt_name"),
                      Rule(str, choices=tuple(prompts) or ("null",), optional=True))
    similarity = checked(path, "similarity_fn_name", more.get("similarity_fn_name") or SIMILARITIES[0],
                         Rule(str, choices=SIMILARITIES))
    head = Head(modules.dense)
    size = head.size or model.width
    least = fewest_numbers(folder, family, size)
    cut = checked(path, "truncate_dim", more.get("truncate_dim"), Rule(int, 1, size, optional=True)) or 0
    if cut:
        least = min(least or cut, cut)
    longest = longest_of(folder, model.max_positions)
    embedder = Embedder(modules.pooling, size, longest, least, begins, ends, between, tuple(prompts.items()),
                        default or "", similarity, dimensions=cut, pools_prompt=modules.pools_prompt)
    return embedder, head


def fewest_numbers(folder: Path, family: str, size: int) -> int:
    """The fewest numbers to which a vector of this size may be cut; 0: it may not."""
    path = folder / "config.json"
    cuts = read_json(path).get("matryoshka_dimensions")
    if cuts is None:
        return LEAST.get(family, 0)
    return min(checked(path, "matryoshka_dimensions", cuts, Rule(int, 1, size, many=True)), default=0)


def folder_dense(folder: Path, width: int) -> Dense:
    """A Dense module: its activation of weight x + bias."""
    path = folder / "config.json"
    config = read_json(path)
    size = checked(path, "in_features", config.get("in_features"), Rule(int, width, width))
    out = checked(path, "out_features", config.get("out_features"), Rule(int, 1, MOST_CHANNELS))
    for key in ("module_input_name", "module_output_name"):
        usual = "sentence_embedding"
        checked(path, key, config.get(key) or usual, Rule(str, choices=(usual,)))
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    checked(path, "activation_function", name.lower(), Rule(str, choices=tuple(ACTIVATIONS)))
    state: dict[str, Any] = {}
    for file in weight_files(folder):
        state |= read_safetensors_file(file)
    wanted = {"linear.weight": (out, size)} | ({"linear.bias": (out,)} if config.get("bias", True) else {})
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != wanted:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
        raise ConfigError(f"{folder} has the tensors {found}; it must have "
                          f"{', '.join(f'{name} {shape}' for name, shape in wanted.items())}")
    weight, *bias = (floats(state[name]) for name in wanted)
    return Dense(weight, *bias, activation=name.lower())


def modules_of(path: Path) -> list[dict]:
    modules = parse_json(path, read_small(path, MOST_OBJECT))
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConfigError(f"{path} holds {shown(modules)}; it must hold a list of objects")
    return modules


def folder_pooling(path: Path, of_texts: bool = False) -> str:
    """How a Pooling module combines the hidden states of a text's tokens: mean or last; where a token sees
    the whole text, also cls."""
    config = read_json(path)
    modes = config.get("pooling_mode")
    if not modes and not isinstance(modes, list):  # as older files have it
        flags = {key.removeprefix("pooling_mode_"): value for key, value in config.items()
                 if key.startswith("pooling_mode_")}
        modes = [mode for mode, is_used in flags.items() if is_used]
    elif not isinstance(modes, list):
        modes = [modes]
    stated = modes[0] if len(modes) == 1 else modes
    pooling = MODES.get(str(stated)) if len(modes) == 1 else None
    if pooling is None or pooling == "cls" and not of_texts:
        allowed = "causal attention it must be mean"
        if of_texts:
            allowed = "attention to both sides it must be mean, cls"
        raise ConfigError(f"{path}: pooling_mode is {shown(stated)}; of a model with {allowed} or lasttoken")
    return pooling


def pools_prompts(path: Path) -> bool:
    """Does a Pooling module count the tokens of a prompt? The model reads them in either case."""
    pools = checked(path, "include_prompt", read_json(path).get("include_prompt"), Rule(bool, optional=True))
    return pools is not False


def prompts_of(path: Path, prompts: Any) -> dict[str, str]:
    if not isinstance(prompts, dict):
        raise ConfigError(f"{path}: prompts is {shown(prompts)}; it must be an object")
    rule = Rule(str)
    for name, prompt in prompts.items():
        checked(path, f"prompts.{name}", prompt, rule)
        if len(prompt) + len(name) > LONG_PROMPT:
            raise ConfigError(f"{path}: prompts.{name[:50]} has {len(prompt):,} characters; {LONG_PROMPT:,} "
                              "are the most allowed, its name included")
    return prompts


def longest_of(folder: Path, positions: int) -> int:
    """The most tokens that a text may have, special ones included: the lowest limit that the files state."""
    path = folder / "sentence_bert_config.json"
    other = folder / "tokenizer_config.json"
    config = read_json(path, needed=False)
    if config.get("do_lower_case"):
        raise ConfigError(f"{path}: do_lower_case is true; this server does not change the letters of texts")
    said = [checked(path, "max_seq_length", config.get("max_seq_length"), Rule(int, 2, optional=True)),
            checked(other, "model_max_length", read_json(other, needed=False).get("model_max_length"),
                    Rule(float, 2, optional=True))]  # a float where it stands for no limit
    return int(min(positions, *filter(None, said), positions))


def pipeline_of(path: Path, text: TextSpec) -> Any:
    """The tokenizer of the library `tokenizers`. ConfigError if it is broken."""
    try:
        return getattr(open_tokenizer(text), "pipeline")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def frame_of(folder: Path, pipeline) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer of the library `tokenizers` puts before a text, between the texts
    of a pair, and after either. ConfigError if it changes a text in any other way."""
    def inside(whole: list[int], part: list[int], first: int) -> int:
        """The position of `part` in `whole`, searched from `first` on."""
        found = next((at for at in range(first, len(whole) - len(part) + 1)
                      if whole[at:at + len(part)] == part), None)
        if found is None or not part:
            raise ConfigError(f"{folder / 'tokenizer.json'}: its post_processor changes the tokens of a "
                              "text; it must only put others around them")
        return found

    a, b = (pipeline.encode(text, add_special_tokens=False).ids for text in "ab")
    one = pipeline.encode("a").ids
    pair = pipeline.encode("a", "b").ids
    at = inside(one, a, 0)
    first = inside(pair, a, 0)
    second = inside(pair, b, first + len(a))
    begins = one[:at]
    ends = one[at + len(a):]
    return tuple(begins), tuple(pair[first + len(a):second]), tuple(ends)
