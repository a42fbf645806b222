"""The values of documents that other programs have written arrive, apart from their neighbours and below their headings;
what cannot arrive is named in `cut`."""

import re

import documents
import pytest
from chatlm.front.documents.extract import extract_text

for module in ("pypdfium2", "mammoth", "markdownify", "openpyxl", "pptx"):
    pytest.importorskip(module)

WRITTEN = documents.written()


def lost(name):
    """(values, cells) of a document that do not arrive."""
    facts, text = WRITTEN[name], extract_text(documents.written_bytes(name), name, 30).text
    return ([value for value in facts["values"] if not documents.stands_apart(value, text)],
            [cell for cell in facts["cells"] if not documents.stands_below(*cell, text)])


@pytest.mark.parametrize("name", WRITTEN)
def test_every_value_arrives_below_its_heading(name):
    assert lost(name) == ([], [])


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_missing_is_named(name):
    """By kind, number and place; where nothing is missing, nothing is said."""
    cut, missing = extract_text(documents.written_bytes(name), name, 30).cut, WRITTEN[name]["missing"]
    assert re.search(missing, cut) if missing else cut is None


def test_the_corpus_is_of_ten_writers_and_four_kinds():
    assert {facts["writer"].split()[0] for facts in WRITTEN.values()} == {"reportlab", "fpdf2", "openpyxl", "xlsxwriter", "python-docx", "python-pptx", "by", "libreoffice", "chromium"}
    assert {facts["kind"] for facts in WRITTEN.values()} == {"table", "note", "form", "book"}
    assert sum(len(facts["values"]) + len(facts["cells"]) for facts in WRITTEN.values()) > 150
