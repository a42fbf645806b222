"""Of a file that its embedder does not read, the store, the log and the page say so, and name one that does."""

import json
from pathlib import Path

import pytest
from chatlm.front.annexes.knowledge.languages import is_mostly_foreign, unread_language
from embedding_pool import knowing

PAIRS = json.loads((Path(__file__).resolve().parents[4] / "bench" / "ten_languages.json").read_text(encoding="utf-8"))
PROSE = "The harbour master keeps a list of all the boats that are moored here, and it is read by the insurer. "
CODE = "def add(first, second):\n    return first + second\n\nfor number in range(10):\n    print(add(number, 1))\n" * 4
TABLE = "| Jan | Feb |\n| 12 | 13 |\n" * 40


@pytest.mark.parametrize("language", PAIRS)
def test_ten_languages_are_told_from_english(language):
    assert is_mostly_foreign("\n".join(text for pair in PAIRS[language] for text in pair))


@pytest.mark.parametrize("text", [PROSE * 3, CODE, TABLE, "Straße", "", PROSE * 3 + "Der Hausmeister leert die Kästen im Keller und im Hof."])
def test_english_code_tables_and_short_texts_are_not_foreign(text):
    assert not is_mostly_foreign(text)


def test_a_long_text_is_judged_by_all_of_it():
    german = "\n".join(pair[0] for pair in PAIRS["German"]) * 200
    assert is_mostly_foreign(PROSE * 20 + german) and not is_mostly_foreign(german[:2000] + PROSE * 5000)


def test_only_an_english_embedder_is_warned_of():
    german = "\n".join(pair[0] for pair in PAIRS["German"])
    said = unread_language(german, "all-MiniLM-L6-v2")
    assert "not in English" in said and "--embedder multilingual-e5-small (91 MB)" in said
    assert unread_language(german, "multilingual-e5-small-Q4_0") == unread_language(PROSE * 9, "all-MiniLM-L6-v2") == ""
    assert unread_language(german, "bge-small-en-v1.5") and not unread_language(german, "bge-m3")


async def test_a_store_says_which_files_its_embedder_does_not_read(tmp_path, monkeypatch, caplog):
    async with knowing(tmp_path / "k.db") as ask:
        served = ask.ingest.embedders.choose().served
        monkeypatch.setattr(type(served), "name", "all-MiniLM-L6-v2")
        texts = ["\n".join(pair[0] for pair in PAIRS["German"]), PROSE * 3]
        store, files = await ask.store("a" * 22, *texts)
        german, english = [(await ask("a" * 22, f"/v1/vector_stores/{store}/files/{file}"))[1]["cut"] for file in files]
        assert "not in English" in german and english is None
        assert any("not in English" in record.message and files[0] in record.message for record in caplog.records)
