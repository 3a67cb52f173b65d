import io
import os
import struct
import zipfile

import pytest

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes import trust
from autoscale_ray.scenes.trust import member_names, open_zip, parse_xml, read_file, read_member

LAUGHS = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]><a>&c;</a>'
DOCUMENTS = {
    "entities": LAUGHS.encode(),
    "quadratic": b'<!DOCTYPE a [<!ENTITY b "' + b"x" * 100_000 + b'">]><a>' + b"&b;" * 1000 + b"</a>",
    "external entity": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "parameter entity": b'<!DOCTYPE a [<!ENTITY % b SYSTEM "http://127.0.0.1:1/x"> %b;]><a/>',
    "unused DTD": b'<!DOCTYPE a SYSTEM "a.dtd"><a/>',
    "DTD after a comment": b"<?xml version='1.0'?><!-- x --><!DOCTYPE a><a/>",
    "deep": b"<a>" * 300_000 + b"</a>" * 300_000,
    "huge attribute": b'<a b="' + b"x" * 11_000_000 + b'"/>',
    "UTF-16": '<?xml version="1.0" encoding="UTF-16"?>'.encode("utf-16") + LAUGHS.encode("utf-16-le"),
    "UTF-7": b'<?xml version="1.0" encoding="UTF-7"?>+ADwAIQ-DOCTYPE a+AD4-<a/>',
    "truncated": b"<a><b></b>",
    "empty": b"",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_hostile_or_broken_documents_are_refused(name):
    with pytest.raises(InputRejectedError, match=f"{name}.xml"):
        parse_xml(DOCUMENTS[name], f"{name}.xml")


def test_plain_documents_are_read():
    assert parse_xml(b"<a><b>1</b></a>", "f").findtext("b") == "1"
    assert parse_xml('<?xml version="1.0" encoding="UTF-16"?><a>ä</a>'.encode("utf-16"), "f").text == "ä"


def _zip(entries, *, compression=zipfile.ZIP_DEFLATED) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return bytearray(buffer.getvalue())


def _overlapping() -> bytes:
    """Two directory entries that point at one local entry."""
    raw = _zip([("a.xml", b"x" * 500), ("b.xml", b"y" * 500)], compression=zipfile.ZIP_STORED)
    directory = raw.index(b"PK\x01\x02")
    second = raw.index(b"PK\x01\x02", directory + 4)
    raw[second + 42 : second + 46] = struct.pack("<I", 10)
    return bytes(raw)


def _renamed_locally() -> bytes:
    raw = _zip([("good.xml", b"x" * 50)])
    raw[30:38] = b"evil.xml"
    return bytes(raw)


def _encrypted() -> bytes:
    raw = _zip([("a.xml", b"x" * 50)])
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 8] |= 1
    return bytes(raw)


def _symlink() -> bytes:
    entry = zipfile.ZipInfo("link.xml")
    entry.external_attr = 0o120777 << 16
    return bytes(_zip([(entry, b"/etc/passwd")]))


def _bad_crc() -> bytes:
    raw = _zip([("a.xml", b"<a/>" * 50)], compression=zipfile.ZIP_STORED)
    raw[40] ^= 1
    return bytes(raw)


ARCHIVES = {
    "parent name": bytes(_zip([("../a.xml", b"<a/>")])),
    "absolute name": bytes(_zip([("/a.xml", b"<a/>")])),
    "bomb": bytes(_zip([("a.xml", b"0" * 50_000_000)])),
    "overlap": _overlapping(),
    "local name": _renamed_locally(),
    "encrypted": _encrypted(),
    "symlink": _symlink(),
    "crc": _bad_crc(),
    "truncated": bytes(_zip([("a.xml", b"<a/>" * 100)])[:60]),
    "not a zip": b"PK\x03\x04 no",
}


def _read_all(path):
    return [read_member(path, member) for member in member_names(path, ".xml")]


@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_or_broken_archives_are_refused(tmp_path, name):
    path = tmp_path / "a.zip"
    path.write_bytes(ARCHIVES[name])
    with pytest.raises(InputRejectedError):
        _read_all(path)


def test_duplicate_names_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    with pytest.warns(UserWarning, match="Duplicate"):
        path.write_bytes(_zip([("a.xml", b"<a/>"), ("a.xml", b"<b/>")]))
    with pytest.raises(InputRejectedError, match="unique"):
        member_names(path, ".xml")


def test_good_archives_folders_and_files_list_the_same_members(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("b.xml", "a.xml", "c.txt"):
        (tmp_path / "folder" / name).write_bytes(f"<{name[0]}/>".encode())
    entries = [(file.name, file.read_bytes()) for file in (tmp_path / "folder").iterdir()]
    (tmp_path / "a.zip").write_bytes(_zip(entries))
    for path in (tmp_path / "folder", tmp_path / "a.zip"):
        assert member_names(path, ".xml") == ["a.xml", "b.xml"]
        assert read_member(path, "b.xml") == b"<b/>"
    assert member_names(tmp_path / "folder" / "a.xml", ".xml") == ["a.xml"]
    with pytest.raises(InputRejectedError, match="no such path"):
        member_names(tmp_path / "missing", ".xml")


def test_an_archive_is_checked_once_for_all_its_members_and_again_when_it_changed(tmp_path, monkeypatch):
    path, opened = tmp_path / "a.zip", []
    monkeypatch.setattr(trust, "open_zip", lambda path: opened.append(path) or open_zip(path))
    path.write_bytes(_zip([(f"{number}.xml", b"<a/>") for number in range(5)]))
    assert [read_member(path, f"{number}.xml") for number in range(5)] == [b"<a/>"] * 5
    assert len(opened) == 1
    path.write_bytes(_zip([("0.xml", b"<another/>")]))
    assert read_member(path, "0.xml") == b"<another/>"
    assert len(opened) == 2


def test_a_forked_process_opens_an_archive_of_its_own(tmp_path, monkeypatch):
    """With that of its parent it would share the place in the file, and each would read what the other sought."""
    path, opened = tmp_path / "a.zip", []
    path.write_bytes(_zip([("0.xml", b"<a/>")]))
    monkeypatch.setattr(trust, "open_zip", lambda path: opened.append(path) or open_zip(path))
    read_member(path, "0.xml")
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    assert read_member(path, "0.xml") == b"<a/>"
    assert len(opened) == 2


def test_compressed_files_are_bounded(tmp_path):
    import gzip

    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"0" * 20_000_000))
    with pytest.raises(InputRejectedError, match="at most"):
        read_file(tmp_path / "bomb.gz")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(bytes(range(256)) * 100)[:-20])
    with pytest.raises(InputRejectedError, match="readable"):
        read_file(tmp_path / "cut.gz")
