"""Tokens that a folder's other files name and its tokenizer.json lacks. They are added as transformers adds
them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatlm.common.errors import ConfigError, printable, shown
from chatlm.common.jsontext import whole_unicode
from chatlm.common.log import log
from chatlm.worker.weights.rules import read_json

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS = "additional_special_tokens", "extra_special_tokens"
DECODER = "added_tokens_decoder"
FLAGS = "single_word", "lstrip", "rstrip", "normalized", "special"  # as tokenizer.json has them
MOST_NAMED = 5


def tokenizer_options(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer_config.json, with what special_tokens_map.json names beside it.

    In older files, which have no `added_tokens_decoder`, special_tokens_map.json counts first, as in
    transformers."""
    options = read_json(folder / "tokenizer_config.json", needed=False)
    named = read_json(folder / "special_tokens_map.json", needed=False)
    for key in (*ROLES, *LISTS):
        if named.get(key) is not None and (DECODER not in options or options.get(key) is None):
            options[key] = named[key]
    return options


def with_named_tokens(folder: Path, payload: bytes, pipeline: Any, options: Mapping,
                      vocab_size: int) -> bytes:
    """A tokenizer.json with the tokens that `options` or added_tokens.json name. `pipeline` is its tokenizer
    in the library `tokenizers`.

    Tokens for which the model has no row are left out, and so are those whose ids the files state
    differently. ConfigError for an entry that is no token."""
    special = {token["content"]: token for token in special_tokens(folder, options)}
    table = Table(pipeline, vocab_size)
    for token_id, token in decoder_tokens(folder, options, special):
        table.put(token, token_id)
    for text, token in special.items():
        if text not in table.added:
            table.put(token)
    if table.other_ids:
        log.warning("%s: other files than tokenizer.json give these tokens other ids, which do not count: "
                    "%s%s", folder, ", ".join(map(shown, table.other_ids[:MOST_NAMED])),
                    " .." * (len(table.other_ids) > MOST_NAMED))
    if not table.changed:
        return payload
    content = json.loads(payload)
    content["added_tokens"] = sorted(table.added.values(), key=lambda token: token["id"])
    return json.dumps(content, ensure_ascii=False).encode()


class Table:
    """The added tokens of a tokenizer. Others can join as its library would add them."""

    def __init__(self, pipeline: Any, vocab_size: int):
        self.pipeline = pipeline
        self.vocab_size = vocab_size
        self.added: dict[str, dict] = {  # by their texts, as tokenizer.json has them
            token.content: {"id": token_id, "content": token.content,
                            **{flag: getattr(token, flag) for flag in FLAGS}}
            for token_id, token in pipeline.get_added_tokens_decoder().items()}
        own_size = pipeline.get_vocab_size(with_added_tokens=False)
        self.next_id: int = max([own_size, *(token["id"] + 1 for token in self.added.values())])
        self.changed = False
        self.other_ids: list[str] = []  # texts whose ids the files state differently

    def put(self, token: dict, stated_id: int | None = None):
        """Add a token, or give one that is there other flags. It has the id of its text, or else the next
        one."""
        text = token["content"]
        known = self.added[text]["id"] if text in self.added else self.pipeline.token_to_id(text)
        token_id = self.next_id if known is None else known
        if known is None and token_id >= self.vocab_size:
            return
        if stated_id not in (None, token_id):
            self.other_ids.append(text)
            return
        token = {"id": token_id, **token}
        if self.added.get(text) != token:
            self.added[text] = token
            self.next_id = max(self.next_id, token_id + 1)
            self.changed = True


def decoder_tokens(folder: Path, options: Mapping,
                   special: Mapping[str, dict]) -> Iterator[tuple[int, dict]]:
    """The ids and tokens of added_tokens_decoder, in order, or of an older added_tokens.json. A token that is
    named by its role is special, even if this file says otherwise."""
    path = folder / "tokenizer_config.json"
    stated = options.get(DECODER)
    if stated is None:
        path = folder / "added_tokens.json"
        pairs = [(token_id, {"content": text}) for text, token_id in read_json(path, needed=False).items()]
    elif isinstance(stated, dict):
        pairs = [*stated.items()]
    else:
        raise ConfigError(f"{path}: {DECODER} is {shown(stated)}; it must be an object")
    found = []
    for key, value in pairs:
        if isinstance(key, bool) or not str(key).isdecimal() or not isinstance(value, dict):
            raise ConfigError(f"{path}: {shown(key)} has {shown(value)}; there must be ids of tokens")
        if (token := token_of(path, str(key), value)) is not None:
            named = special.get(token["content"])
            found.append((int(key), token | {"special": True} if named else token))
    yield from sorted(found, key=lambda pair: pair[0])


def special_tokens(folder: Path, options: Mapping) -> Iterator[dict]:
    """The tokens that the files name by a role, or list as special."""
    path = folder / "tokenizer_config.json"
    for key in ROLES:
        value = options.get(key)
        if isinstance(value, (str, dict)) and (token := token_of(path, key, value, special=True)):
            yield token
    for key in LISTS:
        listed = options.get(key)
        listed = [*listed.values()] if isinstance(listed, dict) else listed
        if not isinstance(listed, (list, type(None))):
            raise ConfigError(f"{path}: {key} is {shown(listed)}; it must be a list of tokens")
        for value in listed or ():
            if token := token_of(path, key, value, special=True):
                yield token


def token_of(path: Path, key: str, value: Any, special: bool = False) -> dict | None:
    """A token that a file writes as a text, or as an object with flags; None if it has no text. ConfigError
    for anything else."""
    stated = {"content": value} if isinstance(value, str) else value
    if not isinstance(stated, dict) or not isinstance(stated.get("content", ""), str) or any(
            not isinstance(stated.get(flag, False), bool) for flag in FLAGS):
        raise ConfigError(f"{path}: {printable(key)[:50]} has {shown(value)}; a token must be a text, or an "
                          "object with its content")
    if not (content := whole_unicode(stated.get("content", ""))):
        return None
    is_special = special or bool(stated.get("special", False))
    return {"content": content, **{flag: stated.get(flag, False) for flag in FLAGS},
            "normalized": stated.get("normalized", not is_special), "special": is_special}
