"""HTML becomes Markdown: headings, lists, tables, code, forms, equations; without links and pictures."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from chatlm.front.documents import scripts
from chatlm.front.documents.document import Document, Reading, library
from chatlm.front.documents.equations import line_of
from chatlm.front.documents.tables import INNER_TABLE, Cell, Copies, number_in, table_lines
from chatlm.front.documents.texts import html_of_bytes

# stand around the parts of tables while these are converted; no text has them
CELL, SIZE, ROW = "\ue0f1", "\ue0f2", "\ue0f3"
MARKS = re.compile(f"[{CELL}{SIZE}{ROW}]")
UNSEEN = "script", "style", "noscript", "template", "head", "title"
UNSEEN_FIELDS = "hidden", "password", "image", "submit", "button", "reset", "file"
MOST_SPACE = 100  # characters of space beside each other: the library takes a time in their square
# what browsers show in lines of its own, and the library does not
BLOCKS = ("aside", "center", "details", "dialog", "fieldset", "figure", "footer", "form", "header", "hgroup",
          "legend", "main", "menu", "nav", "optgroup", "search", "summary")
LONG_SPACE = re.compile(r"\s{%d,}" % (MOST_SPACE + 1))
MOST_INNER = 200     # tables in cells of others that keep their headings, in a document
LONGEST_VALUE = 200  # characters; a longer text in a table of tables is no value, but a part of a page
LARGEST_SPAN = 1000  # columns that a cell may take, as in browsers


def read_html(data: bytes, reading: Reading) -> Document:
    return Document([to_markdown(html_of_bytes(data), reading)])


def to_markdown(html: str, reading: Reading, place: str = "") -> str:
    """HTML as Markdown. place: where in its document it is."""
    parse = library("bs4", "HTML").BeautifulSoup
    html = MARKS.sub("", re.sub(r"^\s*<\?xml[^>]*>", "", html))
    soup = without_hidden(parse(html, "lxml"))
    whole = without_hidden(parse(html, "html.parser"))
    if len(soup.get_text()) < 0.9 * len(whole.get_text()):  # lxml stops where elements nest 256 times
        soup = whole
    if pictures := sum(map(is_picture, soup(["img", "canvas"]))):
        reading.lacks("picture", place, pictures)
    copies = Copies()
    try:
        text = converter()(copies).convert_soup(soup)
    except RecursionError:  # thousands of elements within each other
        text = soup.get_text("\n")
    if copies.room < 0:
        reading.lacks("merged", place)
    return re.sub(r"\n{3,}", "\n\n", MARKS.sub(" ", text))


def is_picture(element: Any) -> bool:
    """Is an element a picture that a reader of the page sees? Some only count who reads it."""
    return not {str(element.get(side, "")).strip() for side in ("width", "height")} & {"0", "1"}


def without_hidden(soup: Any) -> Any:
    """A document without what its reader does not see."""
    for hidden in soup(list(UNSEEN)):
        hidden.decompose()
    for text in soup(string=True):
        if text.__class__.__name__ not in ("NavigableString", "CData"):
            text.extract()  # a comment, a declaration
        elif LONG_SPACE.search(text):
            text.replace_with(LONG_SPACE.sub(lambda space: space[0][:MOST_SPACE], text))
    moved = 0
    for table in soup("table"):
        if not table.find("table"):
            continue
        if moved < MOST_INNER and has_values(table):
            moved += put_inner_below(table)
        else:  # it only lays out what is in it
            for part in (table, *rows_and_cells(table)):
                part.name = "div"
    return soup


def has_values(table: Any) -> bool:
    """Has a table with tables in its cells values of its own, in rows and columns?"""
    cells = [each for each in rows_and_cells(table) if each.name in ("td", "th")]
    values = [text for cell in cells if not cell.find("table") and (text := cell.get_text(" ", strip=True))]
    rows = [row for row in rows_and_cells(table)
            if row.name == "tr" and len(row(["td", "th"], recursive=False)) > 1]
    return len(rows) > 1 and 2 * len(values) > len(cells) and max(map(len, values)) <= LONGEST_VALUE


def put_inner_below(table: Any) -> int:
    """Put the tables in a table's cells below it, so that each keeps its headings. Returns how many they
    are."""
    waiting = [table]
    found = []
    while waiting:
        element = waiting.pop()
        if element.name == "table" and element is not table:
            found.append(element)
        else:
            waiting += [child for child in reversed(element.contents) if hasattr(child, "contents")]
    last = table
    for inner in found:
        inner.replace_with(INNER_TABLE)
        last.insert_after(inner)
        last = inner
    return len(found)


def entered(field: Any) -> str:
    """What a field of a form shows: what was put in, the sign of a box, or the chosen options of a list (all
    if none is)."""
    if field.name == "textarea":
        return field.get_text()
    if field.name == "select":
        options = field("option", selected=True) or field("option")
        return ", ".join(option.get_text(" ", strip=True) for option in options)
    kind = str(field.get("type", "text")).lower()
    if kind in ("checkbox", "radio"):
        return "[x]" if field.has_attr("checked") else "[ ]"
    return "" if kind in UNSEEN_FIELDS else str(field.get("value", ""))


def rows_and_cells(table: Any) -> list[Any]:
    """The elements of a table itself, without those of tables in it."""
    found = []
    groups = [table]
    while groups:
        for child in groups.pop().find_all(["thead", "tbody", "tfoot", "tr", "td", "th"], recursive=False):
            found.append(child)
            groups.append(child)
    return found


def equation_text(equation: Any) -> str:
    etree = library("lxml.etree", "HTML")
    root = etree.fromstring(str(equation), etree.XMLParser(
        recover=True, resolve_entities=False, no_network=True, load_dtd=False))
    return equation.get_text(" ", strip=True) if root is None else line_of(root)


@cache
def converter() -> Any:
    """The class that converts a document. It is made once the library is here."""
    markdownify = library("markdownify", "HTML")

    class Converter(markdownify.MarkdownConverter):
        def __init__(self, copies: Copies):
            super().__init__(strip=["a", "img"], heading_style="ATX", escape_asterisks=False,
                             escape_underscores=False, escape_misc=False)
            self.copies = copies

        def convert_sup(self, el: Any, text: str, parent_tags: Any) -> str:
            return scripts.raised(text, beside(el, "next_sibling"))

        def convert_sub(self, el: Any, text: str, parent_tags: Any) -> str:
            return scripts.lowered(text, beside(el, "previous_sibling"), beside(el, "next_sibling"))

        def convert_math(self, el: Any, text: str, parent_tags: Any) -> str:
            return equation_text(el)

        def convert_svg(self, el: Any, text: str, parent_tags: Any) -> str:
            return apart(el, " ".join(each.get_text(" ", strip=True) for each in el("text")))

        def convert_input(self, el: Any, text: str, parent_tags: Any) -> str:
            return apart(el, entered(el))

        convert_select = convert_input
        convert_textarea = convert_input

        def convert_button(self, el: Any, text: str, parent_tags: Any) -> str:
            return apart(el, text)

        convert_label = convert_progress = convert_meter = convert_button

        def convert_td(self, el: Any, text: str, parent_tags: Any) -> str:
            columns, rows = span(el, "colspan"), span(el, "rowspan")
            return f"{CELL}{text.strip()}{SIZE}{columns}{SIZE}{rows}{CELL}"

        convert_th = convert_td

        def convert_tr(self, el: Any, text: str, parent_tags: Any) -> str:
            return f"{ROW}{text}{ROW}"

        def convert_table(self, el: Any, text: str, parent_tags: Any) -> str:
            parts = text.split(ROW)
            lines = table_lines(map(cells_in, parts[1::2]), self.copies)
            beside_rows = " ".join(" ".join(parts[::2]).split())  # a caption
            return "\n\n" + "\n".join([*([beside_rows + "\n"] if beside_rows else []), *lines]) + "\n\n"

        def convert_address(self, el: Any, text: str, parent_tags: Any) -> str:
            return self.convert_div(el, text, parent_tags)

    for name in BLOCKS:
        setattr(Converter, f"convert_{name}", Converter.convert_address)
    return Converter


def cells_in(row: str) -> list[Cell]:
    """The cells of a row, as the converter has marked them."""
    cells = []
    for part in row.split(CELL)[1::2]:
        text, columns, rows = (*part.split(SIZE), "1", "1")[:3]
        cells.append(Cell(text, int(columns), int(rows)))
    return cells


def span(cell: Any, name: str) -> int:
    """How many columns or rows a cell takes."""
    return number_in(str(cell.get(name, "1")).strip(), LARGEST_SPAN)


def apart(element: Any, text: str) -> str:
    """A text apart from what stands beside its element."""
    before, after = ("" if beside(element, side).isspace() else " "
                     for side in ("previous_sibling", "next_sibling"))
    return before + text + after if text else ""


def beside(element: Any, side: str) -> str:
    """The text beside an element."""
    neighbour = getattr(element, side)
    if neighbour is None:
        return ""
    text = neighbour.get_text()
    return text[:1] if side == "next_sibling" else text[-1:]
