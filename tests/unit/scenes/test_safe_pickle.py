import io
import pickle
import pickletools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes import safe_pickle
from autoscale_ray.scenes.pickle_child import Refused, answer, check_opcodes
from autoscale_ray.scenes.safe_pickle import PickleReader

PLAIN = {
    "id": "scene", "length": 3, "rate": 0.1, "none": None, "big": 1 << 70, 7: [True, (1, 2)],
    "state": {"position": np.arange(6.0).reshape(3, 2), "valid": np.array([True, False]), "speed": np.float32(2.5)},
}  # fmt: skip


@pytest.fixture(scope="module")
def reader():
    with PickleReader(deadline_s=60.0) as opened:
        yield opened


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_come_back_equal_and_the_child_goes_on(reader, protocol):
    found = reader.read(pickle.dumps(PLAIN, protocol=protocol), "f.pkl")
    assert found["big"] == 1 << 70
    assert found[7] == [True, [1, 2]]
    np.testing.assert_array_equal(found["state"]["position"], PLAIN["state"]["position"])
    assert found["state"]["speed"] == np.float32(2.5)
    assert (found["id"], found["length"], found["rate"], found["none"]) == ("scene", 3, 0.1, None)


def test_a_child_that_is_too_slow_is_ended_and_replaced():
    with PickleReader(deadline_s=0.0) as hurried, pytest.raises(InputRejectedError, match="limits"):
        hurried.read(pickle.dumps(PLAIN), "f.pkl")
    with PickleReader() as patient:
        assert patient.read(pickle.dumps(1), "f.pkl") == 1


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_pickles_give_values_or_a_refusal(changes):
    content = bytearray(pickle.dumps({"a": [1, 2.0, "x", None], "b": {"c": (True, b"y")}}, protocol=4))
    for place, value in changes:
        content[place % len(content)] = value
    try:
        check_opcodes(bytes(content))
    except Refused:
        return
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(io.BytesIO(bytes(content)))}
    if not opcodes & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}:
        assert answer(bytes(content))[:1] in (b"+", b"-")


def test_a_new_child_reads_on_before_the_old_one_has_used_up_its_time(monkeypatch):
    monkeypatch.setattr(safe_pickle, "READS_OF_A_CHILD", 3)
    with PickleReader() as opened:
        children = [(opened.read(pickle.dumps(number), "x"), opened._child.pid)[1] for number in range(7)]
    assert [len(set(children[low : low + 3])) for low in (0, 3, 6)] == [1, 1, 1]
    assert len(set(children)) == 3
