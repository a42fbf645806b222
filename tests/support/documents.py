"""Small documents of each format that /extract reads, made by their libraries or by hand, and those of other writers
in tests/fixtures/documents, with what must arrive of them."""

import base64
import io
import json
import re
import zipfile
import zlib
from pathlib import Path

WRITTEN = Path(__file__).resolve().parent.parent / "fixtures" / "documents"      # by the script that is there

ENCRYPTED_PDF = zlib.decompress(base64.b85decode(  # one empty page, by pypdf with the password "secret"
    'c-oCoO>Yx15WV|X%q2%^k3ZMaDhJv|LV#MOg$wFo)*gqTXt&yIq?SL)fqwvh1Sf?yA{<!B()!JNZ^rXx*B6UdcxJ@x$Ioxy1%iU1`y$#_$m?;)yTl{3k=V!R'
    'J7wl#J{R2QJx3pLZy)a&<Tb5$E9CjG>nA`V->&l(K7p;oCEOiJ&587!CfW=u@#Fz}@8yxe{<D{mOWqE<F;zvaRJwf6c}=f}huT)1sl!3_bnf=%BiGUXc6Uea'
    'A3;}JFhaiLel>jt)J+wF)zL;DbgbpYdNb9%$eW4!Ok)=E3R=ZZ*Qz7KmYZOcNrh6!#UWBKlq@IR<;J_5vdPx#;L%15)Ri3A*5N-ut8K=T$aX<RBxSndJSr+)'
    '`Haz7-E_sWt1W_S$fCDO)w?gHkV4fQ2lOy<5emFe&mVZ_jDrHt7}m!hD*X%Q;t7V>oMJwlVA|sgHjT92@Oaqk&H5|XQRH$MCNPHp<eR<>fWQAQYGf^iq+F9#'
    '<P@}3Xi6pub!QzlMsb|~52Xfu*{AXGeggL=>Fq@0bXbTDUd(2fR}1kAZGgkF'))
MIMETYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def pdf(pages):
    """A PDF with these texts, one a page, in lines; "" is a page without text."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"]
    kids = []
    for page in pages:
        lines = b" T* ".join(b"(" + line.encode("cp1252").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)") + b") Tj"
                             for line in page.split("\n")) if page else b""
        stream = b"BT /F1 12 Tf 14 TL 72 720 Td " + lines + b" ET"
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        objects.append(b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
                       b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects))
        kids.append(len(objects))
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(b"%d 0 R" % kid for kid in kids))
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + b"xref\n0 %d\n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(places) + 1, table, len(places) + 1, len(data))


def archive(members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return file.getvalue()


def docx(body="<w:p><w:pPr><w:pStyle w:val='Heading1'/></w:pPr><w:r><w:t>A title</w:t></w:r></w:p><w:p><w:r><w:t>Some text.</w:t></w:r></w:p>",
         before="", **more):
    """A DOCX whose body is this XML. before: what stands before its root; more: other members."""
    return archive({
        "[Content_Types].xml": f'<Types xmlns="{MIMETYPES}"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
                               '<Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/>'
                               "</Types>",
        "_rels/.rels": f'<Relationships xmlns="{RELATIONS}"><Relationship Id="r1" Type="{OFFICE}/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/styles.xml": f'<w:styles xmlns:w="{WORD}"><w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/></w:style></w:styles>',
        "word/_rels/document.xml.rels":
            f'<Relationships xmlns="{RELATIONS}"><Relationship Id="r1" Type="{OFFICE}/styles" Target="styles.xml"/></Relationships>',
        "word/document.xml": f'<?xml version="1.0"?>{before}<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>', **more})


def pptx(slides):
    """A PPTX of (title, text, notes)."""
    import pptx as library
    presentation, file = library.Presentation(), io.BytesIO()
    for title, text, notes in slides:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = title, text
        if notes:
            slide.notes_slide.notes_text_frame.text = notes
    presentation.save(file)
    return file.getvalue()


def xlsx(sheets, hidden=()):
    """An XLSX of {name: rows}."""
    import openpyxl
    book, file = openpyxl.Workbook(), io.BytesIO()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        sheet.sheet_state = "hidden" if name in hidden else "visible"
        for row in rows:
            sheet.append(row)
    book.save(file)
    return file.getvalue()


def epub(chapters, **more):
    """An EPUB of {file name: HTML}, in this order."""
    items = "".join(f'<item id="i{i}" href="{name}" media-type="application/xhtml+xml"/>' for i, name in enumerate(chapters))
    spine = "".join(f'<itemref idref="i{i}"/>' for i in range(len(chapters)))
    return archive({
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
                                  '<rootfile full-path="book/package.opf"/></rootfiles></container>',
        "book/package.opf": f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>',
        **{f"book/{name}": html for name, html in chapters.items()}, **more})


def encodings():
    """Bytes as hexadecimal digits, and the text that they are; None if they are none."""
    return json.loads((WRITTEN.parent / "encodings.json").read_text(encoding="utf-8"))


def written():
    """What the documents of WRITTEN hold, by their names; those of Office also in ISO's strict form, and PDFs also with turned pages."""
    held = json.loads((WRITTEN / "values.json").read_text(encoding="utf-8"))
    turned = {f"turned-{angle}-{name}": held[name] for name in ("reportlab.pdf", "fpdf2.pdf") for angle in (90, 180, 270)}
    return held | turned | {f"strict-{name}": facts for name, facts in held.items() if name in ("python-docx.docx", "python-pptx.pptx", "xlsxwriter.xlsx")}


def written_bytes(name):
    """One of these documents."""
    if name.startswith("turned-"):
        _, angle, name = name.split("-", 2)
        return turned((WRITTEN / name).read_bytes(), int(angle))
    data = (WRITTEN / name.removeprefix("strict-")).read_bytes()
    return strict(data) if name.startswith("strict-") else data


def turned(data, angle):
    """A PDF whose pages are shown turned."""
    import pypdfium2
    document, file = pypdfium2.PdfDocument(data), io.BytesIO()
    for page in document:
        page.set_rotation(angle)
    document.save(file)
    return file.getvalue()


def strict(data):
    """An Office file with the names of ISO's strict Open XML."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return archive({name: re.sub(rb"http://schemas\.openxmlformats\.org/(officeDocument|\w+ml)/2006/", rb"http://purl.oclc.org/ooxml/\1/", file.read(name)) for name in file.namelist()})


def stands_apart(value, text):
    """Is a value there, and no letter or digit touches it?"""
    return bool(re.search(rf"(?<![\w^])(?<!\d[.,]){re.escape(value)}(?!\w|[.,]\d)", text))


def cells_of(line):
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def stands_below(heading, value, text):
    """Is a value in a table's column below this heading?"""
    table = []
    for line in text.split("\n"):
        if not line.startswith("| "):
            table = []
            continue
        table.append(cells_of(line))
        for column, cell in enumerate(table[-1]):
            if cell == value and any(heading == row[column] for row in table[:-1] if column < len(row)):
                return True
    return False
