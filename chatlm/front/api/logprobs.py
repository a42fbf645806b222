"""Log-probabilities of an answer's tokens, in the forms that several APIs share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.common.text.answer_decoder import CallFinder

if TYPE_CHECKING:
    from chatlm.common.messages.requests import AnswerParams, TokenLogprob
    from chatlm.common.text.tokenizer import Tokenizer


def logprob_number(logprob: float | None) -> float | None:
    """JSON has no infinity, so use OpenAI's floor of -9999."""
    return None if logprob is None else max(logprob, -9999.0)


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int] | None]:
    """The text that stands for a token in log-probabilities, and its bytes.

    A special token is shown by its name and has no bytes (None). A piece of a character is escaped as OpenAI
    does it."""
    text = tokenizer.whole_text(token)
    spelled = tokenizer.token_bytes(token)
    if text is None:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
    return text, None if token in tokenizer.special_names else list(spelled)


def with_requested_tops(logprobs: Seq[TokenLogprob], params: AnswerParams) -> Iterator[TokenLogprob]:
    """Each token beside the alternatives that `logprobs` and `logprob_ids` ask for. A worker lists more of
    them if `prompt_logprobs` asks for more."""
    most = params.logprobs or 0
    for scored in logprobs:
        top = tuple(likely for place, likely in enumerate(scored.top)
                    if place < most or likely[0] in params.logprob_ids)
        yield scored._replace(top=top)


def entries(logprobs: Seq[TokenLogprob], params: AnswerParams, tokenizer: Tokenizer) -> list[dict]:
    """OpenAI's object for each token."""
    def entry(token: int, logprob: float | None) -> dict:
        text, spelled = token_text(tokenizer, token)
        return {"id": token, "token": text, "logprob": logprob_number(logprob), "bytes": spelled}

    objects = []
    for scored in with_requested_tops(logprobs, params):
        own = entry(scored.token, scored.logprob)
        own["top_logprobs"] = [entry(*likely) for likely in scored.top]
        if scored.drafted:
            own["drafted"] = True
        objects.append(own)
    return objects


class TokensOfText:
    """Finds the tokens behind each piece of an answer's text, reasoning and calls.

    A step may bring tokens of several of these, tokens that separate them, and tokens whose text comes with
    a later step."""

    def __init__(self, tokenizer: Tokenizer, skips_specials: bool = True):
        self.tokenizer = tokenizer
        self.skips_specials = skips_specials
        self.calls = CallFinder(tokenizer) if skips_specials and tokenizer and tokenizer.tool_tokens else None
        # tokens whose text has not come yet, each with its bytes in the answer
        self.waiting: list[tuple[TokenLogprob, bytes]] = []

    def add(self, logprobs: Seq[TokenLogprob]):
        self.waiting += [(one, self._spelled(one.token)) for one in logprobs]

    def _spelled(self, token: int) -> bytes:
        if self.calls and self.calls.push(token)[1]:
            return b""  # it stands beside the text
        if not self.skips_specials:
            return self.tokenizer.shown_bytes(token)
        return b"" if token in self.tokenizer.special_names else self.tokenizer.token_bytes(token)

    def take(self, added: str) -> tuple[TokenLogprob, ...]:
        """The tokens behind the answer's next text, reasoning or call. Earlier ones that wait are dropped:
        they are behind none."""
        whole = b"".join(spelled for _, spelled in self.waiting)
        text = added.encode("utf-8", "replace")
        begin = whole.find(text)
        if begin < 0:  # a call that was rewritten, or bytes that are no characters: take all that wait
            begin = 0
            text = whole
        found = []
        first = 0
        after = 0
        for index, (one, piece) in enumerate(self.waiting, 1):
            last = first + len(piece)
            if piece and first < begin + len(text) and last > begin:
                found.append(one)
                after = index
            first = last
        self.waiting = self.waiting[after:]
        return tuple(found)
