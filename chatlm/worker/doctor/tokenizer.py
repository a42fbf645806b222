"""Checks of a tokenizer: its tables, texts there and back, and published ones that it should equal."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError, shown
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import HuggingFaceTokenizer, open_tokenizer
from chatlm.worker.doctor.findings import Findings, error, examples, note, quoted, warning
from chatlm.worker.doctor.fingerprints import fingerprint, likeness
from chatlm.worker.doctor.hard_texts import HARD_TEXTS
from chatlm.worker.weights.formats.gguf.texts import Texts
from chatlm.worker.weights.text.control_tokens import LIKE_A_NAME
from chatlm.worker.weights.text.folder_tokenizers import MAKERS
from chatlm.worker.weights.text.pipelines import NORMAL, USER_DEFINED
from chatlm.worker.weights.text.splits import NANOCHAT_SPLITS, PRE_TOKENIZERS

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.doctor.examined_model import ExaminedModel

WRONG_SPLITS = ("the pre-tokenizer, which cuts text into words (tokenizer.ggml.pre of a GGUF file), may be "
                "another one's: convert the model again, with a newer converter")


def quoted_texts(texts: Seq[str]) -> str:
    return examples([*map(quoted, texts)])


def check_kind(examined: ExaminedModel) -> Findings:
    """Say which tokenizer the model has."""
    yield note(f"the tokenizer is {kind_of(examined)}, {examined.tokenizer.vocab_size:,} tokens",
               file_of(examined))


def kind_of(examined: ExaminedModel) -> str:
    """The kind of a tokenizer in words."""
    if examined.text.kind == "nanochat":
        return "tiktoken's byte-level BPE"
    if examined.text.kind == "characters":
        return "a token for each character"
    model = examined.pipeline["model"]
    pre = examined.metadata.get("tokenizer.ggml.pre")
    words = f" with words cut as by {shown(pre)}" if pre in PRE_TOKENIZERS else ""
    match model.get("type"):
        case "BPE" if getattr(examined.tokenizer, "byte_level", False):
            return f"byte-level BPE{words}"
        case "BPE":
            return "sentencepiece's BPE"
        case "Unigram":
            return "sentencepiece's unigram"
        case kind:
            return str(kind)


def file_of(examined: ExaminedModel) -> str:
    """The file, or the key of a file, that says what the tokenizer is."""
    if examined.kind == "gguf":
        return f"tokenizer.ggml.model {shown(examined.metadata.get('tokenizer.ggml.model'))}"
    if examined.text.kind == "nanochat":
        return "tokenizer.pkl"
    names = ("tokenizer.json", *MAKERS)
    return next((name for name in names if (examined.path / name).exists()), examined.path.name)


# Tables


def check_vocabulary(examined: ExaminedModel) -> Findings:
    """Ids: unique, without holes, within the embedding; no token that hides another."""
    where = "tokenizer.ggml.tokens" if examined.kind == "gguf" else "tokenizer.json"
    tokens = examined.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        counts = Counter(list(tokens) if isinstance(tokens, Texts) else tokens)
        if twice := [token for token, count in counts.items() if count > 1 and token]:
            yield warning(f"{len(twice):,} tokens are there more than once: {quoted_texts(twice)}", where,
                          "only the last of each is ever encoded")
    vocab = examined.vocab
    added = examined.pipeline.get("added_tokens", [])
    by_id: dict[int, str] = {}
    for text, token in vocab.items():
        if by_id.setdefault(token, text) != text:
            yield error(f"the id {token:,} has two tokens, {quoted(by_id[token])} and {quoted(text)}", where)
            break
    for entry in added:
        other = str(by_id.get(entry["id"], entry["content"]))
        if other != entry["content"]:
            yield error(f"the added token {quoted(entry['content'])} has the id {entry['id']:,} of "
                        f"{quoted(other)}", where)
        if vocab.get(entry["content"], entry["id"]) != entry["id"]:
            yield error(f"the added token {quoted(entry['content'])} hides one of the vocabulary, whose id "
                        f"is {vocab[entry['content']]:,}", where)
    ids = {*by_id, *(entry["id"] for entry in added)}
    if ids and (holes := max(ids) + 1 - len(ids)):
        yield note(f"{holes:,} ids below {max(ids):,} have no token", where)
    rows = examined.model.architecture.vocab_size
    count = examined.tokenizer.vocab_size
    if rows > count + 8192:
        yield note(f"the model can draw {rows:,} tokens, of which the tokenizer knows {count:,}", where)


def check_added_tokens(examined: ExaminedModel) -> Findings:
    """Ordinary words that are tokens of their own are cut out of every text before it is read."""
    words = [entry["content"] for entry in examined.pipeline.get("added_tokens", [])
             if re.fullmatch(r"[^\W\d_]{2,}", re.sub("^[ \u2581\u0120]", "", entry["content"]))]
    if words:
        yield warning(f"ordinary words are added tokens: {quoted_texts(words)}", "added_tokens",
                      "each is cut out of the words that contain it; its type should be that of ordinary "
                      "tokens")


def check_ends(examined: ExaminedModel) -> Findings:
    """Check the tokens that begin a text and end an answer."""
    tokenizer = examined.tokenizer
    text = examined.text
    ends = sorted(tokenizer.stop_tokens)
    if not ends and text.kind != "characters" and not text.embedder:
        yield error("no token ends an answer, so answers end only where they are cut off",
                    key_of_eos(examined), "name the token with which the model ends its turn")
    yield from misnamed_tokens(examined)
    names = {token: tokenizer.show([token]) for token in ends}
    plain = [names[token] for token in ends if tokenizer.token_bytes(token) and token not in tokenizer.added]
    if named := [*filter(LIKE_A_NAME.fullmatch, plain)]:
        yield warning(f"the types of {quoted_texts(named)}, which end answers, are those of ordinary tokens",
                      key_of_eos(examined), "their type should be control (special)")
    if plain := [name for name in plain if name not in named]:
        yield error(f"answers end with ordinary text: {quoted_texts(plain)}", key_of_eos(examined),
                    "each answer would be cut where this text occurs; the id is probably another token's")
    if text.bos_token is not None and tokenizer.token_bytes(text.bos_token):
        yield warning(f"texts begin with the ordinary token {quoted(tokenizer.show([text.bos_token]))}",
                      "bos_token_id")
    for role in ("bos", "eos"):
        stated = examined.json("tokenizer_config.json").get(f"{role}_token")
        name = stated.get("content") if isinstance(stated, dict) else stated
        if isinstance(name, str) and name not in tokenizer.named_tokens and name not in examined.vocab:
            yield warning(f"{role}_token is {quoted(name)}, which is no token", "tokenizer_config.json",
                          "it has no effect here; it may be another model's")
    if text.add_bos and text.bos_token is None:
        yield warning("a first token is asked for (add_bos), but none is named", "bos_token_id")


def misnamed_tokens(examined: ExaminedModel) -> Findings:
    """Control tokens to which a GGUF file gives another type."""
    types = examined.metadata.get("tokenizer.ggml.token_type", ())
    names = [name for name, token in examined.tokenizer.specials.items()
             if examined.text.kind == "hf" and token < len(types) and types[token] in (NORMAL, USER_DEFINED)]
    if names:
        yield warning(f"the types of {quoted_texts(names)}, which mark turns, are those of ordinary tokens; "
                      "they count as control tokens here", "tokenizer.ggml.token_type",
                      "convert the model again: other programs may split them, and templates then write "
                      "something else")


def key_of_eos(examined: ExaminedModel) -> str:
    of_folder = "eos_token of tokenizer_config.json, or eos_token_id of generation_config.json"
    return {"gguf": "tokenizer.ggml.eos_token_id", "hf": of_folder, "litgpt": of_folder}.get(
        examined.kind, "tokenizer.pkl")


def check_pre_tokenizer(examined: ExaminedModel) -> Findings:
    """Check that the file says how text is cut into words, in a way that is known here."""
    if examined.text.kind == "nanochat" and json.loads(examined.text.payload)[0] not in NANOCHAT_SPLITS:
        yield note("text is cut into words by an expression that is not nanochat's own", "tokenizer.pkl")
    named = examined.metadata.get("tokenizer.ggml.pre")
    if examined.metadata.get("tokenizer.ggml.model") == "gpt2" and not named:
        yield warning("the file does not say how text is cut into words, so a guess is used that fits few "
                      "models", "tokenizer.ggml.pre", "convert the model again, with a newer converter")


MOST_DESCENTS = 0.25  # of the merges; with more, the order of the ids says nothing about theirs


def check_merges(examined: ExaminedModel) -> Findings:
    """Merges in the order of the tokens that they make, as training writes both, and none missing."""
    if examined.text.kind == "nanochat":
        yield from check_ranks(examined)
    model = examined.pipeline.get("model", {})
    where = "merges"
    if model.get("type") != "BPE":
        return
    vocab = model["vocab"]
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [vocab.get("".join(pair), 0) for pair in pairs]
    if again := [pair for pair, count in Counter(map(tuple, pairs)).items() if count > 1]:
        yield warning(f"{len(again):,} merges are there more than once: "
                      f"{quoted_texts([' '.join(pair) for pair in again])}", where)
    if not getattr(examined.tokenizer, "byte_level", False):  # sentencepiece's scores may be equal
        return
    falls = [place for place, (before, after) in enumerate(itertools.pairwise(made)) if after < before]
    if falls and len(falls) <= max(MOST_DESCENTS * len(made), 1):
        yield warning(f"{len(falls):,} of {len(made):,} merges are out of order, the first: "
                      f"{quoted(' '.join(pairs[falls[0]]))} before {quoted(' '.join(pairs[falls[0] + 1]))}",
                      where, "some words are cut otherwise than in training; convert the model again")


def check_ranks(examined: ExaminedModel) -> Findings:
    """Check ranks without merges: each token must consist of two that come before it."""
    _, ranks, _ = json.loads(examined.text.payload)
    orphans = [piece for piece, rank in ranks.items() if len(piece) > 1 and not any(
        max(ranks.get(piece[:cut], rank), ranks.get(piece[cut:], rank)) < rank
        for cut in range(1, len(piece)))]
    if orphans:
        texts = [piece.encode("latin-1").decode("utf-8", "replace") for piece in orphans]
        yield warning(f"{len(orphans):,} of {len(ranks):,} tokens are not made of two that come before them: "
                      f"{quoted_texts(texts)}", "tokenizer.pkl",
                      "some words are cut otherwise than in training; copy tokenizer.pkl again")


# Texts there and back


def check_round_trips(examined: ExaminedModel) -> Findings:
    """Each of HARD_TEXTS is encoded and decoded; what is lost, nobody can ask the model about."""
    tokenizer = examined.tokenizer
    lost = list[str]()
    if not covers_all(examined):
        yield note("the vocabulary does not have all characters, so texts are not compared")
        return
    for text in (*HARD_TEXTS, HALF):
        wanted = accepted_forms(examined, text.replace(HALF, "\ufffd"))
        try:
            found = tokenizer.decode(tokenizer.encode(text))
        except RequestError as reason:
            yield error(f"{quoted(text)} cannot be encoded: {reason}")
            return
        if found not in wanted:
            lost.append(text)
    if lost:
        first = tokenizer.decode(tokenizer.encode(lost[0]))
        yield error(f"{len(lost):,} of {len(HARD_TEXTS):,} texts are not the same after encoding and "
                    f"decoding; the first, {quoted(lost[0])}, becomes {quoted(first)}",
                    advice="the vocabulary lacks bytes, or the normalizer or decoder is another model's")


HALF = "\ud83d"  # of a surrogate pair, which JSON may hold: it is replaced, as invalid UTF-8 is


def covers_all(examined: ExaminedModel) -> bool:
    """Whether the tokenizer has a token for each byte, and keeps texts as they are."""
    if examined.text.kind != "hf":
        return examined.text.kind == "nanochat"
    model = examined.pipeline["model"]
    if model.get("type") != "BPE" or examined.text.embedder:
        return False
    tokenizer = examined.tokenizer
    return isinstance(tokenizer, HuggingFaceTokenizer) and (tokenizer.byte_level or bool(
        model.get("byte_fallback")))


def accepted_forms(examined: ExaminedModel, text: str) -> set[str]:
    """What may come back: normalizers of Unicode, and U+2581 for spaces, are common and intended."""
    state = json.dumps(examined.pipeline.get("normalizer"))
    forms = {text}
    for form in ("NFC", "NFKC", "NFD", "NFKD"):
        if f'"{form}"' in state or form == "NFKC" and "Precompiled" in state:
            forms.add(unicodedata.normalize(form, text))
    decoder = json.dumps(examined.pipeline.get("decoder"), ensure_ascii=False)
    if "\u2581" in decoder or "Metaspace" in state + json.dumps(examined.pipeline.get("pre_tokenizer")):
        forms |= {form.replace("\u2581", " ") for form in forms}
    return forms


SAMPLED = 30_000       # tokens
# shares of tokens that no text becomes: of Qwen 2 1.3 %, of other published ones less
FEW = 0.03
MANY = 0.2
LEAST = 8
ENOUGH = 4_000         # tokens: in a smaller vocabulary, shares say nothing of how it was trained


def check_reach(examined: ExaminedModel) -> Findings:
    """Does each token's own text become that token? A vocabulary trained with other words or merges has
    tokens that no text becomes. So have whole small ones, such as those made from ranks: there, only tokens
    that no merge makes prove something."""
    if examined.pipeline.get("model", {}).get("type") != "BPE":
        return
    tokenizer = merging(examined)
    tried = 0
    missed = list[str]()
    for token, text in sampled_texts(examined, tokenizer):
        tried += 1
        if tokenizer.encode(text) != [token]:
            missed.append(text)
    share = len(missed) / max(tried, 1)
    if share < FEW or len(missed) < LEAST:
        return
    proven = tried >= ENOUGH or share_unmade(examined, tokenizer) >= FEW
    severity = error if share > MANY else warning
    if not proven:
        severity = note
    yield severity(
        f"{len(missed):,} of {tried:,} tokens cannot come from any text: their own is cut otherwise, "
        f"as that of {quoted_texts(missed)}", "merges, pre-tokenizer",
        f"merges are missing or in a wrong order, or {WRONG_SPLITS}", share=round(share, 4))


def share_unmade(examined: ExaminedModel, tokenizer: Tokenizer) -> float:
    """The share of the sampled tokens that no merge makes."""
    merges = (merge.split(" ") if isinstance(merge, str) else merge
              for merge in examined.pipeline["model"].get("merges", ()))
    made = {"".join(merge) for merge in merges}
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    sampled = [tokenizer.name_of(token) for token, _ in sampled_texts(examined, tokenizer)]
    return sum(name not in made for name in sampled) / max(len(sampled), 1)


def merging(examined: ExaminedModel) -> Tokenizer:
    """The tokenizer, without the rule that a word of the vocabulary needs no merges: it would hide what is
    wrong with them."""
    if not examined.pipeline["model"].get("ignore_merges"):
        return examined.tokenizer
    changed = examined.pipeline | {"model": examined.pipeline["model"] | {"ignore_merges": False}}
    return open_tokenizer(TextSpec("hf", json.dumps(changed, ensure_ascii=False).encode()))


def sampled_texts(examined: ExaminedModel, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Ordinary tokens and their texts, where these are whole characters that begin a text as they are."""
    spaced = any(tokenizer.token_bytes(token).startswith(b" ") for token in tokenizer.encode("a")[:1])
    tokens = range(tokenizer.vocab_size)
    names = added_texts(tokenizer)
    for token in tokens[::max(len(tokens) // SAMPLED, 1)]:
        if token in tokenizer.added or token in tokenizer.special_names:
            continue
        try:
            text = tokenizer.token_bytes(token).decode()
        except UnicodeDecodeError:
            continue
        if spaced:  # such a pipeline puts a space before the text
            if not text.startswith(" ") or not text.strip():
                continue
            text = text[1:]
        if len(text) > 1 and not LIKE_A_NAME.fullmatch(text) and unicodedata.is_normalized(
                "NFC", text) and not any(name in text for name in names):
            yield token, text


def added_texts(tokenizer: Tokenizer) -> Seq[str]:
    return [text.decode() for text in tokenizer.added.values()]


def check_likeness(examined: ExaminedModel) -> Findings:
    """Check that it encodes as the published tokenizer that it is like."""
    tokenizer = examined.tokenizer
    names = added_texts(tokenizer)
    byte_level = getattr(tokenizer, "byte_level", True)

    def skipped(text: str) -> bool:
        """Whether a text has added tokens, or a space at its beginning, about which converters of
        sentencepiece differ."""
        return any(name in text for name in names) or not byte_level and text[0] in " \u2581"

    found = likeness(fingerprint(tokenizer.encode), skipped)
    if found is None:
        return
    if not found.different:
        yield note(f"encodes like the tokenizer of {found.name}")
        return
    yield warning(f"it looks like the tokenizer of {found.name}, but {len(found.different):,} of "
                  f"{found.compared:,} texts are encoded otherwise, the first: {quoted(found.different[0])}",
                  advice=WRONG_SPLITS, like=found.name, texts=[*found.different])
