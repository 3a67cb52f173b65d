import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import shapely
import torch

from autoscale_ray.scenes.batch import batch_from_table
from autoscale_ray.scenes.gates import GATES, area_distance, gate
from autoscale_ray.scenes.windows import WindowOptions, cut_windows
from scenes.random_scenes import random_table
from scenes.small_world import two_cars


@pytest.fixture(scope="module")
def good_table():
    return (
        pa.concat_tables(list(cut_windows(two_cars(), "real", WindowOptions()))).slice(1, 3).combine_chunks()
    )


def _changed(table: pa.Table, name: str, row: int, change) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = (
        change(np.array(values[row])).tolist() if isinstance(values[row], list) else change(values[row])
    )
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))


def _set(index, value):
    def change(values):
        values = values.astype(float) if values.dtype.kind == "f" else values
        values[index] = value
        return values

    return change


DAMAGE = {
    "numbers must be finite": ("agent_states", _set(12, np.nan)),
    "ego must be recorded": ("ego_valid", _set(8, False)),
    "ego speed": ("ego_states", _set(slice(3, None, 7), 70.0)),
    "ego acceleration": ("ego_states", _set(8 * 7 + 5, 20.0)),
    "ego must move as its velocity says": ("ego_states", _set(9 * 7 + 1, 9.0)),
    "ego must turn": ("ego_states", _set(8 * 7 + 2, 2.0)),
    "ego must drive along its heading": ("ego_states", _set(slice(2, None, 7), 1.2)),
    "agent speed": ("agent_states", _set(3, 90.0)),
    "agents must not jump": ("agent_states", _set(5 * 5, 500.0)),
    "ego box": ("ego_length_m", lambda _: 50.0),
    "agent boxes": ("agent_size", _set(0, 0.0)),
    "ego must be on the drivable area": ("polygon_points", lambda values: values + 60.0),
    "ego times must grow": ("ego_times_us", _set(3, 10)),
}


@pytest.mark.parametrize("rule", DAMAGE)
def test_each_rule_catches_its_damage_and_nothing_else_is_lost(good_table, rule):
    column, change = DAMAGE[rule]
    good, bad = gate(_changed(good_table, column, 1, change), "f.xml")
    assert good["scene_id"].to_pylist() == good_table["scene_id"].take([0, 2]).to_pylist()
    assert bad["element"].to_pylist() == good_table["scene_id"].take([1]).to_pylist()
    assert bad["rule"][0].as_py().startswith(rule)
    assert bad["file"].to_pylist() == ["f.xml"]


def test_every_gate_has_a_case():
    assert all(any(rule.startswith(case) for case in DAMAGE) for rule in GATES)


def test_good_scenes_pass_untouched(good_table):
    good, bad = gate(good_table, "f.xml")
    assert good is good_table
    assert len(bad) == 0


def test_area_distance_equals_shapely():
    batch = batch_from_table(random_table(30, seed=6))
    points = torch.from_numpy(np.random.default_rng(0).normal(scale=12.0, size=(30, 4, 2)))
    found = area_distance(batch, points)
    for scene in range(30):
        rings = []
        for polygon in range(*batch.polygon_offsets[scene : scene + 2].tolist()):
            if batch.polygon_layer_Q[polygon] in (0, 3, 4):
                low, high = batch.polygon_point_offsets[polygon : polygon + 2].tolist()
                rings.append(batch.polygon_points_W2[low:high].double().numpy())
        for number in range(4):
            point = shapely.Point(points[scene, number].numpy())
            edges = [shapely.LinearRing(ring).distance(point) for ring in rings]
            inside = any(_even_odd(ring, points[scene, number].numpy()) for ring in rings)
            expected = 0.0 if inside or not rings else min(edges)
            assert float(found[scene, number]) == pytest.approx(expected, abs=1e-9)


def test_points_at_the_height_of_vertices_count_their_edges_once():
    diamond = torch.tensor([[0.0, 0.0], [2.0, -2.0], [4.0, 0.0], [2.0, 2.0]])
    batch = dataclasses.replace(
        batch_from_table(random_table(2, seed=6)),
        polygon_offsets=torch.tensor([0, 1, 3]),
        polygon_point_offsets=torch.tensor([0, 4, 4, 8]),
        polygon_points_W2=torch.cat([diamond, diamond + 10.0]),
        polygon_layer_Q=torch.tensor([0, 3, 3]),
    )
    here = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [5.0, 0.0], [2.0, 2.5]], dtype=torch.float64)
    expected = torch.tensor([0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    assert torch.equal(area_distance(batch, torch.stack([here, here + 10.0])), expected.expand(2, 4))


def _even_odd(ring: np.ndarray, point: np.ndarray) -> bool:
    """Count crossings of a ray with the ring by solving each edge for the ray, independently of the product code."""
    count = 0
    for begin, end in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        share = (point[1] - begin[1]) / (end[1] - begin[1])
        count += 0.0 <= share < 1.0 and begin[0] + share * (end[0] - begin[0]) > point[0]
    return count % 2 == 1
