"""Parts of the tests, as later features would be: one reads hidden states, one changes a step's input."""

from chatlm.common.messages.requests import PartSays
from chatlm.worker.engine.part import EnginePart
from chatlm.worker.parts import PartRow


class Lens(EnginePart):
    """Says how large the hidden states were that led to an answer's tokens, if its request names a token of
    interest."""

    MOST = 1  # such tokens

    def __init__(self, transformer):
        self.transformer = transformer
        self.sizes = {}    # sequence -> position -> size, of those not sent yet
        self.ended = []    # ids of answers

    def comes(self, sequence):
        interesting = sequence.work.params.logprob_ids
        if len(interesting) > self.MOST:
            return f"the lens looks at {self.MOST} token, not {len(interesting)}"
        if interesting:
            self.sizes[sequence] = {}
        return ""

    def wants_hidden(self, sequence):
        return sequence in self.sizes

    def read_hidden(self, sequence, first, count, rows):
        if sequence in self.sizes:
            known = len(sequence.tokens) - 1    # what follows in the rows was drafted, and is wrong
            for position, row in enumerate(rows[:known - first], first):
                self.sizes[sequence][position] = float(abs(row).sum())

    def adds(self, sequence):
        if not self.sizes.get(sequence):
            return ()
        said = PartSays("lens", sorted(self.sizes[sequence].items()))
        self.sizes[sequence] = {}
        return [said]

    def ends(self, sequence):
        self.ended.append(sequence.work.id)
        self.sizes.pop(sequence, None)

    def forget(self):
        self.sizes = {sequence: {} for sequence in self.sizes}


LENS = PartRow("lens", lambda making: Lens(making.transformer))


class Counter(EnginePart):
    """The toy annex's part: it says how many tokens an answer has by now."""

    def __init__(self):
        self.asked = {}

    def comes(self, sequence):
        asked = sequence.work.params.parts.get("counter")
        if asked and asked["toy"] == "uncounted":
            return "the counter does not count this"
        if asked:
            self.asked[sequence] = asked
        return ""

    def adds(self, sequence):
        if sequence not in self.asked:
            return ()
        return [PartSays("counter", [self.asked[sequence]["toy"], sequence.generated])]

    def ends(self, sequence):
        self.asked.pop(sequence, None)


COUNTER = PartRow("counter", lambda making: Counter())


class Steering(EnginePart):
    """Where the answers with stop tokens begin a step, it notes what was under way."""

    def __init__(self):
        self.noted = []
        self.engine = None

    def changes_input(self, chunks):
        return any(chunk.sequence.work.params.stop_token_ids for chunk in chunks)

    def change_input(self, chunks):
        self.noted.append((len(self.engine.under_way), sum(chunk.count for chunk in chunks)))


STEERING = PartRow("steering", lambda making: Steering())
