"""`Tokenizer`: text to ids and back, and a conversation to text by its chat template."""

from __future__ import annotations

import functools
import json
import re
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from functools import cached_property
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError, RequestError, error_text, require_library
from chatlm.common.text.formats import CALL_FORMATS, MARKS, NO_CALLS, CallFormat
from chatlm.common.text.infill import infill_tokens_of

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Forms, Message, TextSpec
    from chatlm.common.text.history_forms import Filling


NO_OPTIONS: Mapping = types.MappingProxyType({})
REFUSED = "template_refused"  # the code of a template's own errors


class ToolTokens(NamedTuple):
    """nanochat's calculator: <|python_start|> code <|python_end|> <|output_start|> result <|output_end|>."""

    python_start: int
    python_end: int
    output_start: int
    output_end: int


class Rendered(NamedTuple):
    """A conversation as its template writes it."""

    text: str                     # with a sign where a message makes functions known
    definitions: Seq[str] = ()    # of these


# What `tokenizers` calls white space: unlike str.strip, without U+001C to U+001F.
WHITE_SPACE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
               "\u2028\u2029\u202f\u205f\u3000")
WHITE_SPACES = re.compile(f"[{WHITE_SPACE}]*")


class Tokenizer:
    """Text to token ids and back; safe to use from several threads at once.

    Only templates and `encode_prompt` write special tokens: the same characters in a message stay text."""

    vocab_size: int
    has_chat_template = True
    templated = False               # render runs the model's template, a program that may never end
    template: Any                   # if so: the compiled one, how to fill it in, and to encode the text
    rendering: Callable[..., Filling[Rendered]]
    finished: Callable[[Rendered], str]
    encode_rendered: Callable[..., list[int]]
    forms: Forms = ()               # how it shows earlier calls,
    find_forms: Callable[[], Filling[Forms]]  # which this finds out
    tool_tokens: ToolTokens | None = None
    tool_format: str | None = None  # how it calls the client's functions, or None (see tool_format_of)
    native_tools = False            # does its template tell it of them? else a system prompt does
    thoughts: tuple[str, str] | None = None  # what encloses its reasoning, one of THOUGHTS
    wrapper: tuple[str, str] = ("", "")      # what encloses its content, one of WRAPPERS
    infill_tokens = cached_property(infill_tokens_of)

    def __init__(self, spec: TextSpec):
        self.spec = spec
        self.stop_tokens = spec.stop_tokens
        self.specials: dict[str, int] = {}
        self.added: dict[int, bytes] = {}  # tokens with text of their own that no merge makes
        self.swallows: dict[str, tuple[bool, bool]] = {}  # special -> white space before it, after it
        self.token_bytes: Callable[[int], bytes] = functools.cache(self.piece)

    @property
    def continues_texts(self) -> bool:
        """Is the model for texts, which it continues? So it is if it has no chat template, and if it was
        trained on documents alone: asked to chat, that one rambles."""
        return not self.has_chat_template or self.spec.base

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Encode ordinary text; nothing in it becomes a special token. Does it begin the whole text?"""
        raise NotImplementedError

    def render(self, messages: Seq[Message], tools: Seq[dict] = (),
               options: Mapping = NO_OPTIONS) -> list[int]:
        """The conversation in the model's chat format, up to the assistant's turn, or RequestError. `options`
        is Request.template_options."""
        raise NotImplementedError

    def piece(self, token: int) -> bytes:
        """The bytes a token adds to the text; b"" for special or unknown ids. Cached as `token_bytes`."""
        raise NotImplementedError

    def encode_with_specials(self, text: str, begins: bool = True) -> list[int]:
        """Encode text in which the names of special tokens mean the tokens."""
        tokens = []
        end = 0
        for special in self.special_pattern.finditer(text):
            before, after = self.swallows.get(special[0], (False, False))
            part = text[end:special.start()]
            tokens += self.encode(part.rstrip(WHITE_SPACE) if before else part, begins and not end)
            tokens.append(self.specials[special[0]])
            end = WHITE_SPACES.match(text, special.end()).end() if after else special.end()  # pyright: ignore[reportOptionalMemberAccess]  any text matches
        return tokens + self.encode(text[end:], begins and not end)

    @cached_property
    def special_pattern(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or r"(?!)")

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a raw completion prompt: parses specials as llama-server does, adds bos once if wanted."""
        return self.with_bos(self.encode_with_specials(text))

    def with_bos(self, tokens: list[int]) -> list[int]:
        wanted = [self.spec.bos_token] if self.spec.add_bos and self.spec.bos_token is not None else []
        return tokens if tokens[:1] == wanted else wanted + tokens

    @property
    def document_start(self) -> tuple[int, ...]:
        """What the model has seen before documents, from which it writes a new one; () if nothing is known
        of that. With OpenAI it is <|endoftext|>."""
        spec = self.spec
        known = [spec.bos_token if spec.add_bos else None, self.named_tokens.get("<|endoftext|>"),
                 spec.bos_token, spec.eos_token]
        return next(((token,) for token in known if token is not None), ())

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    @cached_property
    def special_names(self) -> dict[int, str]:
        return {token: name for name, token in self.specials.items()}

    @property
    def call_format(self) -> CallFormat:
        return CALL_FORMATS[self.tool_format] if self.tool_format else NO_CALLS

    @cached_property
    def never_written(self) -> frozenset[int]:
        """The tokens that no grammar allows: special ones, but for the marks of thoughts and calls."""
        return frozenset(self.special_names) - frozenset(self.markers.values())

    @property
    def markers(self) -> dict[str, int]:
        """The markers of the model's format that are tokens, whatever their type in its file. If the
        vocabulary has a marker, the same characters spelled out are just text."""
        wanted = (*(self.thoughts or ()), *self.wrapper, *self.call_format.markers)
        tokens = self.named_tokens
        return {name: tokens[name] for name in wanted if name in tokens}

    @property
    def named_tokens(self) -> dict[str, int]:
        """The special tokens and those with text of their own, which files do not distinguish alike."""
        return self.specials | {text.decode(): token for token, text in self.added.items()}

    def marks(self, with_calls: bool) -> dict[int, str]:
        """The tokens that separate the parts of an answer, and the characters that stand for them."""
        calls = self.call_format.markers if with_calls or self.call_format.thoughts else ()
        wanted = {*(self.thoughts or ()), *self.wrapper, *calls}
        markers = self.markers
        return {markers[name]: MARKS[name] for name in wanted & markers.keys()}

    def whole_text(self, token: int) -> str | None:
        """A token's characters, or a special one's name; None if its bytes are not whole characters."""
        try:
            return self.shown_bytes(token).decode()
        except UnicodeDecodeError:
            return None

    def show(self, tokens: Iterable[int]) -> str:
        """Like `decode`, but shows special tokens by name."""
        return b"".join(map(self.shown_bytes, tokens)).decode("utf-8", "replace")

    def shown_bytes(self, token: int) -> bytes:
        return self.special_names.get(token, "").encode() or self.token_bytes(token)

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """The tokens of single bytes."""
        return single_bytes(map(self.piece, range(self.vocab_size)))

    @cached_property
    def bare_vocabulary(self):
        """The tokens in llguidance's form (0.1 s for 49,152 tokens, 0.5 s for 151,936; 12 MB). It finds the
        same masks as `grammar_vocabulary`, some of them in 4 ms in place of 1."""
        llguidance = require_library("llguidance", "constrained decoding")
        pieces = list(map(self.piece, range(self.vocab_size)))
        self.byte_tokens = single_bytes(pieces)
        # A marker has text if its file calls it user-defined. Grammars name it by its number: if llguidance
        # knew the text, it would count its bytes where it has consumed one number, and taking back a draft
        # would break the matcher.
        named = self.specials | self.markers
        special = sorted({*named.values(), *(token for token, piece in enumerate(pieces) if not piece)})
        for token in special:  # in llguidance, names of special tokens begin so; it needs one for each
            pieces[token] = b"\xff<%d>" % token
        for name, token in named.items():
            pieces[token] = b"\xff" + name.encode()
        ends = sorted(self.stop_tokens) or [self.spec.eos_token or 0]

        class Words:
            """As llguidance.TokenizerWrapper, which encodes a text at once, to see whether that works: it
            would open a library of tokenizers (0.5 s) before anything needs it."""

            is_tokenizer_wrapper = True
            eos_token_id = ends[0]
            bos_token_id = self.spec.bos_token
            tokens = pieces
            special_token_ids = special

            def __call__(words, text: str) -> list[int]:
                return self.encode(text)

        vocabulary = llguidance.LLTokenizer(Words(), eos_token=ends, slices=[])
        Words.tokens = []  # it has copied them, and keeps Words for its call
        return vocabulary

    @cached_property
    def grammar_vocabulary(self):
        """`bare_vocabulary` with what makes masks fast (0.1 s for 49,152 tokens, 0.5 s for 151,936; 18 MB).
        Two calls, so that other Python threads can run in between: each call blocks them."""
        bare = self.bare_vocabulary
        return bare.with_slices(bare.general_slices())

    @property
    def ready_vocabulary(self):
        """The faster one of the two if it has been made, else the one that is made sooner."""
        return vars(self).get("grammar_vocabulary") or self.bare_vocabulary


def single_bytes(pieces: Iterable[bytes]) -> dict[int, int]:
    """The first token of each single byte, of the pieces of all tokens."""
    tokens: dict[int, int] = {}
    for token, piece in enumerate(pieces):
        if len(piece) == 1:
            tokens.setdefault(piece[0], token)
    return tokens


def compile_chat_template(source: str):
    """Compile a chat template in jinja's sandbox, with the functions and options that transformers offers.
    ConfigError if it is broken."""
    require_library("jinja2", "a chat template")
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str):
        raise TemplateError(message)

    def tojson(value, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    # {% generation %} marks the assistant's text for training; here it only groups
    source = re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})",
                    lambda match: f"{match[1]}{match[2] or ''}with{match[3]}", source)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the model's chat template does not parse: line {error.lineno}: {error.message}") from None
    except Exception as error:  # from Python's compiler: nested too deeply, too many nested blocks
        raise ConfigError(f"the model's chat template cannot be compiled: {error_text(error)}") from None


# Variables of a template that are the request's own fields: `chat_template_kwargs` cannot set them
PROMPT_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


def fill_template(template, arguments: dict) -> str:
    try:
        return template.render(arguments)  # a client names some: as keywords, `self` could not be one
    except MemoryError:
        raise
    except Exception as error:  # from jinja, raise_exception or the template's code; nested too deeply
        raise RequestError(f"the model's chat template refused the messages: {error}",
                           code=REFUSED, param="messages") from None


def tools_of(tokenizer: Tokenizer) -> str | None:
    """How functions are described to the model: "native", "generic" or None."""
    if not tokenizer.tool_format:
        return None
    return "native" if tokenizer.native_tools else "generic"
