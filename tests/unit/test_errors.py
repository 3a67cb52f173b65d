import pickle

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
