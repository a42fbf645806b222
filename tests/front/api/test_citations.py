"""Numbers in texts that cite passages, in pieces of any size."""

import random

import pytest

from chatlm.front.api.citations import Citations, citations_in

SOURCES = tuple({"type": "file_citation", "file_id": f"file-{number}"} for number in (1, 2, 3))


@pytest.mark.parametrize("text, wanted", [
    ("A cat [2].", [(6, 2)]), ("[1][3]", [(0, 1), (3, 3)]), ("[4] [0] [01] [-1] [] [1", []),
    ("[[1]]", [(1, 1)]), ("[12345]", []), ("é\U0001f600[1]", [(2, 1)]),
    ("Cats [1, 3] and [2;3].", [(5, 1), (5, 3), (16, 2), (16, 3)]), ("[1,2] [1 , 2] [1,  2] [1, 9] [0, 1] [1,] [,1]", [(0, 1), (0, 2)]),
    ("see `rows[1]` and ``a`[2]`` [3]", [(28, 3)]), ("a ` b [1]\nc ` d [2]", [(6, 1), (16, 2)]), ("```\nrows[1]\n```\n[2]", [(16, 2)]),
    ("```py\n[1]\n``\n~~~\n[1]\n``` x\n[1]\n  ````\n[2]", [(38, 2)]), ("~~~\n[1]\n```\n[1]\n~~~\n[2]", [(20, 2)]), ("```rows[1]``` [2]", [(14, 2)]),
    ("text ``` [1]\n[2]", [(9, 1), (13, 2)]), ("```\n[1]", []), ("\u0060[1]", [(1, 1)]), ("~~[1]~~ a ~~~ [2]", [(2, 1), (14, 2)])])
def test_only_what_was_given_is_cited(text, wanted):
    found = citations_in(text, SOURCES).get("annotations", [])
    assert [(each["index"], each["passage"]) for each in found] == wanted
    assert all(each["file_id"] == f"file-{each['passage']}" for each in found)


def test_pieces_cite_what_the_whole_does():
    chance = random.Random(1)
    for _ in range(500):
        text = "".join(chance.choices("[]1234x ,`~\n", k=60)) if chance.random() < 0.7 else "".join(chance.choices(["```", "~~~", "`", "[1]", "[1, 2]", " ", "\n", "x"], k=30))
        citations, left = Citations(SOURCES), text
        while left:
            size = chance.randint(1, 4)
            citations.add(left[:size])
            left = left[size:]
        assert citations.member() == citations_in(text, SOURCES)
