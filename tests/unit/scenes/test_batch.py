import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import InvalidSceneError, PoolError
from autoscale_ray.scenes.batch import batch_from_table, tensors_of
from autoscale_ray.scenes.ragged import offsets_of, ragged_index, row_of
from scenes.random_scenes import random_row, random_table, table_of


def _scene_of_table(table, row):
    """One row through as_py, as an independent reading of the schema."""
    values = {name: table[name][row].as_py() for name in table.column_names}
    lanes = np.split(np.reshape(values["lane_points"], (-1, 2)), values["lane_offsets"][1:-1])
    rings = np.split(np.reshape(values["polygon_points"], (-1, 2)), values["polygon_offsets"][1:-1])
    return (
        values,
        lanes if len(values["lane_offsets"]) > 1 else [],
        rings if len(values["polygon_offsets"]) > 1 else [],
    )


def _assert_scene_equals(batch, position, table, row):
    values, lanes, rings = _scene_of_table(table, row)
    agents = slice(int(batch.agent_offsets[position]), int(batch.agent_offsets[position + 1]))
    states = np.array(values["agent_states"], dtype=np.float32).reshape(-1, 15, 5)
    np.testing.assert_array_equal(batch.agent_states_AT5[agents].numpy(), states)
    np.testing.assert_array_equal(batch.agent_type_A[agents].numpy(), values["agent_type"])
    assert batch.ego_states_NT7[position].flatten().tolist() == values["ego_states"]
    first = int(batch.lane_offsets[position])
    assert int(batch.lane_offsets[position + 1]) - first == len(lanes)
    for number, lane in enumerate(lanes):
        low, high = batch.lane_point_offsets[first + number : first + number + 2].tolist()
        np.testing.assert_array_equal(batch.lane_points_V2[low:high].numpy(), lane.astype(np.float32))
    first = int(batch.polygon_offsets[position])
    for number, ring in enumerate(rings):
        low, high = batch.polygon_point_offsets[first + number : first + number + 2].tolist()
        np.testing.assert_array_equal(batch.polygon_points_W2[low:high].numpy(), ring.astype(np.float32))
    links = slice(int(batch.link_offsets[position]), int(batch.link_offsets[position + 1]))
    assert batch.links_E3[links].flatten().tolist() == values["lane_links"]
    center = slice(int(batch.centerline_offsets[position]), int(batch.centerline_offsets[position + 1]))
    assert batch.centerline_C3[center].flatten().tolist() == values["centerline"]
    assert batch.scene_ids[position] == values["scene_id"]


def test_every_scene_of_a_table_is_found_again_in_the_batch():
    table = random_table(20)
    batch = batch_from_table(table)
    for row in range(20):
        _assert_scene_equals(batch, row, table, row)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(rows=st.lists(st.integers(0, 14), max_size=20))
def test_any_selection_of_rows_holds_those_scenes_in_that_order(rows):
    table = random_table(15, seed=3)
    batch = batch_from_table(table).select(np.array(rows, dtype=np.int64))
    assert len(batch) == len(rows)
    for position, row in enumerate(rows):
        _assert_scene_equals(batch, position, table, row)


def test_consecutive_rows_equal_the_gathered_ones():
    batch = batch_from_table(random_table(15, seed=5))
    cut, gathered = batch.select(range(4, 11)), batch.select([*range(4, 11), 0]).select(range(7))
    for name, tensor in tensors_of(cut).items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(tensors_of(gathered)[name])), name


def test_a_sliced_and_chunked_table_gives_the_same_batch():
    table = random_table(12, seed=1)
    parts = [table.slice(0, 5), table.slice(5, 7)]
    whole = batch_from_table(table.slice(2, 9))
    chunked = batch_from_table(pa.concat_tables(parts).slice(2, 9))
    for name, tensor in tensors_of(whole).items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(tensors_of(chunked)[name])), name


def test_empty_batch_and_empty_scene():
    row = random_row(np.random.default_rng(0), "alone", most=1)
    batch = batch_from_table(table_of([row]))
    assert len(batch.agent_type_A) == 0
    assert batch.lane_point_offsets.tolist() == [0]
    assert len(batch.select([])) == 0


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("agent_states", [1.0] * 75),
        ("agent_size", [1.0, 1.0]),
        ("lane_offsets", []),
        ("lane_offsets", [1, 2]),
        ("polygon_offsets", [0, 3, 2]),
        ("ego_states", [0.0] * 98),
        ("centerline", [0.0] * 4),
    ],
)
def test_contradicting_columns_are_refused_with_scene_and_column(column, value):
    rng = np.random.default_rng(2)
    rows = [random_row(rng, "good"), random_row(rng, "bad", most=1)]
    rows[1][column] = value
    with pytest.raises(InvalidSceneError, match=f"scene bad: {column}"):
        batch_from_table(table_of(rows))


def test_another_schema_is_refused():
    with pytest.raises(PoolError, match="agent_type is missing"):
        batch_from_table(random_table(1).drop_columns(["agent_type"]))


@settings(max_examples=50, derandomize=True, deadline=None)
@given(runs=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=12))
def test_ragged_index_lays_runs_end_to_end(runs):
    starts = torch.tensor([start for start, _ in runs], dtype=torch.int64)
    lengths = torch.tensor([length for _, length in runs], dtype=torch.int64)
    index, offsets = ragged_index(starts, lengths)
    assert index.tolist() == [start + step for start, length in runs for step in range(length)]
    assert row_of(offsets).tolist() == [
        owner for owner, (_, length) in enumerate(runs) for _ in range(length)
    ]
    assert offsets.tolist() == offsets_of(lengths).tolist()
