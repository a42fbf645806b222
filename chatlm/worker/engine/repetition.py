"""Whether an answer goes round in circles: it ends with the same run of tokens again and again."""

from __future__ import annotations

from array import array


ROUNDS = 4
LEAST = 192          # tokens that are a repetition at least: a table may have ten equal rows
SHORT_RUN = 8        # fewer tokens must repeat twice as long: code may have a hundred zeros
LONGEST_RUN = 512    # tokens; longer runs are not looked for
SEEN = 24            # a run is found by when the last so many tokens occurred before


class RepetitionFinder:
    """Reads an answer token by token, and says when it only repeats itself: when it ends with the same run of
    tokens at least ROUNDS times, with LEAST tokens in all. Code, tables, lists and refrains repeat less than
    that, or vary."""

    def __init__(self):
        self.tokens = array("I")

    def push(self, token: int) -> bool:
        """Does the answer only repeat itself with this token? Takes 3 us."""
        self.tokens.append(token)
        if len(self.tokens) >= 2 * ROUNDS * LONGEST_RUN:
            del self.tokens[:-ROUNDS * LONGEST_RUN]
        return len(self.tokens) >= LEAST and self._is_repeated()

    def _is_repeated(self) -> bool:
        tokens = self.tokens
        count = len(self.tokens)
        text = tokens.tobytes()
        size = tokens.itemsize
        last = text[-SEEN * size:]
        end = len(text) - size  # an earlier occurrence of the last tokens ends here at the latest
        while (start := text.rfind(last, 0, end)) >= 0 and start % size:
            end = start + len(last) - 1  # that one began within a token
        if start < 0:
            return False
        run = count - SEEN - start // size
        repeated = max(run * ROUNDS, LEAST if run >= SHORT_RUN else 2 * LEAST)
        return run <= LONGEST_RUN and repeated <= count and (
            tokens[count - repeated:count - run] == tokens[count - repeated + run:])
