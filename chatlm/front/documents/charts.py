"""The numbers that charts and diagrams of Office files show, read from the copies that charts keep."""

from __future__ import annotations

from typing import Any

from chatlm.front.documents.archives import Archive, attribute, below, first, local
from chatlm.front.documents.document import Reading
from chatlm.front.documents.tables import Cell, Copies, table_lines

POINTS = 10_000  # of a series that are read
SERIES = 200     # of a chart


def drawn(archive: Archive, part: str, drawing: Any, reading: Reading, place: str) -> list[str]:
    """What a drawing of a part shows as charts and diagrams, each in lines. `reading` notes its pictures, and
    what is not read."""
    relations = {each.id: each for each in archive.related(part)}
    texts = []
    for each in below(drawing, "chart", "relIds", "pic", "imagedata"):
        kind = local(each)
        relation = relations.get(attribute(each, "dm" if kind == "relIds" else "id"))
        if kind in ("pic", "imagedata"):
            reading.lacks("picture", place)
        elif relation and (root := archive.xml(relation.part)) is not None:
            text = diagram_text(root) if kind == "relIds" else chart_text(root)
            if text:
                texts.append(text)
            else:
                reading.lacks("chart", place)
    return texts


def diagram_text(root: Any) -> str:
    """The texts of a diagram (SmartArt), a line each."""
    lines = ("".join(text.text or "" for text in below(paragraph, "t")) for paragraph in below(root, "p"))
    return "\n".join(line for line in lines if line.strip())


def chart_text(root: Any) -> str:
    """A chart's title, the titles of its axes, and its numbers as a table; "" if it has none."""
    lines = []
    chart = first(root, "chart")
    if chart is None:
        return ""
    if title := title_of(chart):
        lines.append(f"Chart: {title}")
    axes = [text for name in ("catAx", "dateAx", "valAx", "serAx") for axis in below(chart, name)
            if (text := title_of(axis))]
    if axes:
        lines.append(f"Axes: {', '.join(axes)}")
    for group in first(chart, "plotArea") if first(chart, "plotArea") is not None else ():
        series = [each for each in group if local(each) == "ser"][:SERIES]
        if series:
            lines += table_of(series)
    return "\n".join(lines)


def title_of(element: Any) -> str:
    title = first(element, "title")
    if title is None:
        return ""
    cached = [point.text or "" for point in below(title, "v")]
    texts = cached or [text.text or "" for text in below(title, "t")]
    return " ".join("".join(texts).split())


def table_of(series: list[Any]) -> list[str]:
    """Series as a table: a row for each category, a column for each series."""
    categories: dict[int, str] = {}
    columns = []
    names = []
    for number, each in enumerate(series, 1):
        for place, text in points(first(each, "cat") if first(each, "cat") is not None
                                  else first(each, "xVal")).items():
            categories.setdefault(place, text)
        values = first(each, "val")
        columns.append(points(values if values is not None else first(each, "yVal")))
        names.append(" ".join(points(first(each, "tx")).values()) or f"Series {number}")
        if sizes := points(first(each, "bubbleSize")):
            columns.append(sizes)
            names.append(f"{names[-1]}: size")
    places = sorted(set().union(*columns))
    rows = [[Cell(""), *map(Cell, names)]]
    rows += [[Cell(categories.get(place, "")), *(Cell(column.get(place, "")) for column in columns)]
             for place in places]
    return table_lines(rows, Copies(0))


def points(element: Any) -> dict[int, str]:
    """The points of a series by their place. Several levels of categories are one text."""
    found: dict[int, str] = {}
    if element is None:
        return found
    for point in below(element, "pt"):
        place = point.get("idx", "")
        value = first(point, "v")
        if place.isascii() and place.isdigit() and len(place) < 8 and value is not None:
            text = value.text or ""
            found[int(place)] = f"{text} {found[int(place)]}" if int(place) in found else text
        if len(found) == POINTS:
            break
    return found or {place: each.text or "" for place, each in enumerate(below(element, "v"))
                     if local(each.getparent()) == "tx"}
