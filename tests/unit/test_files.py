"""Files are whole or not there, and a full disk is told as one."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from autoscale_ray.files import (
    ABANDONED_S,
    all_or_none,
    begin_array,
    in_one_step,
    link_or_copy,
    partial_folder,
    save_array,
)


def test_a_file_takes_its_place_whole_and_leaves_nothing_where_it_fails(tmp_path):
    path = tmp_path / "table.csv"
    with in_one_step(path) as temporary:
        temporary.write_text("old")
        assert (temporary.parent, temporary.suffix, path.exists()) == (tmp_path, ".csv", False)

    def fail() -> None:
        with in_one_step(path) as temporary:
            temporary.write_text("ha")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.csv", "old")]


BUILDER = """
import sys
from pathlib import Path
from autoscale_ray.files import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    (folder / "data").write_bytes(b"0" * 1000)
    print(folder, flush=True)
    sys.stdin.read()  # until it is killed
"""


def test_what_a_killed_builder_left_goes_when_no_file_has_grown_for_a_day(tmp_path):
    path = tmp_path / "pools" / "a[b]"
    command = [sys.executable, "-c", BUILDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed:
        left = Path(killed.stdout.readline().strip())
        os.kill(killed.pid, signal.SIGKILL)
    for days, file_days, is_there in ((0, 0, True), (2, 0, True), (2, 2, False)):
        for file, age in ((left / "data", file_days), (left, days)):
            os.utime(file, (time.time() - age * ABANDONED_S,) * 2)
        with partial_folder(path) as mine:
            assert (left.is_dir(), mine.is_dir()) == (is_there, True)
        assert not mine.exists()
    with partial_folder(path) as mine:
        mine.rename(path)
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    "array", [np.arange(300_000.0), np.asfortranarray(np.ones((3, 2), ">i2")), np.int8(3)]
)
def test_an_array_is_written_as_numpy_does(array, tmp_path):
    np.save(tmp_path / "numpy.npy", array)
    save_array(tmp_path / "ours.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_a_file_gets_a_second_name_or_a_copy_and_a_taken_name_is_left(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("content")
    link_or_copy(path, tmp_path / "link")
    assert (tmp_path / "link").samefile(path)
    with pytest.raises(FileExistsError):
        link_or_copy(path, tmp_path / "link")

    def refuse(*given):
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "content"
    assert not (tmp_path / "copy").samefile(path)


@pytest.mark.parametrize("array", [np.arange(7.0), np.zeros((5, 3, 2), np.uint8), np.zeros((0, 4), bool)])
def test_an_array_written_piece_by_piece_is_the_one_numpy_writes(array, tmp_path):
    np.save(tmp_path / "numpy.npy", array)
    with (tmp_path / "ours.npy").open("wb") as file:
        begin_array(file, array[:2], len(array))
        for start in range(0, len(array), 2):
            file.write(array[start : start + 2].data)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_a_full_disk_keeps_its_error_number():
    with pytest.raises(OSError, match="No space left") as told:
        save_array(Path("/dev/full"), np.zeros(300_000))
    assert told.value.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_of_several_folders_all_are_left_or_none(error, tmp_path):
    with all_or_none() as made:
        (tmp_path / "a").mkdir()
        made.append(tmp_path / "a")

    def fails() -> None:
        with all_or_none() as made:
            (tmp_path / "b").mkdir()
            made.append(tmp_path / "b")
            raise error

    with pytest.raises(error):
        fails()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_place_that_cannot_be_written_is_told_by_its_own_name(tmp_path):
    (tmp_path / "plain").write_text("a file")
    for place in (tmp_path / "plain" / "out.json", tmp_path / "nowhere" / "out.json"):
        with pytest.raises(OSError) as failed, in_one_step(place) as temporary:
            temporary.write_text("x")
        assert failed.value.filename == str(place)
