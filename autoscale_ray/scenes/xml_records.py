"""Take long runs of alike records out of an XML document as numbers, before a parser sees them.

A recording is one element of thousands of records that differ in their numbers alone. Here every byte between two
numbers is compared with the first record's; where all are alike, the contents of these elements are well-formed, and
what is left is a small document for the parser with all its guards. Any difference (other spacing, a comment, an
entity, a missing value) gives None, and the whole document goes through the parser.

Shape legend: S records, C numbers in a record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.trust import parse_xml

_NUMBER = re.compile(rb">\s*([^<>\s]+)\s*<")
_SAMPLE_BYTES = 4096
_SPACE = b" \t\r\n"
_DECLARATIONS = tuple(b"<?xml" + _SPACE[at : at + 1] for at in range(len(_SPACE)))
_LEAST_TAG_BYTES = 3
_ENCODINGS = (None, "UTF-8", "utf-8", "ASCII", "US-ASCII", "us-ascii")


@dataclass(frozen=True, slots=True)
class Kind:
    """Which elements hold records. They have no attributes and hold nothing but records."""

    element: str
    record: str = ""
    """Name of the records, which are its children; empty where its whole content is one record."""
    before: str = ""
    """Only elements before the first of these bytes are looked at; those behind it stay in the document."""


@dataclass(frozen=True, slots=True)
class Records:
    """The records of all elements with one name, in document order."""

    paths: tuple[str, ...]
    """Where each number stands inside a record, for example ``position/point/x``."""
    values_SC: np.ndarray
    """Finite."""
    offsets: np.ndarray
    """First record of each element; last entry is S."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the first record tells of all others."""

    paths: tuple[str, ...]
    between: tuple[bytes, ...]
    """The bytes before, between and behind its numbers (C+1)."""
    is_single: bool
    """An element holds one record."""


def parse_with_records(
    content: bytes, where: str, kinds: Sequence[Kind]
) -> tuple[etree._Element, dict[str, Records]] | None:
    """Parse a document, the content of some elements as records.

    Args:
        content: The whole document.
        where: File name for messages.
        kinds: What to look for, no kind inside another. Kinds behind the first whose elements differ stay in the
            document.

    Returns:
        The root, each element taken out in it holding its number (from 0 on, for each kind) as its only content, and
        the records by element; None where a plain parser has to decide.
    """
    document = content
    found: dict[str, Records] = {}
    for kind in kinds:
        # Each is looked for in what the ones before leave, a small part of the document.
        spans = _spans(document, kind)
        records = (
            _records(document, np.array(spans), _layout(document, spans[0], kind, where)) if spans else None
        )
        if records is None and not found:
            return None
        if records is not None:
            document, found[kind.element] = _without(document, spans), records
    # What is cut out of a comment, a CDATA section, an instruction or an unknown encoding is no element.
    # A declaration is no instruction: white space follows its first five letters.
    if b"!" in document or document.count(b"?") > 2 * document.startswith(_DECLARATIONS):
        return None
    try:
        root = parse_xml(document, where)
    except InputRejectedError:
        return None
    cut = all(
        _is_numbered(root, kind, len(found[kind.element].offsets) - 1)
        for kind in kinds
        if kind.element in found
    )
    return (root, found) if cut and root.getroottree().docinfo.encoding in _ENCODINGS else None


def _is_numbered(root: etree._Element, kind: Kind, count: int) -> bool:
    """Tell whether the elements of a kind, before `Kind.before` those without children, hold the numbers given out."""
    texts = [element.text for element in root.iter(kind.element) if not (kind.before and len(element))]
    return texts == list(map(str, range(count)))


def _spans(content: bytes, kind: Kind) -> list[tuple[int, int]]:
    """Return where the content of each element begins and ends."""
    begin, end = f"<{kind.element}>".encode(), f"</{kind.element}>".encode()
    stop = content.find(kind.before.encode()) if kind.before else -1
    stop = len(content) if stop < 0 else stop
    spans, last = [], 0
    find = _finder(content, kind.element.encode())
    while (first := find(begin, last, stop) + len(begin)) >= len(begin):
        last = find(end, first, len(content))
        if last < 0:
            return []
        spans.append((first, last))
    return spans


def _finder(content: bytes, name: bytes) -> Callable[[bytes, int, int], int]:
    """Return what finds tags of a name from a place on as `bytes.find` does, which a rare letter makes ten times as
    fast."""
    sample = content[len(content) // 2 :][:_SAMPLE_BYTES]
    rarest = min((name[at : at + 1] for at in range(len(name))), key=sample.count)
    if content.count(rarest) * 1024 > len(content):
        return content.find

    def find(tag: bytes, first: int, stop: int) -> int:
        ahead = tag.index(rarest)
        place = first + ahead
        while (place := content.find(rarest, place, stop)) >= 0:
            if content.startswith(tag, place - ahead, stop):
                return place - ahead
            place += 1
        return -1

    return find


def _without(content: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    parts, last = [], 0
    for number, (first, end) in enumerate(spans):
        parts += [content[last:first], b"%d" % number]
        last = end
    return b"".join([*parts, content[last:]])


def _layout(content: bytes, span: tuple[int, int], kind: Kind, where: str) -> _Layout | None:
    """Return the layout of the first record; None where it is no record of plain numbers."""
    before, closing = (
        (b"", f"</{kind.record}>".encode()) if kind.record else (f"<{kind.element}>".encode(), b"")
    )
    first = (
        content[span[0] : content.find(closing, *span) + len(closing)] if closing else content[slice(*span)]
    )
    after = b"" if closing else f"</{kind.element}>".encode()
    try:
        holder = parse_xml(b"<all>" + before + first + after + b"</all>", where)
    except InputRejectedError:
        return None
    numbers = [match.span(1) for match in _NUMBER.finditer(first)]
    if len(holder) != 1 or holder[0].tag != (kind.record or kind.element) or not numbers:
        return None
    leaves = [leaf for leaf in holder[0].iter() if leaf.text and leaf.text.strip()]
    if [leaf.text.strip().encode() for leaf in leaves] != [first[low:high] for low, high in numbers]:
        return None
    bounds = [0, *(bound for span in numbers for bound in span), len(first)]
    between = tuple(first[low:high] for low, high in zip(bounds[::2], bounds[1::2], strict=True))
    return _Layout(tuple(map(etree.ElementTree(holder[0]).getelementpath, leaves)), between, not kind.record)


def _records(content: bytes, spans_K2: np.ndarray, layout: _Layout | None) -> Records | None:
    """Return the records in some spans; None where one differs from the first."""
    # Places take eight bytes each; what has more of them than tags fit in is no document.
    if layout is None or content.count(b"<") * _LEAST_TAG_BYTES > len(content):
        return None
    tags = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("<"))
    tags_before = np.cumsum([between.count(b"<") for between in layout.between])
    low_K, high_K = np.searchsorted(tags, spans_K2.T)
    count_K, spare_K = np.divmod(high_K - low_K, tags_before[-1])
    if spare_K.any() or not count_K.all() or (layout.is_single and (count_K > 1).any()):
        return None
    runs = [tags[low:high] for low, high in zip(low_K, high_K, strict=True)]
    ends_SC = np.concatenate(runs).reshape(-1, tags_before[-1])[:, tags_before[:-1]]
    sizes = np.array([len(between) for between in layout.between])
    offsets = np.cumsum([0, *count_K])
    starts_S = np.append(0, ends_SC[:-1, -1] + sizes[-1])
    starts_S[offsets[:-1]] = spans_K2[:, 0]
    fixed_SB = np.column_stack([starts_S, ends_SC])
    after_SB = fixed_SB + sizes
    behind = [
        content[low:high] for low, high in zip(after_SB[offsets[1:] - 1, -1], spans_K2[:, 1], strict=True)
    ]
    begins_SC = after_SB[:, :-1]
    if after_SB.max() > len(content) or not (begins_SC < ends_SC).all() or b"".join(behind).strip(_SPACE):
        return None
    if not all(map(partial(_all_alike, content), fixed_SB.T, layout.between)):
        return None
    values = _numbers(content, begins_SC.reshape(-1), ends_SC.reshape(-1))
    if values is None or not np.isfinite(values).all():
        return None
    return Records(layout.paths, values.reshape(ends_SC.shape), offsets)


def _all_alike(content: bytes, starts: np.ndarray, expected: bytes) -> bool:
    """Tell whether the same bytes stand at all places; they lie inside the content."""
    shape, kind = (len(content) - len(expected) + 1,), f"V{len(expected)}"
    pieces = np.ndarray(shape, dtype=kind, buffer=content, strides=(1,))
    return pieces[starts].tobytes() == expected * len(starts)


def _numbers(content: bytes, begins: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    # Arrow forms a number in a fifth of the time that Python takes, rounded as exactly; it accepts fewer spellings.
    bounds = np.append(np.stack([begins, ends], axis=1).reshape(-1), len(content)).astype(np.int32)
    pieces = pa.StringArray.from_buffers(len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(content))
    try:
        return pieces.take(pa.array(np.arange(0, len(pieces), 2))).cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        return None
