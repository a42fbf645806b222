"""What a Scheduler decides under random traffic is what it decided when `decisions.txt` was recorded.

Each line of that file has the digest of one traffic: the plan, the order of both queues, the tables, the free pages and the states after each
of its steps; and how many answers lost their pages to others. Who means to change a decision records them anew, and says why in the commit:
RECORD_DECISIONS=1 pytest -m '' tests/worker/engine/test_decisions.py"""

import os
import time
from pathlib import Path

import pytest

from decisions import STEPS, Clock, Traffic
from nightly import by_day

GOLDEN = Path(__file__).with_name("decisions.txt")
BY_DAY = (0, 12), (27, 30)       # traffics; of the second some answers lose pages to others
BY_NIGHT, PART = 900, 145
PARTS = [(0, 12), (12, 27), (27, 30), *((first, first + PART) for first in range(30, BY_NIGHT, PART))]


@pytest.fixture
def play(monkeypatch):
    """A function that plays a traffic -> its line."""
    def play(seed):
        clock = Clock()
        monkeypatch.setattr(time, "monotonic", clock)
        traffic = Traffic(seed, clock)
        digests = traffic.run()
        monkeypatch.undo()
        assert len(digests) == STEPS
        return f"{seed} {digests[-1]} {traffic.preempted_answers}"

    return play


def recorded():
    return GOLDEN.read_text().splitlines()


@pytest.mark.parametrize("first, end", by_day(PARTS, *BY_DAY))
def test_the_scheduler_decides_as_recorded(play, first, end):
    lines = [play(seed) for seed in range(first, end)]
    if os.environ.get("RECORD_DECISIONS"):
        known = recorded() if GOLDEN.exists() else []
        GOLDEN.write_text("\n".join([*known[:first], *lines, *known[end:]]) + "\n")
    differing = [line for line, expected in zip(lines, recorded()[first:end], strict=True) if line != expected]
    assert not differing, f"{len(differing)} of {end - first} traffics; the first: {differing[0]}"


def test_recorded_answers_lose_pages_to_others():
    """Only few pages and long answers reach this."""
    lost = [int(line.split()[2]) for line in recorded()]
    assert sum(count > 0 for part in BY_DAY for count in lost[slice(*part)]) > 3 and sum(count > 0 for count in lost) > 100
