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

from autoscale_ray.files import ABANDONED_S, in_one_step, partial_folder, save_array


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
import sys, time
from pathlib import Path
from autoscale_ray.files import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    (folder / "data").write_bytes(b"0" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_builder_left_goes_with_the_next_one_and_a_living_builder_keeps_its_folder(tmp_path):
    path = tmp_path / "pools" / "a[b]"
    killed, living = (
        subprocess.Popen([sys.executable, "-c", BUILDER, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    try:
        folders = [Path(process.stdout.readline().strip()) for process in (killed, living)]
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(10)
        with partial_folder(path):  # it may be somebody's who has not locked it yet
            assert all(folder.is_dir() for folder in folders)
        for folder in folders:
            os.utime(folder, (time.time() - 2 * ABANDONED_S,) * 2)
        with partial_folder(path) as mine:
            assert [folder.is_dir() for folder in folders] == [False, True]
            mine.rename(path)
        assert sorted(path.parent.iterdir()) == sorted([path, folders[1]])
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate(timeout=10)


@pytest.mark.parametrize(
    "array", [np.arange(300_000.0), np.asfortranarray(np.ones((3, 2), ">i2")), np.int8(3)]
)
def test_an_array_is_written_as_numpy_does(array, tmp_path):
    np.save(tmp_path / "numpy.npy", array)
    save_array(tmp_path / "ours.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_a_full_disk_keeps_its_error_number():
    with pytest.raises(OSError, match="No space left") as told:
        save_array(Path("/dev/full"), np.zeros(300_000))
    assert told.value.errno == errno.ENOSPC
