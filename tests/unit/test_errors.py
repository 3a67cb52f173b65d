import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoscale_ray import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError("run.yaml", "must be >= 1", 0),
        errors.SplitLeakError("train / dev", "must share no log", "log 7"),
        errors.MissingExtraError("faiss", errors.extra("cpu")),
        errors.SourceReadError("disk/file", "Input/output error"),
    ],
)
def test_errors_survive_a_process_boundary(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_message_is_one_short_line():
    message = str(errors.InvalidInputError("file", "must\nhold", "x" * 500))
    assert "\n" not in message
    assert len(message) < 150


@pytest.mark.parametrize("read", [open, pq.ParquetFile, pa.memory_map])
def test_a_file_that_is_not_there_is_named_whoever_looked_for_it(read, tmp_path):
    path = str(tmp_path / "it's.parquet")
    with pytest.raises(OSError) as caught:
        read(path)
    assert str(errors.path_error(caught.value)) == f"{path}: No such file or directory"


def test_an_error_that_names_no_file_is_not_told_as_the_users():
    assert errors.path_error(ConnectionResetError(104, "Connection reset by peer")) is None
    assert "No space left" in str(errors.path_error(OSError(28, "No space left on device")))
