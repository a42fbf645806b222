"""Log-probabilities of an answer's tokens, as several APIs write them."""

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
    """A token as log-probabilities show it, and its bytes.

    Special tokens show their name; a piece of a character is escaped as OpenAI does."""
    text = tokenizer.whole_text(token)
    spelled = tokenizer.token_bytes(token)
    if text is None:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
    return text, None if token in tokenizer.special_names else list(spelled)


def listed(logprobs: Seq[TokenLogprob], params: AnswerParams) -> Iterator[TokenLogprob]:
    """With as many of the likeliest tokens as `logprobs` asks for, since `prompt_logprobs` may want more, and
    those that are named."""
    return (scored._replace(top=tuple(
        one for place, one in enumerate(scored.top)
        if place < (params.logprobs or 0) or one[0] in params.logprob_ids)) for scored in logprobs)


def entries(logprobs: Seq[TokenLogprob], params: AnswerParams, tokenizer: Tokenizer) -> list[dict]:
    """An object for each token."""
    def entry(token: int, logprob: float | None) -> dict:
        text, spelled = token_text(tokenizer, token)
        return {"id": token, "token": text, "logprob": logprob_number(logprob), "bytes": spelled}
    return [{**entry(one.token, one.logprob), "top_logprobs": [entry(*likely) for likely in one.top],
             **({"drafted": True} if one.drafted else {})} for one in listed(logprobs, params)]


class TokensOfText:
    """Tells which tokens of an answer are behind its text, and not behind reasoning, calls or what separates
    these. A step may bring tokens of several of them, and tokens whose text comes with a later step."""

    def __init__(self, tokenizer: Tokenizer, skips_specials: bool = True):
        self.tokenizer = tokenizer
        self.skips_specials = skips_specials
        self.calls = CallFinder(tokenizer) if skips_specials and tokenizer and tokenizer.tool_tokens else None
        # behind no text so far, each with the bytes that it has in the answer
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
        """Those behind the answer's next text, reasoning or call. Those before it are behind none."""
        whole = b"".join(spelled for _, spelled in self.waiting)
        text = added.encode("utf-8", "replace")
        begin = whole.find(text)
        if begin < 0:  # a call that was rewritten, or bytes that are no characters: all that there is
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
