"""Take long runs of alike records out of an XML document as numbers, before a parser sees them.

A recording is one element of thousands of records that differ in their numbers alone. Here every byte between two
numbers is compared with the first record's; where all are alike, the contents of these elements are well-formed, and
what is left is a small document for the parser with all its guards. Any difference (other spacing, a comment, an
entity, a missing value) gives None, and the whole document goes through the parser.

Shape legend: S records, C numbers in a record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.trust import parse_xml

_NUMBER = re.compile(rb">\s*([^<>\s]+)\s*<")
_SPACE = b" \t\r\n"
_ENCODINGS = (None, "UTF-8", "utf-8", "ASCII", "US-ASCII", "us-ascii")


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


def parse_with_records(
    content: bytes, where: str, element: str, record: str
) -> tuple[etree._Element, Records] | None:
    """Parse a document, the content of each `element` as records.

    Args:
        content: The whole document.
        where: File name for messages.
        element: Name of the elements, which must have no attributes and hold nothing but records.
        record: Name of their children.

    Returns:
        The root, each `element` in it holding its number (from 0 on) as its only content, and the records; None where
        a plain parser has to decide.
    """
    spans = _spans(content, f"<{element}>".encode(), f"</{element}>".encode())
    document = _without(content, spans)
    # What is cut out of a comment, a CDATA section, an instruction or an unknown encoding is no element.
    if not spans or b"!" in document or document.count(b"?") > 2 * document.startswith(b"<?xml"):
        return None
    try:
        root = parse_xml(document, where)
        layout = _layout(content, spans[0], record, where)
    except InputRejectedError:
        return None
    known = root.getroottree().docinfo.encoding in _ENCODINGS
    whole = sum(1 for _ in root.iter(element)) == len(spans)
    found = _records(content, np.array(spans), layout) if layout and known and whole else None
    return None if found is None else (root, found)


def _spans(content: bytes, begin: bytes, end: bytes) -> list[tuple[int, int]]:
    """Return where the content of each element begins and ends."""
    spans, last = [], 0
    while (first := content.find(begin, last) + len(begin)) >= len(begin):
        last = content.find(end, first)
        if last < 0:
            return []
        spans.append((first, last))
    return spans


def _without(content: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    parts, last = [], 0
    for number, (first, end) in enumerate(spans):
        parts += [content[last:first], b"%d" % number]
        last = end
    return b"".join([*parts, content[last:]])


def _layout(content: bytes, span: tuple[int, int], record: str, where: str) -> _Layout | None:
    closing = f"</{record}>".encode()
    first = content[span[0] : content.find(closing, *span) + len(closing)]
    numbers = [match.span(1) for match in _NUMBER.finditer(first)]
    holder = parse_xml(b"<all>" + first + b"</all>", where)
    if len(holder) != 1 or holder[0].tag != record or not numbers:
        return None
    leaves = [leaf for leaf in holder[0].iter() if leaf.text and leaf.text.strip()]
    if [leaf.text.strip().encode() for leaf in leaves] != [first[low:high] for low, high in numbers]:
        return None
    bounds = [0, *(bound for span in numbers for bound in span), len(first)]
    between = tuple(first[low:high] for low, high in zip(bounds[::2], bounds[1::2], strict=True))
    return _Layout(tuple(map(etree.ElementTree(holder[0]).getelementpath, leaves)), between)


def _records(content: bytes, spans_K2: np.ndarray, layout: _Layout) -> Records | None:
    tags = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("<"))
    tags_before = np.cumsum([between.count(b"<") for between in layout.between])
    low_K, high_K = np.searchsorted(tags, spans_K2.T)
    count_K, spare_K = np.divmod(high_K - low_K, tags_before[-1])
    if spare_K.any() or not count_K.all():
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
