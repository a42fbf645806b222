"""Equations become a line of text: those of Office (OMML), and of web pages and books (MathML)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence as Seq
from typing import Any

from chatlm.front.documents.archives import attribute, first, local

# elements whose text is not shown
UNSHOWN = "annotation", "annotation-xml", "mphantom", "phant"


def grouped(text: str) -> str:
    """A part of an equation, in brackets unless it is one number or name."""
    return text if re.fullmatch(r"[\w.,]*|\([^()]*\)|[+\-−]\w", text) else f"({text})"


def fraction(parts: Seq[str]) -> str:
    return f"({'/'.join(map(grouped, parts))})"


def raised(parts: Seq[str]) -> str:
    return f"{parts[0]}^{grouped(''.join(parts[1:]))}"


def lowered(parts: Seq[str]) -> str:
    return f"{parts[0]}_{grouped(''.join(parts[1:]))}"


def both(parts: Seq[str]) -> str:
    base, low, high = (*parts, "", "", "")[:3]
    return base + (f"_{grouped(low)}" if low else "") + (f"^{grouped(high)}" if high else "")


def scripts_before(parts: Seq[str]) -> str:
    low, high, base = (*parts, "", "", "")[:3]
    return both(["", low, high]) + base


def root(parts: Seq[str]) -> str:
    return f"√({''.join(parts)})"


def any_root(parts: Seq[str]) -> str:
    base, degree = (*parts, "")[:2]
    return f"root_{grouped(degree)}({base})" if degree else f"√({base})"


def rows(parts: Seq[str]) -> str:
    return f"[{'; '.join(parts)}]"


def row(parts: Seq[str]) -> str:
    return ", ".join(parts)


# element -> its text, by those of its children
WRITTEN: dict[str, Callable[[Seq[str]], str]] = {
    # MathML
    "mfrac": fraction, "msup": raised, "msub": lowered, "msubsup": both, "msqrt": root, "mroot": any_root,
    "mover": raised, "munder": lowered, "munderover": both, "mtable": rows, "mtr": row,
    "mmultiscripts": " ".join,
    # Office, whose order of children is told by OFFICE_ORDER
    "f": fraction, "sSup": raised, "sSub": lowered, "sSubSup": both, "rad": any_root,
    "sPre": scripts_before, "limLow": lowered, "limUpp": raised, "m": rows, "mr": row, "eqArr": rows}
OFFICE_ORDER = {"f": ("num", "den"), "sSup": ("e", "sup"), "sSub": ("e", "sub"),
                "sSubSup": ("e", "sub", "sup"), "rad": ("e", "deg"), "limLow": ("e", "lim"),
                "limUpp": ("e", "lim"), "nary": ("sub", "sup", "e"), "sPre": ("sub", "sup", "e"),
                "func": ("fName", "e")}


def line_of(element: Any) -> str:
    """An equation as a line."""
    return " ".join(written(element).split())


def written(element: Any) -> str:
    name = local(element)
    if not name or name in UNSHOWN or name.endswith("Pr"):
        return ""
    if name in ("t", "mi", "mn", "mo", "mtext", "ms", "ci", "cn"):
        return spaced("".join(element.itertext()))
    if name == "mspace":
        return " "
    if name in OFFICE_ORDER:
        parts = [written(part) for each in OFFICE_ORDER[name]
                 for part in element if local(part) == each]
    else:
        parts = [part for child in element if (part := written(child))]
    if name == "nary":
        low, high, inner = (*parts, "", "", "")[:3]
        return f"{sign_of(element, 'naryPr', 'chr') or '∫'}{both(['', low, high])} {grouped(inner)}"
    if name == "d":
        opening = sign_of(element, "dPr", "begChr") or "("
        return opening + ", ".join(parts) + (sign_of(element, "dPr", "endChr") or ")")
    if name == "func":
        return f"{parts[0]}{grouped(''.join(parts[1:]))}" if parts else ""
    if name == "mfenced":
        return (element.get("open") or "(") + ", ".join(parts) + (element.get("close") or ")")
    if name in WRITTEN and parts:
        return WRITTEN[name](parts)
    return "".join(parts)


def spaced(text: str) -> str:
    """A part of an equation, with room around what compares."""
    text = text.replace("\u2061", "").replace("\u2062", "")  # a function is applied, times: both unseen
    return re.sub(r"\s*([=≠<>≤≥≈±→⇒])\s*", r" \1 ", text)


def sign_of(element: Any, properties: str, name: str) -> str:
    """A sign that the properties of an element name; "" if they name none."""
    found = first(element, properties, name)
    return "" if found is None else attribute(found, "val")
