"""PDF: the text of each page, with the fields of its form and the remarks on it."""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Any

from chatlm.front.documents.document import Document, Reading, library, refusal
from chatlm.front.documents.layout import Glyph, text_of_page

SAMPLED = 200        # letters of a page, by which it is turned
STEP = 15            # degrees between the directions of writing that are told apart
EM_BY_BOX = 0.65     # an em of slanted text, by half the sides of the box around one letter
WIDTH_EM = 0.5       # of a slanted letter
FOOT_EM = 0.2        # of a slanted letter, below its line
CHECKED_TYPES = "CHECKBOX", "RADIOBUTTON"
VALUE_TYPES = "TEXTFIELD", "COMBOBOX", "LISTBOX"
REMARKS = ("TEXT", "FREETEXT", "HIGHLIGHT", "UNDERLINE", "STRIKEOUT", "SQUIGGLY", "STAMP", "INK", "CARET",
           "LINE", "SQUARE", "CIRCLE", "POLYGON", "POLYLINE")
HAS_DIGIT = re.compile(r"\d")
NUMBER = re.compile(r"[.,]*(\d(?:[\d.,]*\d)?)[.,]*")
POINT_DIGITS = 0.5  # width of a point, by that of a digit
ROOM_EM = 0.1       # by which a number may be wider than its digits
SPACE = Glyph(" ", 0.0, 0.0, 0.0, 0.0)
BREAK = Glyph("\n", 0.0, 0.0, 0.0, 0.0)  # a space that the file does not draw
VALUE_BYTES = 1 << 16  # of a field or remark that are read
MOST_OBJECTS = 10_000  # of a page, among which pictures are counted
PICTURE_SHARE = 0.01  # of a page, from which on a picture is one
MOST_NOTES = 10_000    # fields and remarks of a page
MOST_LETTERS = 200_000  # of a page whose tables are told from other text


def read_pdf(data: bytes, reading: Reading) -> Document:
    pdfium = library("pypdfium2", "PDF")
    try:
        pdf = pdfium.PdfDocument(data)
        pages = len(pdf)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise refusal("the PDF is encrypted: save it without its password", "encrypted") from None
        raise refusal(f"the PDF is damaged ({str(error)[:100]})") from None
    pdf.init_forms()
    if pdf.get_formtype() in (pdfium.raw.FORMTYPE_XFA_FULL, pdfium.raw.FORMTYPE_XFA_FOREGROUND):
        reading.lacks("form")
    for number in range(pdf.count_attachments()):
        reading.lacks("embedded", pdf.get_attachment(number).get_name())

    def text_of(number: int) -> str:
        try:
            with closing(pdf[number]) as page:
                place = f"page {number + 1:,}"
                text = text_on(pdfium, page, reading, place)
                if text.strip() and (pictures := pictures_on(pdfium.raw, page)):
                    reading.lacks("picture", place, pictures)
                return "\n".join([text, *notes_on(pdfium, pdf, page)])
        except pdfium.PdfiumError:
            return ""

    return Document(map(text_of, range(pages)), pages, "page", True)


def text_on(pdfium: Any, page: Any, reading: Reading, place: str) -> str:
    make_upright(pdfium.raw, page)
    with closing(page.get_textpage()) as text:
        if text.count_chars() > MOST_LETTERS:
            reading.lacks("dense", place)
            return text.get_text_bounded().replace("\r\n", "\n")
        return "\n".join(map(text_of_page, glyphs_of(pdfium.raw, text, page)))


def pictures_on(raw: Any, page: Any) -> int:
    """How many pictures a page has that are no lines, dots or small signs."""
    left, bottom, right, top = page.get_bbox()
    least = PICTURE_SHARE * (right - left) * (top - bottom)
    edges = [ctypes.c_float() for _ in range(4)]
    count = 0
    for number in range(min(raw.FPDFPage_CountObjects(page), MOST_OBJECTS)):
        part = raw.FPDFPage_GetObject(page, number)
        if raw.FPDFPageObj_GetType(part) != raw.FPDF_PAGEOBJ_IMAGE:
            continue
        if raw.FPDFPageObj_GetBounds(part, *map(ctypes.byref, edges)):
            left, bottom, right, top = (edge.value for edge in edges)
            count += (right - left) * (top - bottom) >= least
    return count


def make_upright(raw: Any, page: Any):
    """Turn a page so that most of its text is level. PDFium sorts the texts of a line as the page shows them,
    and mixes lines that it shows upright."""
    with closing(page.get_textpage()) as text:
        letters = range(0, text.count_chars(), max(1, text.count_chars() // SAMPLED))
        directions = Counter(direction_of(raw, text.raw, place) for place in letters
                             if raw.FPDFText_IsGenerated(text.raw, place) == 0)
    for direction, _ in directions.most_common(1):
        if direction % 90 == 0 and direction != page.get_rotation():
            page.set_rotation(direction)


def direction_of(raw: Any, letters: Any, place: int) -> int:
    """The direction in which a letter is written, in degrees from the right, against the clock."""
    angle = raw.FPDFText_GetCharAngle(letters, place)  # with the clock; -1: it is not known
    return round(-math.degrees(angle) / STEP) * STEP % 360 if angle > 0 else 0


def glyphs_of(raw: Any, letters: Any, page: Any) -> list[list[Glyph]]:
    """The letters of a page as it draws them, for each direction of writing; that of most of them comes
    first. Each is turned so that its lines are level, whatever the page says of how it is shown.

    A word or number in which nothing is raised is one glyph: asking for the place of each letter would take
    as long as all else. Spaces and line ends that PDFium has put beside digits, or into turned text, are left
    out: the room between letters tells more."""
    text = letters_of(raw, letters.raw)
    boxes = Boxes(raw, letters.raw, page)
    directions: dict[int, list[Glyph]] = {}
    direction = 0
    for run in re.finditer(r"\s+|\S+", text):
        begin, end = run.span()
        if run[0].isspace():
            generated = all(raw.FPDFText_IsGenerated(letters.raw, place) == 1 for place in range(begin, end))
            beside = text[max(0, begin - 1):begin] + text[end:end + 1]
            if not generated:
                directions.setdefault(direction, []).append(SPACE)
            elif not direction and not HAS_DIGIT.search(beside):
                directions.setdefault(direction, []).append(BREAK)
            continue
        direction = direction_of(raw, letters.raw, begin)
        glyphs = directions.setdefault(direction, [])
        if not HAS_DIGIT.search(run[0]):
            glyphs.append(boxes.glyph(begin, end - 1, run[0], direction))
        elif number := boxes.number(begin, run[0], direction):
            glyphs.append(number)
        else:
            glyphs += (boxes.glyph(place, place, text[place], direction) for place in range(begin, end))
    return sorted(directions.values(), key=len, reverse=True)


def letters_of(raw: Any, page: Any) -> str:
    """A letter for each number that PDFium counts. Letters beyond 0xFFFF have two, and stand in the first."""
    count = raw.FPDFText_CountChars(page)
    units = (ctypes.c_ushort * (count + 1))()
    if raw.FPDFText_GetText(page, 0, count, units) - 1 != count:  # PDFium has left out some that mean nothing
        units[:count] = [min(raw.FPDFText_GetUnicode(page, place), 0xFFFF) for place in range(count)]
    return "".join(map(chr, units[:count]))


class Boxes:
    """The places of letters on a page. Those beyond its edges, which nobody sees, are spaces."""

    def __init__(self, raw: Any, letters: Any, page: Any):
        self.raw = raw
        self.letters = letters
        self.edges = page.get_bbox()  # left, bottom, right, top
        self.box = raw.FS_RECTF()
        self.pointer = ctypes.byref(self.box)
        self.point = ctypes.c_double(), ctypes.c_double()

    def number(self, begin: int, text: str, direction: int) -> Glyph | None:
        """The box of a number; None if this is none, its last digit does not stand as its first does, or
        there is room within it."""
        number = NUMBER.fullmatch(text)
        if not number or direction % 90:
            return None
        first = self.glyph(begin + number.start(1), begin + number.start(1), text, direction)
        last = self.glyph(begin + number.end(1) - 1, begin + number.end(1) - 1, text, direction)
        digits = sum(map(str.isdigit, number[1]))
        width = (first.right - first.left) * (digits + POINT_DIGITS * (len(number[1]) - digits))
        is_close = last.right - first.left - width < ROOM_EM * (first.top - first.bottom)
        if not is_close or first.bottom != last.bottom or first.top != last.top or last.right < first.left:
            return None
        return first._replace(right=last.right)

    def glyph(self, first: int, last: int, text: str, direction: int) -> Glyph:
        """The box around two letters on a line and all between them."""
        left, bottom, right, top = self.box_of(first)
        if last > first:
            last_left, last_bottom, last_right, last_top = self.box_of(last)
            right = max(right, last_right)
            left = min(left, last_left)
            if direction:
                bottom = min(bottom, last_bottom)
                top = max(top, last_top)
        edge_left, edge_bottom, edge_right, edge_top = self.edges
        if not (left < edge_right and right > edge_left and bottom < edge_top and top > edge_bottom):
            return SPACE
        if direction % 90:
            return self.slanted(first, last, text, direction)
        if direction:
            corners = turned(left, bottom, direction), turned(right, top, direction)
            (left, right), (bottom, top) = map(sorted, zip(*corners))
        return Glyph(text, left, right, bottom, top)

    def box_of(self, place: int) -> tuple[float, float, float, float]:
        box = self.box
        self.raw.FPDFText_GetLooseCharBox(self.letters, place, self.pointer)
        return box.left, box.bottom, box.right, box.top

    def slanted(self, first: int, last: int, text: str, direction: int) -> Glyph:
        """The box of letters that are written neither level nor upright, by where they begin on their line:
        PDFium tells only a level box around each."""
        x, y = self.origin(first, direction)
        end, _ = self.origin(last, direction)
        left, bottom, right, top = self.box_of(first)
        angle = math.radians(direction)
        sides = (right - left + top - bottom) / (abs(math.cos(angle)) + abs(math.sin(angle)))
        em = EM_BY_BOX * sides
        return Glyph(text, x, max(x, end) + WIDTH_EM * em, y - FOOT_EM * em, y + (1 - FOOT_EM) * em)

    def origin(self, place: int, direction: int) -> tuple[float, float]:
        x, y = self.point
        self.raw.FPDFText_GetCharOrigin(self.letters, place, ctypes.byref(x), ctypes.byref(y))
        return turned(x.value, y.value, direction)


def turned(x: float, y: float, direction: int) -> tuple[float, float]:
    """A place on a page that is turned so that text of this direction is level."""
    cos, sin = math.cos(math.radians(direction)), math.sin(math.radians(direction))
    if direction % 90 == 0:
        cos, sin = round(cos), round(sin)
    return x * cos + y * sin, y * cos - x * sin


# forms and remarks


def notes_on(pdfium: Any, pdf: Any, page: Any) -> list[str]:
    """The fields of a page's form with their values, and the remarks on it, a line each."""
    raw = pdfium.raw
    names = {getattr(raw, f"FPDF_ANNOT_{name}"): name for name in ("WIDGET", *REMARKS)}
    lines = []
    for number in range(min(raw.FPDFPage_GetAnnotCount(page), MOST_NOTES)):
        note = raw.FPDFPage_GetAnnot(page, number)
        if not note:
            continue
        kind = names.get(raw.FPDFAnnot_GetSubtype(note))
        if kind == "WIDGET" and pdf.formenv:
            lines.append(field_line(raw, pdf.formenv, note))
        elif kind:
            text = string_of(raw.FPDFAnnot_GetStringValue, note, b"Contents")
            lines.append(f"Comment: {text}" if text else "")
        raw.FPDFPage_CloseAnnot(note)
    return [*filter(None, lines)]


def field_line(raw: Any, form: Any, field: Any) -> str:
    """A field and its value; "" if it has none."""
    kind = raw.FPDFAnnot_GetFormFieldType(form, field)
    name = string_of(raw.FPDFAnnot_GetFormFieldAlternateName, form, field) or (
        string_of(raw.FPDFAnnot_GetFormFieldName, form, field))
    if kind in {getattr(raw, f"FPDF_FORMFIELD_{each}") for each in CHECKED_TYPES}:
        sign = "x" if raw.FPDFAnnot_IsChecked(form, field) else " "
        means = string_of(raw.FPDFAnnot_GetFormFieldExportValue, form, field)
        known = means if means.lower() not in ("yes", "on", "off", "1") else ""
        return f"[{sign}] {name}{f': {known}' if known else ''}"
    if kind in {getattr(raw, f"FPDF_FORMFIELD_{each}") for each in VALUE_TYPES}:
        value = string_of(raw.FPDFAnnot_GetFormFieldValue, form, field)
        return f"{name}: {value}" if value else ""
    return ""


def string_of(get: Callable[..., int], *arguments: Any) -> str:
    """A text that PDFium writes as UTF-16 into a buffer."""
    size = get(*arguments, None, 0)
    if not 2 < size <= VALUE_BYTES:
        return ""
    buffer = ctypes.create_string_buffer(size)
    get(*arguments, ctypes.cast(buffer, ctypes.POINTER(ctypes.c_ushort)), size)
    return " ".join(buffer.raw.decode("utf-16-le", "replace").rstrip("\0").split())
