"""PDF: the text of each page."""

from __future__ import annotations

import re

from chatlm.front.documents.document import Document, Reading, library, refusal

SOFT_HYPHENS = "[\x02\xad\ufffe]\r?\n?"


def read_pdf(data: bytes, reading: Reading) -> Document:
    pdfium = library("pypdfium2", "PDF")
    try:
        pdf = pdfium.PdfDocument(data)
        pages = len(pdf)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise refusal("the PDF is encrypted: save it without its password", "encrypted") from None
        raise refusal(f"the PDF is damaged ({str(error)[:100]})") from None

    def text_of(number: int) -> str:
        page = pdf[number]
        try:
            text = page.get_textpage()
            try:
                whole = re.sub(SOFT_HYPHENS, "", text.get_text_bounded())
                return whole.replace("\r\n", "\n")
            finally:
                text.close()
        except pdfium.PdfiumError:
            return ""
        finally:
            page.close()

    return Document(map(text_of, range(pages)), pages, "page", True)
