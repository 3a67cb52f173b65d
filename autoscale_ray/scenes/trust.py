"""Open files from outside: XML without any DTD, zip archives with checked extents, gzip with a bound.

Every refusal is an `InputRejectedError` that names the file and the rule; nothing of a refused file is used.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import yaml
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from autoscale_ray.config_file import OneOfAKey
from autoscale_ray.errors import InputRejectedError

MAX_XML_BYTES = 1 << 30
MAX_MEMBER_BYTES = 1 << 30
MAX_ARCHIVE_BYTES = 64 << 30
MAX_MEMBERS = 1_000_000
MAX_RATIO = 200.0
MAX_YAML_DEPTH = 50
_CHUNK_BYTES = 1 << 20
_RATIO_FLOOR_BYTES = 1 << 20
_MAX_PROLOG_BYTES = 1 << 18


_SafeYaml: Any = type("_SafeYaml", (OneOfAKey, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), {})
"""Reads plain values, never objects, and no key twice; the first base is compiled and not in every build of PyYAML."""


_XML: dict[str, Any] = {
    "resolve_entities": False, "no_network": True, "load_dtd": False, "huge_tree": False, "remove_comments": True,
    "remove_pis": True,
}  # fmt: skip
"""Of every XML parser of this package: no DTD, no entities, no network, lxml's limits on size and depth."""


def parse_xml(content: bytes, where: str) -> etree._Element:
    """Parse a document that has no DTD.

    Args:
        content: The whole document.
        where: File name for messages.

    Raises:
        InputRejectedError: Not well-formed, too large, or any DTD, even an unused one.
    """
    if len(content) > MAX_XML_BYTES:
        raise InputRejectedError(where, f"XML must be at most {MAX_XML_BYTES} bytes", len(content))
    # A DTD stands before the root element; behind it the word makes the document malformed.
    refuse_doctype(content[:_MAX_PROLOG_BYTES], where)
    try:
        # Nothing here reads indentation or looks elements up by id; both make a tree dearer to build and to walk.
        root = etree.fromstring(content, etree.XMLParser(**_XML, remove_blank_text=True, collect_ids=False))
    except (etree.XMLSyntaxError, ValueError) as error:
        raise InputRejectedError(where, "must be well-formed XML", first_line(error)) from None
    if root is None:
        raise InputRejectedError(where, "must be well-formed XML", "no root element")
    info = root.getroottree().docinfo
    if info.internalDTD is not None or info.externalDTD is not None or info.doctype:
        raise InputRejectedError(where, "XML must not have a DTD", info.doctype)
    return root


def refuse_doctype(head: bytes, where: str) -> None:
    """Refuse a document with a document type declaration in any of the encodings that XML parsers detect.

    The parser would expand entities before its own check could see the declaration.
    """
    # Each of them writes the mark with this byte, which most documents do not hold and which is quickly looked for.
    encodings = ("ascii", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-7") if b"!" in head else ()
    for encoding in encodings:
        if "<!DOCTYPE".encode(encoding) in head or "<!ENTITY".encode(encoding) in head:
            raise InputRejectedError(where, "XML must not have a DTD")
    declaration = head[:200].lower()
    if b"encoding" in declaration and b"utf-7" in declaration:
        raise InputRejectedError(where, "XML must not be UTF-7")


def bounded_read(
    stream: IO[bytes], where: str, limit: int = MAX_MEMBER_BYTES, chunk_bytes: int = _CHUNK_BYTES
) -> bytes:
    """Read a stream to its end, at most `limit` bytes, so many at once.

    Raises:
        InputRejectedError: More bytes, or damaged compression.
    """
    parts, total = [], 0
    try:
        while chunk := stream.read(chunk_bytes):
            total += len(chunk)
            if total > limit:
                raise InputRejectedError(where, f"content must be at most {limit} bytes")
            parts.append(chunk)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise_storage_failure(error)
        raise InputRejectedError(where, "must be readable", str(error) or type(error).__name__) from None
    return b"".join(parts)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, its name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def raise_storage_failure(error: BaseException) -> None:
    """Raise an error again that the operating system reported: the storage failed, and the bytes are not known to be
    bad. A damaged stream (as gzip and Arrow report it) has no error number."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        raise error


def read_file(path: Path, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Read a plain or .gz file, at most `limit` bytes after decompression.

    Raises:
        InputRejectedError: Missing, too large or damaged.
    """
    if not path.is_file():
        raise InputRejectedError(str(path), "must be a file")
    if path.suffix == ".gz":
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as stream:
            limit = min(limit, ratio_limit(path.stat().st_size))
            return bounded_read(cast(IO[bytes], stream), str(path), limit)
    with path.open("rb") as stream:
        # A whole file at once needs no copy.
        return bounded_read(stream, str(path), limit, max(_CHUNK_BYTES, min(path.stat().st_size, limit) + 1))


def read_yaml(path: Path, limit: int) -> Any:
    """Read a YAML file of plain values, of at most `limit` bytes.

    Raises:
        InputRejectedError: Missing, too large, no YAML, nested too deep, with aliases, or with a key given twice.
    """
    content = read_file(path, limit)
    try:
        depth = 0
        # The loader builds nested values by calling itself, until the process ends; the events are a flat stream.
        for event in yaml.parse(content, Loader=_SafeYaml):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise InputRejectedError(str(path), f"YAML must be nested at most {MAX_YAML_DEPTH} deep")
            if isinstance(event, yaml.AliasEvent):
                raise InputRejectedError(str(path), "YAML must not have aliases")
        # As safe as safe_load: the loader builds plain values only.
        return yaml.load(content, Loader=_SafeYaml)
    except InputRejectedError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise InputRejectedError(str(path), "must be YAML", first_line(error)) from None


def ratio_limit(compressed_bytes: int) -> int:
    """Return how many bytes a compressed file of this size may unpack to."""
    return int(max(_RATIO_FLOOR_BYTES, compressed_bytes * MAX_RATIO))


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open an archive after checking every entry.

    Names must be relative, without ``..``, unique and plain files or folders; entries must not be encrypted
    or overlap; their number, sizes and compression ratios are bounded; local headers must agree with the
    directory.

    Raises:
        InputRejectedError: The rule that is broken.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise InputRejectedError(str(path), "must be a readable zip archive", str(error)) from None
    try:
        _check_entries(archive.infolist(), str(path))
        _check_extents(archive, path)
    except InputRejectedError:
        archive.close()
        raise
    return archive


def _check_entries(entries: list[zipfile.ZipInfo], where: str) -> None:
    if len(entries) > MAX_MEMBERS:
        raise InputRejectedError(where, f"must have at most {MAX_MEMBERS} entries", len(entries))
    if sum(entry.file_size for entry in entries) > MAX_ARCHIVE_BYTES:
        raise InputRejectedError(where, f"must unpack to at most {MAX_ARCHIVE_BYTES} bytes")
    seen: set[str] = set()
    for entry in entries:
        inside = f"{where}: {entry.filename}"
        name = PurePosixPath(entry.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or "\0" in entry.orig_filename:
            raise InputRejectedError(inside, "name must be relative and stay inside the archive")
        if entry.filename in seen:
            raise InputRejectedError(inside, "name must be unique")
        if entry.flag_bits & 0x1:
            raise InputRejectedError(inside, "must not be encrypted")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise InputRejectedError(inside, "must not be a symbolic link")
        if entry.file_size > MAX_MEMBER_BYTES:
            raise InputRejectedError(
                inside, f"must unpack to at most {MAX_MEMBER_BYTES} bytes", entry.file_size
            )
        if entry.file_size > ratio_limit(entry.compress_size):
            raise InputRejectedError(inside, f"must not be compressed more than {MAX_RATIO:.0f} times")
        seen.add(entry.filename)


def _check_extents(archive: zipfile.ZipFile, path: Path) -> None:
    end = archive.start_dir
    with path.open("rb") as file:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset, reverse=True):
            inside = f"{path}: {entry.filename}"
            file.seek(entry.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise InputRejectedError(inside, "must have a local header where the directory says")
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            name = file.read(name_length)
            if name != _raw_name(entry):
                raise InputRejectedError(inside, "must have the same name in its local header", name)
            if entry.header_offset + 30 + name_length + extra_length + entry.compress_size > end:
                raise InputRejectedError(inside, "must not overlap another entry")
            end = entry.header_offset


def _raw_name(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")


def member_names(path: Path, suffix: str) -> list[str]:
    """Return the sorted names of files with a suffix in a folder (recursively), a zip archive, or the file
    itself."""
    if path.is_dir():
        return sorted(str(file.relative_to(path)) for file in path.rglob(f"*{suffix}") if file.is_file())
    if path.suffix == ".zip":
        with open_zip(path) as archive:
            return sorted(name for name in archive.namelist() if name.endswith(suffix))
    if not path.is_file():
        raise InputRejectedError(str(path), "must be a folder, a zip archive or a file", "no such path")
    return [path.name]


def read_member(path: Path, name: str) -> bytes:
    """Return the content of one member that `member_names` listed.

    Raises:
        InputRejectedError: Too large or damaged.
    """
    if path.suffix == ".zip" and path.is_file():
        state = path.stat()
        archive = _known_zip(path, state.st_size, state.st_mtime_ns, os.getpid())
        with archive.open(name) as stream:
            limit = ratio_limit(archive.getinfo(name).compress_size)
            return bounded_read(stream, f"{path}: {name}", min(MAX_MEMBER_BYTES, limit))
    return read_file(path / name if path.is_dir() else path)


@lru_cache(maxsize=4)
def _known_zip(path: Path, size: int, time_ns: int, process: int) -> zipfile.ZipFile:
    """Return an archive that is checked once: once for each of its members would cost the square of their number.

    A process that was forked from another would share the place in the open file with it, so each opens its own.
    """
    return open_zip(path)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read arrays of an npz file whose archive is checked as any other; arrays of objects are refused.

    Raises:
        InputRejectedError: No such archive, an array is missing, damaged, of objects, or larger than its file allows.
    """
    found = {}
    with open_zip(path) as archive:
        for name in names:
            where = f"{path}: {name}"
            if f"{name}.npy" not in archive.namelist():
                raise InputRejectedError(
                    str(path), f"must hold {' and '.join(names)}", archive.namelist()[:10]
                )
            with archive.open(f"{name}.npy") as stream:
                found[name] = read_array(bounded_read(stream, where), where)
    return found


def read_array(content: bytes, where: str) -> np.ndarray:
    """Return the array of a .npy file; InputRejectedError for a damaged one or one of objects."""
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
        raise InputRejectedError(where, "must be an array of numbers or texts", first_line(error)) from None


def iterate_xml(stream: IO[bytes], where: str, tags: tuple[str, ...]) -> Iterator[etree._Element]:
    """Yield the elements with one of `tags` of a large document, one after another, forgetting each
    afterwards.

    Args:
        stream: Bytes of the document.
        where: File name for messages.
        tags: Element names; they must not contain one another.

    Raises:
        InputRejectedError: Not well-formed, a DTD, or a damaged stream.
    """
    parser = etree.XMLPullParser(events=("end",), tag=tags, **_XML)
    head, checked = b"", False
    try:
        while chunk := stream.read(_CHUNK_BYTES):
            if len(head) < _MAX_PROLOG_BYTES:
                # A DTD stands before the root element; a longer prolog than this is not met in practice.
                head += chunk
                refuse_doctype(head[: _MAX_PROLOG_BYTES + 16], where)
            parser.feed(chunk)
            for _, element in parser.read_events():
                if not checked and element.getroottree().docinfo.doctype:
                    raise InputRejectedError(where, "XML must not have a DTD")
                checked = True
                yield element
                _forget(element)
        parser.close()
    except (etree.XMLSyntaxError, OSError, EOFError, zlib.error, ValueError) as error:
        raise_storage_failure(error)
        raise InputRejectedError(where, "must be well-formed XML", first_line(error)) from None


def _forget(element: etree._Element) -> None:
    element.clear()
    parent = element.getparent()
    while parent is not None and element.getprevious() is not None:
        del parent[0]
