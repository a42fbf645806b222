"""Few modules of tests that call each of some functions, by the record (.ci/executed): for `.ci/run changed`."""

import heapq
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from executed import Executed, spine

Function = tuple[str, str]          # (file, qualified name)
Worth = Callable[[Function, str], float]
# Measured with faults of bench/planted.py in functions that many modules call: the room's own modules notice most, then those that call little else.
# What has the file's name is about it: a fault of drafts.py was missed by eight modules of the engine, and test_drafts.py was not among them.
# What imports the file by its name is about it too: of 43 modules that call what writes the usage, only one looks at what was written, and imports the writer.
OWN_ROOM = 6
OWN_NAME = 50
IMPORTS = 10
CALLERS = 8         # modules of tests for each function that changed
# of them first, those that have its name or its texts: eight tests of kernels call what says "re-quantized from" in passing, one of weights reads it
WITH_WORDS = 3
MOST_TIMES = 5      # that a word counts in a module
CALLED = 2          # modules for each function that a changed line calls
MENTION_SECONDS = 240.0     # of one process, by the record: for functions that only mention what changed
BROAD_SECONDS = 900.0               # of one process, by the record: for what all tests read


def room_of_tests(root: Path, path: str) -> str:
    """The nearest folder of tests with the name of a file's room."""
    place = Path("tests", *Path(path).parent.parts[1:])
    while not (root / place).is_dir():
        place = place.parent
    return str(place)


def is_named_after(module: str, path: str) -> bool:
    """Is a module of tests called like a file of the program? test_drafts.py and test_draft_model.py are like drafts.py."""
    return Path(module).stem.removeprefix("test_").startswith(Path(path).stem.removesuffix("s"))


def named_files(text: str) -> set[str]:
    """The dotted names of the program in a module of tests: what it imports, whole or by the name of its folder, and what it patches."""
    names = {".".join(name.split(".")[:end]) for name in set(re.findall(r"\bchatlm(?:\.\w+)+", text)) for end in range(2, name.count(".") + 2)}
    for folder, imported in re.findall(r"\b(chatlm(?:\.\w+)*) import ([^\n]*)", text):
        names |= {f"{folder}.{name}" for name in re.findall(r"\w+", imported)}
    return names


class Cover:
    """Chooses modules until each function is called by as many of them as it needs (or by all that call it).

    A module's worth is, over the functions that still need one, how likely its tests notice a fault there, for the time that they take.
    """

    def __init__(self, root: Path, record: dict[str, Executed]) -> None:
        self.root, self.record = root, record
        self.callers: dict[Function, list[str]] = defaultdict(list)
        for module, executed in record.items():
            for function in executed.functions:
                self.callers[function].append(module)
        self.rooms: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.named: dict[str, set[str]] = {}                    # see named_files
        self.words: dict[Function, dict[str, float]] = {}       # of functions that changed: what a test of them would have, and how much that says

    def worth(self, function: Function, module: str) -> float:
        path = function[0]
        if path not in self.rooms:
            self.rooms[path] = room_of_tests(self.root, path)
        executed = self.record[module]
        own = OWN_ROOM if str(Path(module).parent) == self.rooms[path] else 1
        if is_named_after(module, path):
            own *= OWN_NAME
        elif path.removesuffix(".py").replace("/", ".") in self.named_by(module):
            own *= IMPORTS
        return own / (len(executed.functions) + 50) / max(executed.seconds, 0.3) ** 0.5

    def named_by(self, module: str) -> set[str]:
        if module not in self.named:
            self.named[module] = named_files(self.text_of(module))
        return self.named[module]

    def text_of(self, module: str) -> str:
        if module not in self.texts:
            self.texts[module] = (self.root / module).read_text()
        return self.texts[module]

    def worth_by_words(self, function: Function, module: str) -> float:
        text = self.text_of(module)
        return self.worth(function, module) * sum(weight * min(text.count(word), MOST_TIMES) for word, weight in self.words.get(function, {}).items())

    def choose(self, needs: dict[Function, int], chosen: Iterable[str] = (), seconds: float = float("inf"), worth: Worth | None = None) -> list[str]:
        """The modules besides those that are chosen already, the worthiest first, as long as they take no more seconds together."""
        worth = worth or self.worth
        missing = {function: min(need, len(self.callers.get(function, ()))) for function, need in needs.items()}
        worths: dict[str, dict[Function, float]] = defaultdict(dict)
        for function in needs:
            for module in self.callers.get(function, ()):
                worths[module][function] = worth(function, module)

        def left(module: str) -> float:
            return sum(worth for function, worth in worths[module].items() if missing[function] > 0)

        def take(module: str) -> None:
            for function in worths[module]:
                missing[function] -= 1
        for module in chosen:
            take(module)
        found: list[str] = []
        queue = [(-left(module), module) for module in worths if module not in chosen]
        heapq.heapify(queue)
        while queue:
            _, module = heapq.heappop(queue)
            today = left(module)
            if not today:
                continue
            if queue and today < -queue[0][0]:                  # what was taken since has made it worth less
                heapq.heappush(queue, (-today, module))
            elif self.record[module].seconds <= seconds:
                seconds -= self.record[module].seconds
                found.append(module)
                take(module)
        return found

    def broad(self, seconds: float = BROAD_SECONDS) -> list[str]:
        """The spine's modules, and those that call the most functions besides, in so many seconds together."""
        chosen = [module for module in dict.fromkeys(place.partition("::")[0] for place in spine(self.root)) if module in self.record]
        for count in range(1, CALLERS + 1):                             # what is called once by now may be called by one more module
            left = seconds - sum(self.record[module].seconds for module in chosen)
            chosen += self.choose(dict.fromkeys(self.callers, count), chosen, left, self.shortness)
        return chosen

    def shortness(self, _: Function, module: str) -> float:
        return 1 / max(self.record[module].seconds, 0.3)
