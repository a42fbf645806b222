"""Makes prompts that ask a model to fill in the middle of a text, cut to fit.

    [bos] [repository] name [file] name text [file] name text ... [prefix] before [suffix] after [middle]

The order is llama-server's, and Qwen2.5-Coder's (arXiv 2409.12186). What a client sent is text throughout;
only this module writes the tokens in brackets."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence as Seq
from functools import cached_property
from typing import TYPE_CHECKING

from chatlm.common.client_words import too_long
from chatlm.common.errors import invalid

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Infill, Request
    from chatlm.common.text.tokenizer import Tokenizer


REPOSITORY, THIS_FILE = "myproject\n", "filename\n"  # llama-server's names, the same for every request
SNIPPET = "\n\n--- snippet ---\n\n"                  # stands before a file if the model has no file token
BEFORE_SHARE = 3 / 4  # share of the room for the text before the gap, if neither side fits

Part = str | Seq[str | int]  # a text, or texts and token ids


def as_pieces(part: Part) -> Seq[str | int]:
    return [part] if isinstance(part, str) else part


def infill_size(prompts: Seq[Part], infill: Infill) -> int:
    """Roughly how many characters and token ids the texts have."""
    parts = itertools.chain(prompts, [infill.prefix, infill.suffix], infill.files or ())
    return sum(len(piece) if isinstance(piece, str) else 1 for part in parts for piece in as_pieces(part))


class InfillMaker:
    """Makes the prompts of requests that have an `Infill`, for one model."""

    SLICE_CHARACTERS = 1 << 16  # a longer text is encoded in slices, from the gap outwards, as far as needed

    def __init__(self, tokenizer: Tokenizer, context_length: int):
        self.tokenizer = tokenizer
        self.context_length = context_length

    def prompts(self, request: Request, infill: Infill) -> tuple[tuple[tuple[int, ...], ...], bool]:
        """The prompt of each gap, and whether one was cut. A prompt that may be cut leaves room for
        max_tokens or for a quarter of the context. Raises RequestError if one does not fit and may not be
        cut."""
        room = 0
        if infill.cut:
            quarter = max(self.context_length // 4, len(request.prefix_token_ids) + 1)
            room = int(min(request.max_tokens or math.inf, quarter))
        made = [self.prompt(prompt, infill, self.context_length - room) for prompt in request.prompts]
        return tuple(tuple(ids) for ids, _ in made), any(cut for _, cut in made)

    def prompt(self, prompt: Part, infill: Infill, most: int) -> tuple[list[int], bool]:
        """A prompt of at most `most` tokens, and whether it was cut for that."""
        prefix, suffix, middle = [token for token in self.tokenizer.infill_tokens[:3] if token is not None]
        room = max(0, most - len(self.tokenizer.with_bos([prefix, suffix, middle])))
        names = ("input_prefix", "input_suffix") if infill.cut else ("prompt", "suffix")
        before = self.checked([*infill.prefix, *as_pieces(prompt)], names[0])
        left, left_cut = self.nearest(before, room, at_end=True)
        right, right_cut = self.nearest(self.checked(infill.suffix, names[1]), room)
        cut = left_cut or right_cut or len(left) + len(right) > room
        if cut and not infill.cut:
            raise too_long(most, self.context_length, "prompt and suffix", names[0], "more than ")
        left_count = min(len(left), max(int(room * BEFORE_SHARE), room - len(right)))
        left = left[len(left) - left_count:]
        right = right[:room - left_count]
        files, files_cut = self.files(infill.files, room - len(left) - len(right))
        ids = [*files, prefix, *left, suffix, *right, middle]
        return self.tokenizer.with_bos(ids), cut or files_cut

    def files(self, files: Seq[tuple[str, str]] | None, most: int) -> tuple[list[int], bool]:
        """The last tokens of the repository that stands before the gap, at most `most` of them, and whether
        some were cut."""
        runs = list[list[int]]()
        count = 0
        cut = False
        for token, text in self.repository_texts(files) if files is not None else ():
            if count >= most:
                cut = True
                break
            ids, text_cut = self.nearest(text, most - count, at_end=True)
            if token is not None:
                ids = [token, *ids]
            runs.append(ids)
            count += len(ids)
            cut = cut or text_cut
        ids = list(itertools.chain(*reversed(runs)))
        return ids[max(0, len(ids) - most):], cut or count > most

    def repository_texts(self, files: Seq[tuple[str, str]]) -> Iterator[tuple[int | None, str]]:
        """The texts of a repository, from the last to the first, each with the token before it, if any."""
        tokens = self.tokenizer.infill_tokens
        if tokens.file is not None:
            yield tokens.file, THIS_FILE
        for name, text in reversed(files):
            yield None, text
            yield tokens.file, SNIPPET if tokens.file is None else name + "\n"
        if tokens.repository is not None:
            yield tokens.repository, REPOSITORY

    def nearest(self, part: Part, most: int, at_end: bool = False) -> tuple[list[int], bool]:
        """The first tokens of a part, or with `at_end` the last ones, at most `most` of them; and whether
        some were cut."""
        runs = list[list[int]]()
        count = 0
        cut = False
        pieces = as_pieces(part)
        for piece in reversed(pieces) if at_end else pieces:
            if count > most:
                break
            if isinstance(piece, str):
                near = self.near(piece, most, at_end)
                cut = cut or len(near) < len(piece)
                run = self.encode(near)
            else:
                run = [piece]
            runs.append(run)
            count += len(run)
        cut = cut or count > most
        if at_end:
            ids = list(itertools.chain(*reversed(runs)))
            return ids[max(0, len(ids) - most):], cut
        return list(itertools.chain(*runs))[:most], cut

    def near(self, text: str, most: int, at_end: bool) -> str:
        """The text or, if it has many more tokens than `most`, a piece from its start or end with over twice
        as many. So only a few slices are encoded, and the token that a slice's end splits is cut from the
        prompt anyway."""
        count = 0
        taken = 0  # characters
        while taken < len(text) > self.SLICE_CHARACTERS:
            if count > 2 * most:
                return text[-taken:] if at_end else text[:taken]
            begin = len(text) - taken - self.SLICE_CHARACTERS if at_end else taken
            count += len(self.encode(text[max(0, begin):begin + self.SLICE_CHARACTERS]))
            taken += self.SLICE_CHARACTERS
        return text

    def encode(self, text: str) -> list[int]:
        """The tokens of a text in which the names of infill tokens are plain text, too. The tokenizer alone
        does not ensure that: some models, such as Qwen2.5-Coder, do not mark these tokens as special."""
        return [token for piece in self.inside_names.split(text)
                for token in self.tokenizer.encode(piece, False)]

    @cached_property
    def inside_names(self) -> re.Pattern:
        """Matches after the first character of each infill token's name."""
        *tokens, ends = self.tokenizer.infill_tokens
        names = sorted(filter(None, map(self.tokenizer.whole_text, {*tokens, *ends} - {None})))
        places = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1]
        return re.compile("|".join(places) or "(?!)")

    def checked(self, part: Part, name: str) -> Part:
        """The part. RequestError for token ids outside the vocabulary. name: the field that has them."""
        size = self.tokenizer.vocab_size
        for piece in as_pieces(part):
            if not isinstance(piece, str) and not 0 <= piece < size:
                raise invalid(name, f"{name} has the token id {piece}; this model's ids are 0 to {size - 1}")
        return part
