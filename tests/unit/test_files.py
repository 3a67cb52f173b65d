"""Files are whole or not there, and a full disk is told as one."""

import errno
from pathlib import Path

import numpy as np
import pytest

from autoscale_ray.files import in_one_step, save_array


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
