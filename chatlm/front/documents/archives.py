"""Archives of parts in XML, as Office, OpenDocument and EPUB are. Parts are found whatever the case of their
names, and XML expands no entities."""

from __future__ import annotations

import io
import posixpath
import re
import urllib.parse
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from chatlm.common.errors import error_text
from chatlm.front.documents.document import library, refusal

UNPACKED_BYTES = 256 << 20  # an archive may hold at most this much,
MEMBERS = 10_000            # in at most so many files
STRICT = re.compile(rb"http://purl\.oclc\.org/ooxml/(\w+)/")  # ISO's names: others read those of ECMA
TRANSITIONAL = rb"http://schemas.openxmlformats.org/\1/2006/"
READS_XML = {"resolve_entities": False, "no_network": True, "load_dtd": False, "huge_tree": False,
             "remove_comments": True, "remove_pis": True}


class Relation(NamedTuple):
    """What one part of an Office file says of another."""

    id: str
    kind: str  # the last word of its type: "comments"
    part: str  # the name of the other part; "": it is outside of the file


def local(element: Any) -> str:
    """The name of an element without its namespace; "" of what is no element."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def attribute(element: Any, name: str) -> str:
    """An attribute by its name without namespace; "" if it is missing."""
    for key, value in element.attrib.items():
        if key.rpartition("}")[2] == name:
            return value
    return ""


def below(element: Any, *names: str) -> Iterator[Any]:
    """The elements with one of these names within another, in their order."""
    return element.iter(*(f"{{*}}{name}" for name in names))


def outermost(element: Any, *names: str) -> Iterator[Any]:
    """The elements with one of these names within another, without those within each other."""
    waiting = [iter(element)]
    while waiting:
        for child in waiting[-1]:
            if local(child) in names:
                yield child
            else:
                waiting.append(iter(child))
                break
        else:
            waiting.pop()


def first(element: Any, *path: str) -> Any:
    """The child of a child ... with these names; None if there is none."""
    return element.find("/".join(f"{{*}}{name}" for name in path))


class Archive:
    """A zip file that is not larger than what may be unpacked."""

    def __init__(self, data: bytes):
        try:
            self.zip = zipfile.ZipFile(io.BytesIO(data))
            members = self.zip.infolist()
        except (zipfile.BadZipFile, ValueError, OverflowError, OSError, NotImplementedError) as error:
            raise refusal(f"the file is damaged: {error_text(error)}") from None
        if len(members) > MEMBERS or sum(member.file_size for member in members) > UNPACKED_BYTES:
            raise refusal(f"unpacked, the file has more than {UNPACKED_BYTES >> 20} MiB or {MEMBERS:,} parts",
                          "too_complex")
        if any(member.flag_bits & 1 for member in members):
            raise refusal("the file is encrypted: save it without its password", "encrypted")
        self.names = {member.filename: member for member in members}
        self.relations: dict[str, list[Relation]] = {}  # by the part whose they are
        self.by_lower = {name.lower().lstrip("/"): name for name in self.names}

    def find(self, name: str) -> str:
        """The name that a part has here; "" if it is not here."""
        return name if name in self.names else self.by_lower.get(name.lower().lstrip("/"), "")

    def read(self, name: str) -> bytes:
        """The bytes of a part, in which ISO's names of the strict Open XML are ECMA's."""
        data = self.zip.read(self.find(name) or name)
        return STRICT.sub(TRANSITIONAL, data) if b"purl.oclc.org/ooxml" in data else data

    def xml(self, name: str) -> Any:
        """The root element of a part; None if there is none."""
        return parse_xml(self.read(name)) if name and self.find(name) else None

    def related(self, name: str = "") -> list[Relation]:
        """The relations of a part; of none, those of the whole file."""
        if name not in self.relations:
            self.relations[name] = self._relations_of(name)
        return self.relations[name]

    def _relations_of(self, name: str) -> list[Relation]:
        folder, base = posixpath.split(name)
        root = self.xml(posixpath.join(folder, "_rels", f"{base}.rels"))
        relations = []
        for each in () if root is None else below(root, "Relationship"):
            target = urllib.parse.unquote(each.get("Target", ""))
            part = ""
            if each.get("TargetMode") != "External":
                part = posixpath.normpath(posixpath.join("/", folder, target)).lstrip("/")
            relations.append(Relation(each.get("Id", ""), each.get("Type", "").rpartition("/")[2], part))
        return relations

    def of_kind(self, name: str, kind: str) -> list[Any]:
        """The root elements of the parts to which a part has relations of a kind."""
        roots = [self.xml(relation.part) for relation in self.related(name) if relation.kind == kind]
        return [root for root in roots if root is not None]


def parse_xml(data: bytes) -> Any:
    """The root element of XML. Entities that it declares are refused: they could grow, or name files."""
    etree = library("lxml.etree", "XML")
    root = etree.fromstring(data, etree.XMLParser(**READS_XML))
    declared = root.getroottree().docinfo.internalDTD
    if declared is not None and any(True for _ in declared.iterentities()):
        raise refusal("the file is damaged: its XML declares entities")
    return root
