"""What the sandbox reads out of documents, format by format, and what it refuses."""

import pytest

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.front.documents.document import Document, Reading
from chatlm.front.documents.extract import extract_text, join_parts
from chatlm.front.documents.forms import part_of_form

import documents

for module in ("pypdfium2", "mammoth", "markdownify", "openpyxl", "pptx"):
    pytest.importorskip(module)


def text_of(data, name=""):
    return extract_text(data, name, 20)


def refused(data, name=""):
    with pytest.raises(RequestError) as caught:
        text_of(data, name)
    return str(caught.value)


# formats

def test_pages_of_a_pdf_are_numbered():
    """Those without text are named."""
    assert text_of(documents.pdf(["Hello world\nsecond (line)", "", "Gr\xfc\xdfe \u2013 \u201cquoted\u201d"])) == (
        "[page 1]\nHello world\nsecond (line)\n\n[page 3]\nGr\xfc\xdfe \u2013 \u201cquoted\u201d", 3, "no text on page 2, which may be pictures")
    assert text_of(documents.pdf(["alone"])) == ("alone", 1, None)


def test_a_docx_becomes_markdown():
    """It has its headings, lists and tables."""
    assert text_of(documents.docx()) == ("# A title\n\nSome text.", None, None)
    cell = "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc>"
    table = "<w:tbl>" + "".join("<w:tr>" + "".join(cell.format(f"{row}{column}") for column in "ab") + "</w:tr>" for row in (1, 2)) + "</w:tbl>"
    text = text_of(documents.docx("<w:p><w:r><w:t>before</w:t></w:r></w:p>" + table)).text
    assert text.startswith("before") and "| 1a | 1b |" in text and "| 2a | 2b |" in text


def test_slides_have_their_texts_tables_and_notes():
    assert text_of(documents.pptx([("First", "one\ntwo", "remember"), ("Second", "three", "")])) == (
        "[slide 1]\nFirst\n\none\ntwo\n\nNotes: remember\n\n[slide 2]\nSecond\n\nthree", 2, None)


def test_sheets_are_rows_of_cells():
    """Hidden ones are said to be left out."""
    text, pages, cut = text_of(documents.xlsx({"Prices": [["name", "price"], ["tea | green", 2.5], [None, None], ["", True]], "Secret": [["x"]]}, ["Secret"]))
    assert text == "# Prices\n| name | price |\n| tea \\| green | 2.5 |\n|  | True |" and pages == 1
    assert cut == "1 hidden sheet (Secret)"


def test_an_epub_s_chapters_come_in_spine_order():
    chapters = {"two%20words.xhtml": "<html><head><title>no</title></head><body><h2>One</h2><p>a <a href='x'>link</a></p></body></html>", "b.xhtml": "<p>zwei \xe4</p>"}
    data = documents.epub(chapters, **{"book/two words.xhtml": chapters["two%20words.xhtml"]})
    assert text_of(data) == ("## One\n\na link\n\nzwei \xe4", 2, None)


@pytest.mark.parametrize("data, name", [
    (b"<!DOCTYPE html><title>t</title><script>alert(1)</script><p>Caf\xc3\xa9<style>p{}</style>", ""), (b"\xef\xbb\xbf \n<html><p>Caf\xc3\xa9", ""),
    (b"<?xml version='1.0'?><!-- c --><html><p>Caf\xc3\xa9</p></html>", "x"), (b"<p>Caf\xc3\xa9</p>", "page.HTM"),
    (b"<html><meta charset=iso-8859-1><p>Caf\xe9", ""), ("<html><p>Caf\xe9".encode("utf-16"), "x.html")])
def test_html_is_known_by_beginning_or_name(data, name):
    assert text_of(data, name).text == "Caf\xe9"


def test_html_keeps_lists_and_code():
    """What a reader does not see is dropped."""
    html = b"<html><body><ul><li>a<li>b</ul><pre>x = 1\n  y</pre><img src=x alt=picture><template>t</template></body>"
    assert text_of(html).text == "* a\n* b\n\n```\nx = 1\n  y\n```"


# refusals

@pytest.mark.parametrize("data, words", [
    (b" \n ", "the file has no text"), (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PDF, DOCX"), (b"\0" * 100, "none of the formats"),
    (documents.ENCRYPTED_PDF, "PDF is encrypted"), (b"%PDF-1.7\ngarbage", "PDF is damaged"), (b"%PDF-", "PDF is damaged"),
    (documents.pdf(["", ""]), "has no text: its 2 pages may be pictures"), (documents.pdf(["text"])[:200], "damaged"),
    (b"PK\3\4 no archive", "damaged"), (documents.archive({"a.txt": "b"}), "none of the formats"),
    (documents.docx()[:300], "damaged"), (documents.docx("<w:p>"), "DOCX file is damaged"), (documents.docx("<w:p/>"), "DOCX file has no text"),
    (documents.epub({}), "EPUB file has no text"), (documents.archive({"META-INF/container.xml": "<a/>"}), "EPUB file is damaged"),
    (documents.archive({"[Content_Types].xml": "", "ppt/x": ""}), "PPTX file is damaged"),
    (documents.archive({"[Content_Types].xml": "", "xl/x": ""}), "XLSX file is damaged"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100), "old Office formats"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le"), "is encrypted"),
    (documents.epub({"a.xhtml": "<p>x"}, **{"META-INF/encryption.xml": '<e><C xmlns="y" URI="book/a.xhtml"/></e>'}), "copy protection")])
def test_an_unreadable_document_is_refused_in_a_line(data, words):
    said = refused(data)
    assert words in said and "\n" not in said and len(said) < 400


def test_fonts_of_a_book_may_be_encrypted():
    assert text_of(documents.epub({"a.xhtml": "<p>x"}, **{"META-INF/encryption.xml": '<e><C URI="book/font.otf"/></e>'})).text == "x"


def test_an_archive_bomb_is_refused_unread():
    """It unpacks to more than is allowed."""
    assert "unpacked, the file has more" in refused(documents.docx(**{"word/big.xml": b" " * (257 << 20)}))
    assert "10,000 parts" in refused(documents.archive({f"word/{i}": "" for i in range(10_001)} | {"[Content_Types].xml": ""}, 0))


def test_entities_neither_grow_nor_read_files(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    laughs = "<!DOCTYPE l [<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 10)) + "]>"
    paragraph = "<w:p><w:r><w:t>{}</w:t></w:r></w:p>"
    assert "damaged" in refused(documents.docx(paragraph.format("&a9;"), laughs))
    outside = f"<!DOCTYPE l [<!ENTITY x SYSTEM 'file://{secret}'>]>"
    try:
        assert "secret" not in text_of(documents.docx(paragraph.format("a&x;b"), outside)).text
    except RequestError as error:
        assert "the secret" not in str(error)


def test_thousands_of_nested_elements_are_read():
    assert text_of(b"<html>" + b"<div>" * 20_000 + b"deep").text == "deep"


# limits

def test_text_beyond_the_limit_is_cut():
    """It says so."""
    page = ("x" * 99 + "\n") * 40
    text, pages, cut = text_of(documents.pdf([page] * 300))
    assert len(text) <= LIMITS.extracted_characters and pages == 300
    read = text.count("[page ")
    assert cut == f"only the first 1,048,576 characters, up to page {read} of 300" and f"[page {read}]\nx" in text


def test_reading_ends_at_the_deadline():
    """What is there by then is returned."""
    read = join_parts("PDF", Document(iter("abc"), 3, "page", True), Reading(0))
    assert read == ("[page 1]\na", 3, "only up to page 1 of 3: the rest takes too long to read")
    assert join_parts("PDF", Document(iter("a"), 1, "page"), Reading(0)).cut is None


def test_control_characters_and_surrogates_go():
    """A half of a pair of surrogates is dropped."""
    assert join_parts("HTML", Document(["a\x00b\x1b[31m\ud800\r\nc  \n\u0085d\t e"]), Reading(1e9)).text == "ab[31m\n\nc\nd\t e"


# forms

def test_the_first_file_of_a_form_is_read():
    form = b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\nno\r\n--B\r\nContent-Disposition: form-data; name="file"; filename="a \\"b\\".html"\r\n' \
           b"Content-Type: text/html\r\n\r\n<p>\r\n--\r\nx\r\n--B--\r\n"
    assert part_of_form(form, "B") == (b"<p>\r\n--\r\nx", 'a \\"b\\".html')
    for bad in (b"", b"--B--", form.replace(b"filename", b"name2"), b"--B\r\nfilename=\"a\""):
        with pytest.raises(RequestError, match="the form has no file"):
            part_of_form(bad, "B")


# encodings

@pytest.mark.parametrize("case", documents.encodings(), ids=lambda case: case["name"])
def test_bytes_are_the_text_that_the_page_reads(case):
    """tests/page/test_page_documents.py has the page read the same, tests/front/annexes/knowledge/test_ingestion.py the store."""
    data = bytes.fromhex(case["hex"])
    if case["text"] is None:
        assert "none of the formats" in refused(data, "a.txt")
    else:
        assert text_of(data, "a.txt") == (case["text"], None, None)


@pytest.mark.parametrize("data", [
    "<html><p>Цена 250</p>".encode("utf-16"), "<html><p>Цена 250</p>".encode("utf-8-sig"), b"<html><meta charset=windows-1251><p>" + "Цена 250".encode("cp1251"),
    b"<?xml version='1.0' encoding='koi8-r'?><html><p>" + "Цена 250".encode("koi8-r"), b'<html><meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-5"><p>' + "Цена 250".encode("iso8859-5"),
    "<html><p>Цена 250</p>".encode()])
def test_html_is_read_as_it_declares_itself(data):
    assert text_of(data).text == "Цена 250"


def test_no_other_codec_of_python_is_used_for_html():
    """Such as those that unpack, or that take a time in the square of a text."""
    for label in (b"zip", b"punycode", b"unicode_escape", b"utf-7", b"idna", b"x" * 40):
        assert text_of(b"<html><meta charset=" + label + b"><p>a\\u0041+AGE-").text == "a\\u0041+AGE-"


# tables within tables

INNER = "<table><tr><th>Lot<th>Count<tr><td>L1<td>410</table>"


def test_tables_in_a_table_with_values_follow_it():
    """Each keeps its headings. In a table that only lays out a page, they stay where they are."""
    values = f"<html><table><tr><th>Part<th>Weight<th>Details<tr><td>Bolt<td>12<td>{INNER}<tr><td>Nut<td>7<td>x</table>after"
    assert text_of(values.encode()).text == ("| Part | Weight | Details |\n| --- | --- | --- |\n| Bolt | 12 | (table below) |\n| Nut | 7 | x |\n\n"
                                             "| Lot | Count |\n| --- | --- |\n| L1 | 410 |\n\nafter")
    page = f"<html><table><tr><td>{'Long text of a page. ' * 20}<td>{INNER}<tr><td>{INNER}<td>foot</table>"
    assert text_of(page.encode()).text.count("| Lot | Count |\n| --- | --- |\n| L1 | 410 |") == 2


def test_tables_within_tables_of_office_files_follow_them():
    def cell(text):
        return f"<w:tc>{text if text.startswith('<') else f'<w:p><w:r><w:t>{text}</w:t></w:r></w:p>'}</w:tc>"

    def table(*rows):
        return f"<w:tbl>{''.join('<w:tr>' + ''.join(map(cell, row)) + '</w:tr>' for row in rows)}</w:tbl><w:p/>"

    outer = table(("Part", "Weight", "Details"), ("Bolt", "12", table(("Lot", "Count"), ("L1", "410"))), ("Nut", "7", "x"))
    assert text_of(documents.docx(outer)).text == ("| Part | Weight | Details |\n| --- | --- | --- |\n| Bolt | 12 | (table below) |\n| Nut | 7 | x |\n\n"
                                                   "| Lot | Count |\n| --- | --- |\n| L1 | 410 |")


def test_blocks_of_a_page_stand_in_lines_of_their_own():
    blocks = "".join(f"<{name}>1{number}</{name}>" for number, name in enumerate(("address", "aside", "details", "footer", "form", "summary", "main", "nav"), 10))
    assert text_of(f"<html>{blocks}<button>5</button><button>6</button>".encode()).text.split() == [*map(str, range(110, 118)), "5", "6"]


def test_a_book_of_sheets_that_is_cut_says_how_many_it_has():
    rows = [["x" * 1000] * 10] * 120
    assert text_of(documents.xlsx({"Big": rows, "Next": [[1]]})).cut == "only the first 1,048,576 characters, up to row 105 of 120 in the sheet Big, sheet 1 of 2"
    assert "sheet 1" not in text_of(documents.xlsx({"Big": rows})).cut


# pictures

def test_pictures_are_counted_where_they_are():
    """Signs of one pixel are none."""
    page = '<p>text<img src="a.png"><canvas></canvas><img width=1 height="1" src="counter.gif">'
    assert text_of(f"<html>{page}".encode()).cut == "2 pictures"
    assert text_of(documents.epub({"a.xhtml": "<p>x</p>", "b.xhtml": page})).cut == "2 pictures (chapter 2)"


def test_pictures_on_a_page_of_a_pdf_are_counted():
    """Small ones are not; a page that is a picture is named as one without text."""
    import io
    import pypdfium2
    document, file = pypdfium2.PdfDocument(documents.pdf(["one", "two", ""])), io.BytesIO()
    for page, sides in zip(document, ((), (200, 9), (500,))):
        for side in sides:
            picture = pypdfium2.PdfImage.new(document)
            picture.set_bitmap(pypdfium2.PdfBitmap.new_native(2, 2, pypdfium2.raw.FPDFBitmap_BGR))
            picture.set_matrix(pypdfium2.PdfMatrix().scale(side, side))
            page.insert_obj(picture)
        page.gen_content()
    document.save(file)
    assert text_of(file.getvalue()).cut == "no text on page 3, which may be pictures; 1 picture (page 2)"
