"""Numbers in texts that cite passages, in pieces of any size."""

import random

import pytest

from chatlm.front.api.citations import Citations, citations_in

SOURCES = tuple({"type": "file_citation", "file_id": f"file-{number}"} for number in (1, 2, 3))


@pytest.mark.parametrize("text, wanted", [
    ("A cat [2].", [(6, 2)]), ("[1][3]", [(0, 1), (3, 3)]), ("[4] [0] [01] [-1] [] [1", []),
    ("[[1]]", [(1, 1)]), ("[12345] [1, 2]", []), ("é\U0001f600[1]", [(2, 1)])])
def test_only_what_was_given_is_cited(text, wanted):
    found = citations_in(text, SOURCES).get("annotations", [])
    assert [(each["index"], each["passage"]) for each in found] == wanted
    assert all(each["file_id"] == f"file-{each['passage']}" for each in found)


def test_pieces_cite_what_the_whole_does():
    chance = random.Random(1)
    for _ in range(500):
        text = "".join(chance.choices("[]1234x ", k=30))
        citations, left = Citations(SOURCES), text
        while left:
            size = chance.randint(1, 4)
            citations.add(left[:size])
            left = left[size:]
        assert citations.member() == citations_in(text, SOURCES)
