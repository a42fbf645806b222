"""Texts and conversations as token ids, and back, as llama-server and vLLM have it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence as Seq
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import invalid
from chatlm.common.jsontext import dump, is_text
from chatlm.front.admission.prompts import checked_ids
from chatlm.front.api.dialect import Dialect, TextForm
from chatlm.front.api.field_types import MIXED, SWITCH, TEXT, TOKENS, TOOLS
from chatlm.front.api.fields import Field, functions_among, no_tools, parse_fields, within_limit
from chatlm.front.api.found_tools import KnownFunctions
from chatlm.front.api.message_readers import openai_messages, template_options
from chatlm.front.api.readers import conversation_tokens
from chatlm.front.api.tables import CONVERSATION, MODEL, TEMPLATE_OPTIONS

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.admission.prompts import PromptMaker
    from chatlm.front.api.dialect import TextTerms


# fields

DETOKENIZE_FIELDS = (Field("tokens", TOKENS, "token ids", required=True), MODEL)
WITH_PIECES = Field("with_pieces", SWITCH, "return each token's id and text too")
TEMPLATE_FIELDS = (CONVERSATION,
                   Field("tools", TOOLS, "functions"), MODEL, WITH_PIECES, *TEMPLATE_OPTIONS)
TOKENIZE_FIELDS = (  # llama-server's, with `content`; vLLM's, with `prompt` or `messages`
    MODEL,
    Field("content", MIXED, "text, or a list of texts and token ids"),
    Field("add_special", SWITCH, "begin `content` with bos if the model expects it"),
    Field("parse_special", SWITCH, "read the names of special tokens in `content` as these tokens (default)"),
    Field("with_pieces", SWITCH, "return the text of each token of `content` too"),
    Field("prompt", TEXT, "text, with the names of special tokens, as /v1/completions reads it"),
    TEMPLATE_FIELDS[0]._replace(required=False), *TEMPLATE_FIELDS[1:2], *TEMPLATE_OPTIONS,
    Field("add_special_tokens", SWITCH, "begin with bos if the model expects it: the default for `prompt`, "
                                        "not for `messages`, whose template writes it"),
    Field("return_token_strs", SWITCH, "`token_strs`: the text of each token of `prompt` or `messages`"),
)


# readers

ENCODED = ("add_special_tokens", "return_token_strs")
TO_TOKENIZE = {  # a field that says what to tokenize -> the fields that may be beside it
    "content": ("add_special", "parse_special", "with_pieces"), "prompt": ENCODED,
    "messages": (*ENCODED, "tools", *(field.name for field in TEMPLATE_OPTIONS))}


async def tokenize(body: dict, terms: TextTerms) -> bytes:
    """llama-server's response for `content`, vLLM's for `prompt` and `messages`."""
    prompts = terms.prompts
    values = parse_fields(body, TOKENIZE_FIELDS)
    chosen = [name for name in TO_TOKENIZE if name in values]
    if len(chosen) != 1:
        raise invalid(chosen[1] if chosen else "content", "one of content, prompt and messages must say what "
                      f"to tokenize, and {' and '.join(chosen) or 'none of them'} is here")
    for name in {*itertools.chain.from_iterable(TO_TOKENIZE.values())} - {*TO_TOKENIZE[chosen[0]]}:
        if body.get(name) is not None:
            raise invalid(name, f"{name} has no meaning beside {chosen[0]}")
    if chosen == ["content"]:
        parts = values["content"]
        size = sum(len(part) for part in parts if is_text(part))
        within_limit("characters in content", size, LIMITS.tokenized_characters, "content")
        return await prompts.run(partial(tokens_body, prompts.tokenizer, values, parts), size + len(parts))
    return await prompt_tokens(values, prompts, terms.client)


async def prompt_tokens(values: Mapping, prompts: PromptMaker, client: str) -> bytes:
    """vLLM's response for a conversation, or for a prompt, which begins with bos as in /v1/completions."""
    tokenizer = prompts.tokenizer
    if "messages" in values:
        ids = await conversation_ids(values, prompts, client)
    else:
        text = values["prompt"]
        within_limit("characters in prompt", len(text), LIMITS.tokenized_characters, "prompt")
        ids = await prompts.run(partial(tokenizer.encode_with_specials, text), len(text))
    if values.get("add_special_tokens", "prompt" in values):
        ids = tokenizer.with_bos([*ids])
    body = {"count": len(ids), "max_model_len": prompts.context_length, "tokens": ids}
    if values.get("return_token_strs"):
        body["token_strs"] = [tokenizer.show([token]) for token in ids]
    return dump(body)


def tokens_body(tokenizer: Tokenizer, values: Mapping, parts: Seq[str | int]) -> bytes:
    encode = tokenizer.encode_with_specials if values.get("parse_special", True) else tokenizer.encode
    ids = [token for part in parts for token in (encode(part) if isinstance(part, str) else [part])]
    ids = checked_ids(tokenizer.with_bos(ids) if values.get("add_special") else ids, tokenizer, "content")
    if not values.get("with_pieces"):
        return dump({"tokens": ids})
    return dump({"tokens": pieces_body(tokenizer, ids)})


def pieces_body(tokenizer: Tokenizer, tokens: Seq[int]) -> list[dict]:
    return [{"id": token, "piece": piece_body(tokenizer, token),
             **({"special": True} if token in tokenizer.special_names else {})} for token in tokens]


async def detokenize(body: dict, terms: TextTerms) -> bytes:
    """Special tokens are shown by name."""
    prompts = terms.prompts
    tokens = parse_fields(body, DETOKENIZE_FIELDS)["tokens"]
    tokenizer = prompts.tokenizer
    checked_ids(tokens, tokenizer, "tokens")

    def shown_twice() -> bytes:  # llama-server's clients and vLLM's each read one of these
        text = tokenizer.show(tokens)
        return dump({"content": text, "prompt": text})

    return await prompts.run(shown_twice, len(tokens))


def piece_body(tokenizer: Tokenizer, token: int) -> str | list[int]:
    """llama-server's `piece`: a string, or a list of bytes if these are not whole characters."""
    text = tokenizer.whole_text(token)
    return list(tokenizer.shown_bytes(token)) if text is None else text


async def apply_template(body: dict, terms: TextTerms) -> bytes:
    values = parse_fields(body, TEMPLATE_FIELDS)
    prompts = terms.prompts
    tokenizer = prompts.tokenizer
    tokens = await conversation_ids(values, prompts, terms.client)
    pieces = {"tokens": pieces_body(tokenizer, tokens)} if values.get("with_pieces") else {}
    return dump({"prompt": tokenizer.show(tokens), **pieces})


async def conversation_ids(values: Mapping, prompts: PromptMaker, client: str) -> tuple[int, ...]:
    """The tokens of the `messages` and `tools` of a body."""
    tool_format = prompts.tokenizer.tool_format
    tools, _ = functions_among(values.get("tools", ()))
    known = KnownFunctions(tools)
    messages = openai_messages(values["messages"], tool_format is not None, known)
    if known.head and not tool_format:
        raise no_tools("tools")
    return await conversation_tokens(prompts, messages, known.head, client, template_options(values))


DIALECT = Dialect({
    "/tokenize": TextForm(TOKENIZE_FIELDS, tokenize),
    "/detokenize": TextForm(DETOKENIZE_FIELDS, detokenize),
    "/apply-template": TextForm(TEMPLATE_FIELDS, apply_template)})
