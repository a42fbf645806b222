"""A Hugging Face tokenizer for a process that mostly turns ids into text: a table instead of the library."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

from chatlm.common.text.load import HuggingFaceTokenizer, decoding_of, open_tokenizer
from chatlm.common.text.tokenizer import Tokenizer
from chatlm.worker.weights.text.vocabulary import vocabulary_in

if TYPE_CHECKING:
    from chatlm.common.messages.requests import TextSpec
    from chatlm.worker.weights.text.vocabulary import Vocabulary


class PieceTokenizer(HuggingFaceTokenizer):
    """Opens its `tokenizers` pipeline only when something is encoded."""

    def __init__(self, spec: TextSpec, vocabulary: Vocabulary):
        Tokenizer.__init__(self, spec)
        self.table = vocabulary
        self.texts, self.ends, added, decoder = vocabulary
        self.vocab_size = len(self.ends) - 1
        self.know_added({token["id"]: (token["content"], token["special"], token["lstrip"], token["rstrip"])
                         for token in added})
        self.byte_level, self.drops_space = decoding_of(decoder)
        self.know_formats()

    @cached_property
    def whole(self) -> HuggingFaceTokenizer:
        return HuggingFaceTokenizer(self.spec)

    @cached_property
    def pipeline(self):
        return self.whole.pipeline

    def encode(self, text: str, begins: bool = True) -> list[int]:
        return self.whole.encode(text, begins)

    def name_of(self, token: int) -> str | None:
        if 0 <= token < self.vocab_size:
            return self.texts[self.ends[token]:self.ends[token + 1]].decode()
        return None


def open_for_answers(spec: TextSpec, vocabulary: Vocabulary | None = None) -> Tokenizer:
    """The tokenizer for a TextSpec, as a table if that certainly gives the same texts. ConfigError if the
    spec is broken, unless it is read as a table: whoever opens that with the library will say so.

    vocabulary: what the spec says, if it is known already."""
    if spec.kind == "hf":
        with suppress(Exception):  # whatever is unusual or wrong: the library decides
            if found := vocabulary or vocabulary_in(spec):
                return PieceTokenizer(spec, found)
    return open_tokenizer(spec)
