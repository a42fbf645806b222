"""Qwen3-Reranker: a causal model that answers yes or no, whether a document is right for a query.

Its score is the logit of "yes" minus that of "no" after a prompt with both. So a pair of texts needs only its
last hidden state and one row in place of the head (https://arxiv.org/abs/2506.05176)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.common.log import log
from chatlm.common.messages.requests import Embedder
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.purposes.classifiers import CANNOT, CLASSIFIERS, SCORE, architectures_of
from chatlm.worker.weights.purposes.embedders import CLASSES, WEB_SEARCH, pooling_of_gguf

if TYPE_CHECKING:
    from chatlm.common.messages.requests import TextSpec
    from chatlm.worker.model.blocks.model import Model


NAMED = re.compile("qwen3.{0,20}rerank", re.IGNORECASE)  # the files of the original say it in no other way
PROMPT = (
    '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the '
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    f'<Instruct>: {WEB_SEARCH}\n<Query>: {{query}}\n<Document>: {{document}}<|im_end|>\n'
    '<|im_start|>assistant\n<think>\n\n</think>\n\n')
TEMPLATE = re.compile(r"[^{}]*\{query\}[^{}]*\{document\}[^{}]*")
REWARDS = re.compile("reward", re.IGNORECASE)


def score_of(folder: Path, config: Mapping, family: str, names: Seq[str], score: Any, has_head: bool) -> Any:
    """A folder's tensor SCORE, `score`, if that is what the model ranks by; None of a model that chats.
    ConfigError of any other.

    `has_head`: there is a matrix that makes tokens."""
    architectures = architectures_of(config)
    classifies = any(map(CLASSIFIERS.search, architectures))
    if not classifies and (has_head or architectures):
        log.warning("%s: %s is not used: the model writes texts", folder, SCORE)
        return None
    if not FAMILIES[family].has_rerankers:
        raise ConfigError(f"{folder} has {SCORE}, but no matrix that makes tokens; {CANNOT}")
    if any(map(REWARDS.search, names)) and not any(map(NAMED.search, names)):
        raise ConfigError(f"{folder} is named as a reward model; {CANNOT}")
    return score


def of_folder(folder: Path, config: Mapping, names: Seq[str], model: Model, text: TextSpec,
              state: Mapping[str, Any], score: Any) -> tuple[TextSpec, numpy.ndarray | None]:
    """The text of a folder's reranker, and the row (C,) that makes a score of a hidden state; the text and
    None of another model of a family that has rerankers. `score`: its tensor SCORE, if it has one.
    ConfigError if it ranks in another way."""
    stated = score is not None or config.get("classifier_from_token")
    if not (stated or any(map(NAMED.search, names))):
        return text, None
    path = folder / "config.json"
    if score is None:
        ranking = yes_less_no(path, config, model, text, state)
    elif score.shape == (1, model.width):
        ranking = floats(score)[0].astype(numpy.float64)
    else:
        raise ConfigError(f"{folder}: {SCORE} is {tuple(score.shape)}; of a reranker it must be "
                          f"{(1, model.width)}")
    return as_reranker(path, text, model, PROMPT), ranking


def yes_less_no(path: Path, config: Mapping, model: Model, text: TextSpec,
                state: Mapping[str, Any]) -> numpy.ndarray:
    """The row of the head for "yes" less that for "no", float64 (C,), by the config's own words for them."""
    words = config.get("classifier_from_token") or ["no", "yes"]
    if not (isinstance(words, list) and len(words) == 2 and all(isinstance(word, str) for word in words)):
        raise ConfigError(f"{path}: classifier_from_token is {shown(words)}; it must be a list of two "
                          "tokens, the second for relevant documents")
    head = state["model.embed_tokens.weight" if model.tied else "lm_head.weight"]
    no, yes = (floats(head[token:token + 1])[0] for token in ids_of(path, text, words))
    return yes.astype(numpy.float64) - no


def of_gguf(path: Path, metadata: Mapping, family: str, model: Model, text: TextSpec,
            stored: Mapping[str, Any], classes: Any) -> tuple[TextSpec, numpy.ndarray | None]:
    """Like `of_folder`, of a GGUF file. `classes`: its tensor CLASSES. Older files of rerankers look like
    those of a chat model."""
    own = f"{metadata['general.architecture']}."
    pooling = pooling_of_gguf(path, own, metadata)
    is_named = NAMED.search(f"{metadata.get('general.name')} {path.name}")
    if pooling != "rank" and not (pooling == "none" and is_named and FAMILIES[family].has_rerankers):
        if classes is not None and model.tied:
            raise ConfigError(f"{path} has {CLASSES}, but no output.weight and not the {own}pooling_type 4 "
                              f"(rank); {CANNOT}")
        return text, None
    if not FAMILIES[family].has_rerankers:
        able = ", ".join(name for name, row in FAMILIES.items() if row.has_rerankers)
        raise ConfigError(f"{path}: {own}pooling_type is 4 (rank); of causal models this server ranks with "
                          f"{able} alone")
    if classes is None:
        head = stored["token_embd.weight" if model.tied else "output.weight"]
        rows = ids_of(path, text, ["yes", "no"])
    else:
        head = classes
        key = f"{own}classifier.output_labels"
        labels = metadata.get(key, ["yes", "no"])
        if sorted(map(str, labels)) != ["no", "yes"] or classes.shape.tolist() != [model.width, 2]:
            shape = tuple(reversed(classes.shape.tolist()))
            raise ConfigError(f"{path}: {CLASSES} is {shape} and {key} is {shown(labels)}; "
                              f"yes and no must have a row of {model.width:,} each")
        rows = [labels.index("yes"), labels.index("no")]
    yes, no = (floats(dequantize(head.tensor_type, numpy.asarray(head.data[row:row + 1]))).ravel()
               for row in rows)
    template = metadata.get("tokenizer.chat_template.rerank", PROMPT)
    return as_reranker(path, text, model, template), yes.astype(numpy.float64) - no


def ids_of(path: Path, text: TextSpec, words: Seq[str]) -> list[int]:
    """The token of each of these words. ConfigError if a word is not a single token."""
    tokenizer = open_tokenizer(text)
    ids = [tokenizer.encode(word, begins=False) for word in words]
    for word, tokens in zip(words, ids):
        if len(tokens) != 1:
            raise ConfigError(f"{path}: {shown(word)} is not one token of the vocabulary, so the model has "
                              "no score")
    return [token for [token] in ids]


def as_reranker(path: Path, text: TextSpec, model: Model, template: Any) -> TextSpec:
    """The text of a reranker: what the template has around the query and the document. ConfigError if it is
    no such template.

    Whatever precedes the last special token before the query is the same for all pairs."""
    if not isinstance(template, str) or not TEMPLATE.fullmatch(template):
        raise ConfigError(f"{path}: its chat template `rerank` is {shown(template)}; it must have {{query}} "
                          "and then {document}, once each, and no other braces")
    tokenizer = open_tokenizer(text)
    query = template.index("{query}")
    end = template.index("{document}") + len("{document}")
    start = max([0, *(special.end() for special in tokenizer.special_pattern.finditer(template, 0, query))])
    form = template[start:end].replace(WEB_SEARCH, "{instruction}")
    embedder = Embedder("rank", 1, model.max_positions, form=form,
                        begins=tuple(tokenizer.encode_with_specials(template[:start])),
                        ends=tuple(tokenizer.encode_with_specials(template[end:])),
                        instruction=WEB_SEARCH if "{instruction}" in form else "")
    return replace(text, chat_template=None, embedder=embedder)
