"""Records taken out of a document are those that the plain parser finds, or none are."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.readers import commonroad
from autoscale_ray.scenes.trust import parse_xml
from autoscale_ray.scenes.xml_records import Kind, parse_with_records
from scenes.scenario_files import lanelet, obstacle, scenario


def _document(num_frames: int = 6) -> bytes:
    body = lanelet(1, -50.0, 300.0, 0.0) + obstacle(5, range(num_frames), 0.0, 8.0)
    for key, role in ((6, "static"), (9, "dynamic")):
        body += (
            f'<obstacle id="{key}"><role>{role}</role><type>car</type>'
            "<shape><circle><radius>1</radius></circle></shape>"
            "<initialState><position><point><x>3</x><y>4</y></point></position><orientation><exact>1</exact>"
            "</orientation><time><exact>2</exact></time></initialState></obstacle>"
        )
    body += obstacle(7, range(2), 3.0, -1e-3) + obstacle(8, range(num_frames), -7.0, 2.5)
    return scenario(body).replace(b"><", b">\n  <").replace(b"/></", b"/> </")


def _parsed(content: bytes):
    parsed = parse_with_records(content, "f.xml", [Kind("trajectory", "state")])
    return parsed and (parsed[0], parsed[1]["trajectory"])


def _plain(content: bytes) -> list[list[str]]:
    """Return the texts of every trajectory by a full parse."""
    root = parse_xml(content, "f.xml")
    return [
        [text.strip() for text in trajectory.itertext() if text.strip()]
        for trajectory in root.iter("trajectory")
    ]


def _assert_as_plain(content: bytes) -> None:
    root, records = _parsed(content)
    runs = [
        records.values_SC[low:high].reshape(-1)
        for low, high in zip(records.offsets, records.offsets[1:], strict=False)
    ]
    plain = _plain(content)
    assert [list(map(float, texts)) for texts in plain] == [run.tolist() for run in runs]
    assert [node.text for node in root.iter("trajectory")] == [str(number) for number in range(len(plain))]
    whole = parse_xml(content, "f.xml")
    for node in (*root.iter("trajectory"), *whole.iter("trajectory")):
        node.text = None
        del node[:]
    assert [(n.tag, n.attrib, (n.text or "").strip(), (n.tail or "").strip()) for n in root.iter()] == [
        (n.tag, n.attrib, (n.text or "").strip(), (n.tail or "").strip()) for n in whole.iter()
    ]


def _damaged(data: st.DataObject, document: bytes) -> bytes:
    content = bytearray(document)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "digit", "drop", "twice", "name"])):
            case "flip":
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "digit":
                content[place] = data.draw(st.sampled_from(list(b"0123456789.-e <>/")))
            case "drop":
                del content[place : place + data.draw(st.integers(1, 60))]
                content = content or bytearray(b"<")
            case "twice":
                content[place:place] = content[place : place + data.draw(st.integers(1, 400))]
            case "name":
                names = [b"initialState", b"state", b"leftBound", b"x", b"time"]
                old, new = data.draw(st.permutations(names))[:2]
                content = bytearray(bytes(content).replace(b"<" + old + b">", b"<" + new + b">", 1))
    return bytes(content)


def _assert_same(one, other) -> None:
    for name in (
        "key_K",
        "poses_R3",
        "velocities_R2",
        "accelerations_R",
        "valid_R",
        "offsets",
        "size_K4",
        "first_frame_K",
    ):
        np.testing.assert_array_equal(getattr(one.tracks, name), getattr(other.tracks, name))
    for name in ("left_V2", "center_V2", "right_V2", "offsets"):
        np.testing.assert_array_equal(getattr(one.road, name), getattr(other.road, name))


def test_records_are_those_of_the_plain_parser():
    content = _document()
    _assert_as_plain(content)
    records = _parsed(content)[1]
    assert records.offsets.tolist() == [0, 5, 6, 11]
    assert records.paths[0] == "position/point/x"
    assert records.values_SC[4].tolist() == [4.0, 0.0, 0.0, 5.0, 8.05, 0.0]


@pytest.mark.parametrize(
    "text", ["1e-3", "-0", "+2.5", ".5", "5.", "1E5", "123456789.123456789123456789", "5e-324"]
)
def test_numbers_are_rounded_as_the_parser_of_texts_rounds_them(text):
    content = _document().replace(b"<x>-5.7500</x>", f"<x>{text}</x>".encode())
    assert float(text) in _parsed(content)[1].values_SC
    _assert_as_plain(content)


OTHERWISE = {
    "a comment": (b"<state>\n", b"<state><!-- -->\n"),
    "a section": (b"<x>-5.7500</x>", b"<x><![CDATA[-5.7500]]></x>"),
    "an instruction": (b"<state>\n", b"<state><?now?>\n"),
    "an entity": (b"<x>-5.7500</x>", b"<x>-&#53;.75000</x>"),
    "other spacing": (b"<x>-5.7500</x>", b"<x> -5.7500</x>"),
    "an attribute": (b"<trajectory>", b'<trajectory type="a">'),
    "an attribute of a record": (b"<state>\n", b"<state >\n"),
    "text between": (b"</state>\n", b"</state>.\n"),
    "no records": (b"</obstacle>", b"<trajectory></trajectory></obstacle>"),
    "not finite": (b"<x>-5.7500</x>", b"<x>1e999</x>"),
    "no number": (b"<x>-5.7500</x>", b"<x>1_6</x>"),
    "no value": (b"<x>-5.7500</x>", b"<x></x>"),
    "another value": (b"<x>-5.7500</x>", b"<x>-5.7500</x><x>-5.7500</x>"),
    "another element": (b"<x>-5.7500</x>", b"<z>-5.7500</z>"),
    "another record": (b"</trajectory>", b"<other/></trajectory>"),
    "a hidden trajectory": (b"<type>", b"<!--<trajectory></trajectory>--><type>"),
    "an unfinished trajectory": (b"</trajectory>", b"</trajectories>"),
    "another encoding": (b"UTF-8", b"ISO-2022-JP"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_whatever_differs_is_left_to_the_plain_parser(name):
    old, new = OTHERWISE[name]
    content = _document()
    assert old in content
    assert _parsed(content) is not None
    assert _parsed(new.join(content.rsplit(old, 1))) is None


def test_an_instruction_that_looks_like_a_declaration_hides_no_trajectory():
    content = _document().partition(b"?>")[2]
    assert len(_parsed(content)[1].offsets) == 4
    first = content[content.index(b"<trajectory>") : content.index(b"</trajectory>")] + b"</trajectory>"
    moved = b"<?xml-s " + first + b"?>" + content.replace(first, b"<trajectory >0</trajectory>", 1)
    assert moved.count(b"?") == 2
    assert _parsed(moved) is None


def test_what_is_nothing_but_tags_takes_no_more_memory_than_its_size():
    content = b"<all><trajectory><state><x>1</x></state>" + b"<" * 2_000_000 + b"</trajectory></all>"
    tracemalloc.start()
    try:
        assert _parsed(content) is None
        assert tracemalloc.get_traced_memory()[1] < len(content)
    finally:
        tracemalloc.stop()


def test_a_standing_obstacle_with_a_trajectory_is_refused_either_way(tmp_path):
    content = _document().replace(b"<role>dynamic</role>", b"<role>static</role>", 1)
    (tmp_path / "A-1.xml").write_bytes(content)
    assert _parsed(content) is not None
    for document in (content, content.replace(b"<state>", b"<state >", 1)):
        (tmp_path / "A-1.xml").write_bytes(document)
        with pytest.raises(InputRejectedError, match="obstacle 5: stands, so it must have no trajectory"):
            next(commonroad.read(tmp_path, "A-1.xml"))


def test_utf_16_is_left_to_the_plain_parser():
    text = _document().decode().replace("UTF-8", "UTF-16")
    assert _parsed(text.encode("utf-16")) is None
    assert len(_plain(text.encode("utf-16"))) == 3


@settings(max_examples=400, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_damaged_document_is_read_as_the_plain_parser_reads_it(data):
    content = _damaged(data, _document(num_frames=3))
    if _parsed(content) is not None:
        _assert_as_plain(content)


def test_a_file_gives_the_same_recording_either_way(tmp_path):
    (tmp_path / "A-1.xml").write_bytes(_document())
    content = (tmp_path / "A-1.xml").read_bytes()
    quick = next(commonroad.read(tmp_path, "A-1.xml"))
    plain = commonroad.recording_of(parse_xml(content, "A-1.xml"), "A-1.xml")
    assert _parsed(content) is not None
    _assert_same(quick, plain)


def test_two_trajectories_of_one_obstacle_are_refused(tmp_path):
    content = _document()
    begin, end = content.index(b"<trajectory>"), content.index(b"</trajectory>") + len(b"</trajectory>")
    (tmp_path / "A-1.xml").write_bytes(content[:end] + content[begin:end] + content[end:])
    assert len(_parsed((tmp_path / "A-1.xml").read_bytes())[1].offsets) == 5
    with pytest.raises(InputRejectedError, match="obstacle 5: each of its 6 states must have one exact x"):
        next(commonroad.read(tmp_path, "A-1.xml"))


@pytest.mark.parametrize("field", ["velocity", "acceleration"])
def test_a_first_value_that_is_no_exact_one_is_refused_and_a_missing_one_is_not(tmp_path, field):
    head, first, rest = _document().partition(b"<initialState>")
    inside, end, behind = rest.partition(b"</initialState>")
    begin, close = f"<{field}>".encode(), f"</{field}>".encode()
    before, _, after = inside.partition(begin)
    value, _, after = after.partition(close)
    for changed, message in (
        (b"", None),
        (begin + value.replace(b"exact", b"low") + close, f"one exact {field}"),
    ):
        (tmp_path / "A-1.xml").write_bytes(head + first + before + changed + after + end + behind)
        if message is None:
            plain = commonroad.recording_of(
                parse_xml((tmp_path / "A-1.xml").read_bytes(), "A-1.xml"), "A-1.xml"
            )
            quick = next(commonroad.read(tmp_path, "A-1.xml"))
            np.testing.assert_array_equal(quick.tracks.accelerations_R, plain.tracks.accelerations_R)
            np.testing.assert_array_equal(quick.tracks.velocities_R2, plain.tracks.velocities_R2)
        else:
            with pytest.raises(InputRejectedError, match=message):
                next(commonroad.read(tmp_path, "A-1.xml"))


def _alike(num_frames: int = 3) -> bytes:
    """Return a document whose first states and borders are alike, and a planning problem whose state is not."""
    body = lanelet(1, -50.0, 300.0, 0.0) + lanelet(2, -50.0, 300.0, 4.0)
    body += "".join(obstacle(key, range(num_frames), 3.0 * key, 8.0) for key in (5, 6, 7))
    body += (
        '<planningProblem id="9"><initialState><time><exact>0</exact></time></initialState></planningProblem>'
    )
    return scenario(body).replace(b"><", b">\n  <")


def test_first_states_and_borders_are_taken_out_too():
    root, found = parse_with_records(_alike(), "f.xml", commonroad._RECORDS)
    assert {name: records.offsets.tolist() for name, records in found.items()} == {
        "trajectory": [0, 2, 4, 6],
        "initialState": [0, 1, 2, 3],
        "leftBound": [0, 5, 10],
        "rightBound": [0, 5, 10],
    }
    assert [len(state) for state in root.iter("initialState")] == [0, 0, 0, 1]
    quick = commonroad.recording_of(root, "A-1.xml", found)
    _assert_same(quick, commonroad.recording_of(parse_xml(_alike(), "A-1.xml"), "A-1.xml"))


@settings(max_examples=400, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_damaged_document_gives_the_recording_of_the_plain_parser_or_none(data):
    content = _damaged(data, _alike())
    parsed = parse_with_records(content, "A-1.xml", commonroad._RECORDS)
    try:
        quick = parsed and commonroad.recording_of(parsed[0], "A-1.xml", parsed[1])
    except InputRejectedError:
        return
    if quick is not None:
        _assert_same(quick, commonroad.recording_of(parse_xml(content, "A-1.xml"), "A-1.xml"))
