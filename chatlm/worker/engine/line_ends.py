"""Where llama-server's `n_indent` and `t_max_predict_ms` end an answer that fills a gap in code."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal


class LineEnds:
    """Ends an answer at a line that is indented too little, or at a new line once it has taken too long.

    The first line only continues what is before the gap, so its indentation does not count. An empty line is
    indented by nothing. Source: `process_token` in llama.cpp's server. It looks at a line one or two tokens
    later, so it counts and streams these tokens; the text of its whole answer is the same."""

    def __init__(self, indent: int, limit_ms: int, clock: Callable[[], float] = time.monotonic):
        """indent: fewest spaces and tabs before a line; limit_ms: since the first token. 0: no limit."""
        self.indent = indent
        self.limit_ms = limit_ms
        self.clock = clock
        self.began_s: float | None = None   # when the first token of this worker came
        self.indented: int | None = None    # spaces and tabs of a line that has nothing else yet
        self.ended_by: Literal["n_indent", "t_max_predict_ms"] | None = None

    def resume(self):
        """The text so far is an earlier worker's: its time was not measured here."""
        self.began_s = None
        if self.ended_by == "t_max_predict_ms":
            self.ended_by = None

    def push(self, text: str) -> str:
        """What of a token's text belongs to the answer."""
        if self.ended_by == "n_indent":
            return ""
        now_s = self.clock()
        if self.began_s is None:
            self.began_s = now_s
        place = self.too_little(text) if self.indent else None
        if place is not None:
            self.ended_by = "n_indent"
            return text[:place]
        if self.limit_ms and "\n" in text and (now_s - self.began_s) * 1e3 > self.limit_ms:
            self.ended_by = "t_max_predict_ms"
        return text

    def too_little(self, text: str) -> int | None:
        """Where in it the first character stands that is indented too little."""
        for place, letter in enumerate(text):
            if self.indented is not None and letter in " \t":
                self.indented += 1
                continue
            if self.indented is not None and self.indented < self.indent:
                return place
            self.indented = 0 if letter == "\n" else None
        return None
