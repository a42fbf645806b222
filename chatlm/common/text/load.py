"""nanochat's and Hugging Face's tokenizers, read from a `TextSpec`."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence as Seq
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TYPE_CHECKING, TypeVar

from chatlm.common.errors import (
    ConfigError, RequestError, lack_of_memory, error_text, printable, require_library)
from chatlm.common.jsontext import whole_unicode
from chatlm.common.log import log
from chatlm.common.messages.requests import Message
from chatlm.common.text.calculations import said_tokens, without_own, without_unfinished
from chatlm.common.text.charsmap import check_charsmaps
from chatlm.common.text.formats import calls_of, thoughts_of, wrapper_of
from chatlm.common.text.history import (
    nine_character_ids, orphans_of, results_as_turns, single_calls, systems_as_turns, with_answers,
    with_generic_tools, with_ids, with_later_systems, with_system, with_text_apart, with_tool_responses)
from chatlm.common.text.history_forms import (
    Filling, FormFinder, rendering, usual_form, write_calls)
from chatlm.common.text.pictures import ShownPictures, pictures_of
from chatlm.common.text.tool_definitions import ToolDefinitions
from chatlm.common.text.tokenizer import (
    NO_OPTIONS, Rendered, Tokenizer, ToolTokens, compile_chat_template, fill_template)

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Forms, HistoryForm, Picture, TextSpec


T = TypeVar("T")
NANOCHAT_CHAT_TOKENS = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")


NO_TEMPLATE = ("this model has no chat template, so it cannot chat: use /v1/completions or /api/generate, "
               "which continue a text")


@contextmanager
def refused_panics():
    """Raise RequestError for text on which a tokenizer's regular expressions fail: 1 MB of spaces overflows
    those of tiktoken. Those of `tokenizers` panic, which is not an Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ not in ("ValueError", "PanicException"):
            raise
        raise RequestError("the text cannot be tokenized (too long a run of spaces?)",
                           param="messages") from None


class NanochatTokenizer(Tokenizer):
    """nanochat's tokenizer (tiktoken) and fixed chat format (upstream: tokenizer.py, render_conversation)."""

    def __init__(self, spec: TextSpec):
        super().__init__(spec)
        tiktoken = require_library("tiktoken", "a nanochat model")
        pattern, ranks, self.specials = json.loads(spec.payload)
        ranks = {piece.encode("latin-1"): token for piece, token in ranks.items()}
        self.encoding = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.specials)
        self.vocab_size = self.encoding.n_vocab
        self.pieces = {token: piece for piece, token in ranks.items()}
        self.tool_format, _ = calls_of(spec)
        tool_tokens = ToolTokens._make(self.specials.get(f"<|{name}|>") for name in ToolTokens._fields)
        self.tool_tokens = None if None in tool_tokens else tool_tokens

    def encode(self, text: str, begins: bool = True) -> list[int]:
        with refused_panics():
            return self.encoding.encode(whole_unicode(text), disallowed_special=())

    def piece(self, token: int) -> bytes:
        return self.pieces.get(token, b"")

    def render(self, messages: Seq[Message], tools: Seq[dict] = (),
               options: Mapping = NO_OPTIONS) -> list[int]:
        bos, user_start, user_end, assistant_start, assistant_end = map(
            self.specials.get, NANOCHAT_CHAT_TOKENS)
        tokens: list = [bos]
        turns = [*merge_system_message(with_later_systems(with_generic_tools(messages, tools)))]
        goes_on = options.get("continue_final_message", False)
        if goes_on:
            turns[-1] = without_unfinished(turns[-1])
        for message in turns:
            if message.role == "user":
                tokens += [user_start, *self.encode(message.content), user_end]
            else:
                tokens += [assistant_start, *said_tokens(self, message), assistant_end]
        if goes_on:
            tokens.pop()  # the last message stays open
        elif options.get("add_generation_prompt", True):
            tokens.append(assistant_start)
        return tokens


def merge_system_message(messages: Seq[Message]) -> Seq[Message]:
    """nanochat has no system role: put a leading system message before the first user's, a blank line between
    them."""
    if len(messages) > 1 and messages[0].role == "system" and messages[1].role == "user":
        merged = Message("user", messages[0].content + "\n\n" + messages[1].content)
        messages = [merged, *messages[2:]]
    if any(message.role not in ("user", "assistant") for message in messages):
        raise RequestError(
            "this model accepts a system message only as the first message, before a user's",
            param="messages")
    return messages


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The byte of each character in GPT-2's byte-level BPE alphabet: printable bytes are themselves, the
    others are U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@functools.cache
def byte_of_ordinal() -> dict[int, int]:
    """As `byte_of_character`, in the form that codecs reads fast."""
    return {ord(character): byte for character, byte in byte_of_character().items()}


def in_characters(data: bytes) -> str:
    """Bytes in GPT-2's alphabet."""
    return data.decode("latin-1").translate(character_of_byte())


@functools.cache
def character_of_byte() -> dict[int, str]:
    return {byte: character for character, byte in byte_of_character().items()}


MOST_GROWTH = 64  # characters that a normalizer may write for one; Unicode's own forms need 18


def check_growth(part):
    """Raise ConfigError if a normalizer or decoder of `tokenizers` could make a text more than MOST_GROWTH
    times as long: 40 replacements of one letter by two would fill any memory."""
    def growth(step: dict) -> float:
        steps = step.get("normalizers") or step.get("decoders") or ()
        if step.get("type") == "Prepend":
            return 1 + len(step["prepend"])
        if step.get("type") != "Replace":
            return math.prod(map(growth, steps))
        form, pattern = next(iter(step["pattern"].items()))
        written = len(step["content"])
        replaced = len(pattern) if form == "String" else 1
        if not replaced:  # written before and after each character
            return 1 + written
        return max(1, written / replaced)

    times = growth(json.loads(part.__getstate__())) if part else 1
    if times > MOST_GROWTH:
        raise ConfigError(f"its replacements could make a text {times:,.0f} times as long; {MOST_GROWTH} are "
                          "the most allowed")


def decoding_of(decoder: dict | None) -> tuple[bool, bool]:
    """What the decoder of a tokenizer.json does: (reads pieces in GPT-2's alphabet of bytes, removes the
    space that the pipeline puts before a text). Raises KeyError for a kind that the library does not
    write."""
    if decoder is None:
        return False, False
    match decoder["type"]:
        case "Sequence":
            parts = [decoding_of(part) for part in decoder["decoders"]]
            return any(part[0] for part in parts), any(part[1] for part in parts)
        case "Strip":
            return False, decoder["content"] == " " and decoder["start"] == 1
        case "Metaspace":
            return False, decoder["prepend_scheme"] in ("always", "first")
        case kind:
            return KINDS_OF_DECODERS[kind], False


KINDS_OF_DECODERS = {  # whether its pieces are in the alphabet of bytes
    "ByteLevel": True, "ByteFallback": False, "Fuse": False, "Replace": False, "WordPiece": False,
    "BPEDecoder": False, "CTC": False}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` pipeline and a jinja chat template.

    Only the template may write special tokens. So a random mark, which nobody can type, breaks up their names
    in messages before the template is filled in. Then the special tokens are split off, and the pipeline
    takes what is left for ordinary text (`encode_special_tokens`).

    The text after each special token is encoded by itself. So `encode`, not the pipeline, puts the space that
    some pipelines put before the whole text."""

    def __init__(self, spec: TextSpec):
        super().__init__(spec)
        tokenizers = require_library("tokenizers", "this model's tokenizer")
        check_charsmaps(spec.payload)
        self.pipeline = tokenizers.Tokenizer.from_buffer(spec.payload)
        self.pipeline.no_padding()
        self.pipeline.no_truncation()
        for part in (self.pipeline.normalizer, self.pipeline.decoder):
            check_growth(part)
        added = self.pipeline.num_special_tokens_to_add(False)
        if added > MOST_GROWTH:
            raise ConfigError(f"its post_processor adds {added:,} tokens to each text; {MOST_GROWTH} are the "
                              "most allowed")
        self.vocab_size = self.pipeline.get_vocab_size()
        self.know_added({id: (token.content, token.special, token.lstrip, token.rstrip)
                         for id, token in self.pipeline.get_added_tokens_decoder().items()})
        decoder = self.pipeline.decoder.__getstate__() if self.pipeline.decoder else b"null"
        self.byte_level, self.drops_space = decoding_of(json.loads(decoder))
        splitter = self.pipeline.pre_tokenizer
        state = splitter.__getstate__() if splitter else b""
        self.space_first = b'"prepend_scheme":"first"' in state
        if self.space_first:
            splitter.__setstate__(state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'))
            self.pipeline.pre_tokenizer = splitter
        self.pipeline.encode_special_tokens = True
        self.know_formats()

    def know_added(self, tokens: Mapping[int, tuple[str, bool, bool, bool]]):
        """Note the added tokens: by id (text, special, swallows spaces before it, swallows spaces after
        it)."""
        self.specials = {}
        self.added = {}
        self.swallows = {}
        for id, (text, special, before, after) in tokens.items():
            if not special:
                self.added[id] = text.encode()
                continue
            self.specials[text] = id
            if before or after:
                self.swallows[text] = before, after

    def know_formats(self):
        """Note what follows from the chat template and the special tokens."""
        self.mark = f"\ue000{secrets.token_hex(8)}\ue001"
        self.shown_pictures = ShownPictures(self.spec, self.mark)
        self.has_chat_template = self.templated = bool(self.spec.chat_template)
        self.tool_format, self.native_tools = calls_of(self.spec)
        self.thoughts = thoughts_of(self.spec.chat_template or "")
        self.wrapper = wrapper_of(self.spec.chat_template or "")
        self.told_of_refusal = False
        self.forms_found = False
        self.definitions = ToolDefinitions(self.mark, self.call_format, lambda: self.named_tokens,
                                           self._mark_specials)
        tokens = self.named_tokens
        ends = frozenset(tokens[name] for name in self.call_format.stops if name in tokens)
        if ends:
            self.stop_tokens = ends

    def encode(self, text: str, begins: bool = True) -> list[int]:
        text = whole_unicode(text.replace(self.mark, ""))
        if self.space_first and begins and text and not self.no_space_before.match(text):
            text = " " + text
        # encode_batch_fast with one text: unlike the library's `encode`, it lets other Python threads run
        with refused_panics():
            return self.pipeline.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def no_space_before(self) -> re.Pattern:
        """Matches text that gets no space before it: text that begins with a space or with an added token."""
        return re.compile("|".join(map(re.escape, (" ", "\u2581", *map(bytes.decode, self.added.values())))))

    def decode(self, tokens: Iterable[int]) -> str:
        return self._without_first_space(super().decode(tokens))

    def show(self, tokens: Iterable[int]) -> str:
        return self._without_first_space(super().show(tokens))

    def _without_first_space(self, text: str) -> str:
        return text.removeprefix(" ") if self.drops_space else text

    def _mark_specials(self, content) -> Any:
        """Break up the names of special tokens in the strings of a JSON value."""
        if isinstance(content, dict):
            return {self._mark_specials(name): self._mark_specials(value) for name, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [self._mark_specials(value) for value in content]
        if not isinstance(content, str):
            return content
        return self.guarded_pattern.sub(lambda match: match[0][0] + self.mark + match[0][1:], content)

    @cached_property
    def guarded_pattern(self) -> re.Pattern:
        return self.shown_pictures.guarded(self.special_pattern)

    def _special_text(self, token: int | None) -> str:
        return "" if token is None else self.name_of(token) or ""

    def template_arguments(self, messages: Seq[Message], tools: Seq[dict],
                           options: Mapping = NO_OPTIONS, form: HistoryForm | None = None) -> dict:
        """The values to fill in the template with. form: how earlier calls are written."""
        if not self.has_chat_template:
            raise RequestError(NO_TEMPLATE, code="no_chat_template")
        try:
            messages = [self.shown_pictures.signed(message) for message in messages]
            if not self.native_tools:
                has_system = "ystem role not supported" not in (self.spec.chat_template or "")
                messages = with_generic_tools(messages, tools, has_system)
                tools = ()
            messages = with_system(messages, self.spec.system)
            dialogue = self._mark_specials(
                [{"role": message.role, "content": message.content, **without_own(message.more)}
                 for message in messages])
            self._sign_tools(messages, dialogue)
            goes_on = options.get("continue_final_message", False)
            if goes_on:
                last = dialogue[-1]  # was cut in its text, or already in its reasoning
                in_thoughts = not last["content"] and last.get("reasoning_content")
                last["reasoning_content" if in_thoughts else "content"] += 2 * self.mark
            dialogue = self.shown_pictures.as_parts(
                self.history(dialogue, form or usual_form(self.spec.chat_template or "")))
            tools = [{**tool, "function": self.call_format.function(tool["function"])} for tool in tools]
            return {**self._mark_specials(self.thinking_options(options)), "messages": dialogue,
                    "tools": self._mark_specials(tools) or None, "documents": None,
                    "add_generation_prompt": not goes_on and options.get("add_generation_prompt", True),
                    "bos_token": self._special_text(self.spec.bos_token),
                    "eos_token": self._special_text(self.spec.eos_token)}
        except RecursionError:
            raise RequestError("messages or tools are nested too deeply", param="messages") from None

    def _sign_tools(self, messages: Seq[Message], dialogue: list[dict]):
        """Put a sign into each message that makes functions known."""
        numbers = itertools.count()
        for message, shown in zip(messages, dialogue):
            if message.tools:
                shown["content"] = self.definitions.signed(shown["content"], next(numbers))

    def thinking_options(self, options: Mapping) -> dict:
        """The template's arguments about thinking, under all names that families have for them."""
        effort = options.get("reasoning_effort")
        budget = options.get("thinking_budget")
        arguments = {}
        if effort:
            arguments["reasoning_effort"] = self._effort_word(effort)
        if budget is not None:  # Seed-OSS shows it to the model
            arguments["thinking_budget"] = budget
        if effort or budget == 0:
            thinks = effort != "none" and budget != 0
            arguments["enable_thinking"] = thinks
            arguments["thinking"] = thinks
        return arguments | dict(options.get("chat_template_kwargs", {}))

    def _effort_word(self, effort: str) -> str:
        """The template's word for an effort. One that does not know "max" takes it for "xhigh"."""
        efforts = self.call_format.efforts
        template = self.spec.chat_template or ""
        if effort == "max" and "max" not in efforts and not re.search(r"[\"']max[\"']", template):
            effort = "xhigh"
        return efforts.get(effort, effort)

    def history(self, dialogue: list[dict], form: HistoryForm) -> list[dict]:
        """Messages as this template expects them: reasoning under every name, and calls in its form."""
        if form.moves_systems:
            dialogue = systems_as_turns(dialogue)
        if form.gives_ids:
            with_ids(dialogue)
        if form.nine_character_ids:
            nine_character_ids(dialogue)
        if form.moves_orphans:
            dialogue = results_as_turns(dialogue, orphans_of(dialogue))
        if form.text_apart:
            dialogue = with_text_apart(dialogue)
        if form.answers_results:
            dialogue = with_answers(dialogue)
        write_calls(dialogue, form, self.call_format)
        if form.single:
            dialogue = single_calls(dialogue)
        for message in dialogue:
            if thought := message.get("reasoning_content"):
                message |= dict.fromkeys(("reasoning", "thinking", "thought"), thought)
        self.call_format.history(dialogue, self.mark)
        if form.results == "members":
            return with_tool_responses(dialogue)
        if form.results == "text":
            return results_as_turns(dialogue, dialogue)
        return dialogue

    def find_forms(self) -> Filling[Forms]:
        """Find out how the template shows earlier calls and their results, for `forms`."""
        return FormFinder(
            self.spec.chat_template or "", self.mark, lambda text: self.call_format.mend(text, self.mark),
            lambda messages, tools, form: self.template_arguments(messages, tools, form=form),
            self.native_tools).find()

    def rendering(self, messages: Seq[Message], tools: Seq[dict] = (),
                  options: Mapping = NO_OPTIONS) -> Filling[Rendered]:
        """A conversation as the template writes it, for `finished`."""
        def arguments(form: HistoryForm | None) -> dict:
            return self.template_arguments(messages, tools, options, form)
        text = yield from rendering(messages, self.forms, tools, arguments, self.tell_of_refusal)
        places = [message.tools for message in messages if message.tools]
        if not places or not self.native_tools:
            return Rendered(text)
        definitions = yield from self.definitions.write(places, bool(tools), self.template_arguments)
        return Rendered(text, definitions)

    def tell_of_refusal(self, refusal: str):
        """Log once that conversations with calls are refused."""
        if not self.told_of_refusal:
            self.told_of_refusal = True
            log.warning("calls and their results are shown as text in a conversation, since %s",
                        printable(refusal))

    def finished(self, rendered: Rendered) -> str:
        """The text of a rendered conversation, for `encode_rendered`."""
        text = self.call_format.mend(rendered.text, self.mark)
        return self.definitions.placed(text, rendered.definitions)

    def encode_rendered(self, text: str, options: Mapping = NO_OPTIONS,
                        pictures: Seq[Picture] = ()) -> list[int]:
        """The tokens of a rendered chat template. If the final message is to be continued, they end with its
        text. pictures: those of the messages."""
        if options.get("continue_final_message"):
            text, shown_last, _ = text.rpartition(2 * self.mark)
            if not shown_last:
                raise RequestError("the model's chat template leaves out the last message, so it cannot be "
                                   "continued", param="continue_final_message")
        tokens = list[int]()
        for part in self.shown_pictures.placed(text, pictures):
            tokens += part if isinstance(part, list) else self.encode_with_specials(part, not tokens)
        return self.with_bos(tokens) if self.spec.chat_bos else tokens

    @cached_property
    def template(self):
        return compile_chat_template(self.spec.chat_template or "")

    def render(self, messages: Seq[Message], tools: Seq[dict] = (),
               options: Mapping = NO_OPTIONS) -> list[int]:
        if not self.forms and not self.forms_found:
            self.forms = self.filled(self.find_forms())
            self.forms_found = True
        rendered = self.filled(self.rendering(messages, tools, options))
        return self.encode_rendered(self.finished(rendered), options, pictures_of(messages))

    def filled(self, filling: Filling[T]) -> T:
        """Run `filling` with the template filled in by this process, and return its result. A template is a
        program, which may never end."""
        try:
            arguments = next(filling)
            while True:
                try:
                    text = fill_template(self.template, arguments)
                except RequestError as error:
                    arguments = filling.throw(error)
                else:
                    arguments = filling.send(text)
        except StopIteration as ended:
            return ended.value

    def name_of(self, token: int) -> str | None:
        """A token as the file writes it."""
        return self.pipeline.id_to_token(token) if token >= 0 else None

    def piece(self, token: int) -> bytes:
        text = self.name_of(token)
        if text is None or text in self.specials:
            return b""
        if token in self.added:
            return self.added[token]
        if self.byte_level:
            return codecs.charmap_encode(text, "ignore", byte_of_ordinal())[0]
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)  # sentencepiece's byte fallback
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()


class CharacterTokenizer(Tokenizer):
    """Has a token for each character of a small text, as nanoGPT makes it. It has no chat format."""

    has_chat_template = False

    def __init__(self, spec: TextSpec):
        super().__init__(spec)
        self.characters: list[str] = json.loads(spec.payload)
        self.ids = {character: token for token, character in enumerate(self.characters)}
        self.vocab_size = len(self.characters)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        for character in text:
            if character not in self.ids:
                raise RequestError(f"the model has no token for {json.dumps(character)}: it knows only "
                                   f"{self.vocab_size:,} characters", param="prompt")
        return [self.ids[character] for character in text]

    def piece(self, token: int) -> bytes:
        return self.characters[token].encode() if 0 <= token < self.vocab_size else b""

    def render(self, messages: Seq[Message], tools: Seq[dict] = (),
               options: Mapping = NO_OPTIONS) -> list[int]:
        raise RequestError(NO_TEMPLATE, code="no_chat_template")


TOKENIZERS = {"nanochat": NanochatTokenizer, "hf": HuggingFaceTokenizer, "characters": CharacterTokenizer}


def open_tokenizer(spec: TextSpec) -> Tokenizer:
    """The tokenizer for a TextSpec; needs no torch. Raises ConfigError if the spec is broken."""
    try:
        return TOKENIZERS[spec.kind](spec)
    except ConfigError:
        raise
    except BaseException as error:  # the libraries may raise a Rust panic, which is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise lack_of_memory(error) or ConfigError(
            f"the model's tokenizer is broken: {error_text(error)}") from None
