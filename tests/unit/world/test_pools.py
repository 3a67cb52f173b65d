"""Pools: the four sides, their hidden truth, and what must not leak from it."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoscale_ray.config import WorldConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.records import SIDES
from autoscale_ray.scenes.pool import check_disjoint, open_pool
from autoscale_ray.scenes.schema import SCENE_SCHEMA, check_schema
from autoscale_ray.world.families import FAMILIES
from autoscale_ray.world.pools import chunk_tables, evaluation_weights, generate, make_pool, plan_side
from autoscale_ray.world.presets import PRESETS, counts

SMALL = WorldConfig(num_real=120, num_synthetic=400, num_dev_per_family=2, num_test_per_family=2)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for side in SIDES:
        make_pool(SMALL, side, folder / side)
    return {side: folder / side for side in SIDES}


def _truth(path):
    return pq.read_table(path / "truth.parquet").to_pydict()


def test_sides_have_their_sizes_and_share_no_log(sides):
    pools = {side: open_pool(path) for side, path in sides.items()}
    assert [len(pools[side]) for side in SIDES] == [120, 400, 2 * len(FAMILIES), 2 * len(FAMILIES)]
    check_disjoint(pools)


def test_truth_names_every_scene_in_order(sides):
    for path in sides.values():
        np.testing.assert_array_equal(open_pool(path).scene_ids, _truth(path)["scene_id"])


def test_every_family_is_on_every_side(sides):
    for path in sides.values():
        assert set(_truth(path)["family"]) == set(FAMILIES)


def test_perturbed_copies_name_a_real_scene_and_keep_its_surroundings(sides):
    real, synthetic = open_pool(sides["real"]), open_pool(sides["synthetic"])
    table = synthetic.table(np.arange(len(synthetic)))
    copies = np.flatnonzero(np.array(_truth(sides["synthetic"])["origin"]) == "perturbed_copy")
    assert len(copies) == round(PRESETS["harm_low_deficit"].copy_share * 400)
    origins = table["origin_id"].to_pylist()
    assert {i for i, origin in enumerate(origins) if origin is not None} == set(copies.tolist())
    sources = real.table(real.rows_of([origins[i] for i in copies]))
    for i, source in zip(copies, range(len(copies)), strict=True):
        assert len(table["lane_width_m"][i]) == len(sources["lane_width_m"][source])
        np.testing.assert_allclose(table["lane_width_m"][i].as_py(), sources["lane_width_m"][source].as_py())


def test_near_duplicates_share_a_log_and_look_alike(sides):
    truth, table = _truth(sides["synthetic"]), open_pool(sides["synthetic"])
    near = np.array(truth["origin"]) == "near_duplicate"
    assert {truth["family"][i] for i in np.flatnonzero(near)} == {"cruise", "curve"}
    logs = np.array(table.log_ids)
    assert len(np.unique(logs[near])) <= 40
    assert len(np.unique(logs[~near])) > 0.95 * (~near).sum()
    width = table.table(np.arange(len(logs)))["route_speed_limit_mps"].to_numpy()
    for log in np.unique(logs[near]):
        assert np.ptp(width[logs == log]) < 1.5


def test_nothing_in_the_columns_tells_family_or_quality(sides):
    for path in sides.values():
        pool = open_pool(path)
        table = pool.table(np.arange(len(pool)))
        assert all(tags == [] for tags in table["tags"].to_pylist())
        assert np.isnan(table["expert_quality"].to_numpy()).all()
        assert len(set(table["source"].to_pylist())) == 1
        text = " ".join(table["scene_id"].to_pylist() + table["log_id"].to_pylist())
        assert not any(name in text for name in FAMILIES)
        # Rows of a family are spread over the pool: its mean place is the middle.
        place = np.arange(len(pool)) / len(pool)
        families = np.array(_truth(path)["family"])
        for name in FAMILIES:
            chosen = families == name
            assert abs(place[chosen].mean() - 0.5) < 4 * 0.29 / np.sqrt(chosen.sum())


def test_a_pool_is_a_function_of_its_configuration(sides, tmp_path):
    again = make_pool(SMALL, "real", tmp_path / "again")
    assert again.content_hash == open_pool(sides["real"]).manifest.content_hash
    other = make_pool(replace(SMALL, seed=1), "real", tmp_path / "other")
    assert other.content_hash != again.content_hash


def test_test_scenes_depend_on_the_test_seed_alone(tmp_path):
    one = make_pool(replace(SMALL, seed=5), "test", tmp_path / "one")
    two = make_pool(SMALL, "test", tmp_path / "two")
    three = make_pool(replace(SMALL, test_seed=7), "test", tmp_path / "three")
    assert one.content_hash == two.content_hash != three.content_hash


def test_declared_weights_lie_beside_dev_and_test_only(sides):
    for side in ("dev", "test"):
        weights = pq.read_table(sides[side] / "weights.parquet")
        assert weights["scene_id"].to_pylist() == list(open_pool(sides[side]).scene_ids)
        by_family = dict(zip(_truth(sides[side])["family"], weights["weight"].to_pylist(), strict=True))
        assert by_family == {name: 3.0 if family.safety else 1.0 for name, family in FAMILIES.items()}
    assert not (sides["real"] / "weights.parquet").exists()
    assert not (sides["synthetic"] / "weights.parquet").exists()
    assert evaluation_weights(["merge", "cruise"], "null").tolist() == [1.0, 1.0]


def test_real_agents_are_noisy_and_synthetic_ones_are_not():
    seen = {}
    for side in ("synthetic", "dev"):
        plan = replace(plan_side(SMALL, "dev"), side=side)
        table = chunk_tables(plan, np.arange(len(plan)))[0]
        states = np.array(pa.concat_arrays(table["agent_states"].chunks).flatten()).reshape(-1, 15, 5)
        types = np.array(pa.concat_arrays(table["agent_type"].chunks).flatten())
        still = (
            (np.abs(states[..., 3:]).max((1, 2)) == 0) & (np.abs(states[..., 0]).min(1) > 0) & (types == 0)
        )
        seen[side] = np.std(states[still][..., 0], axis=1)
    assert seen["synthetic"].max() < 1e-4
    assert 0.05 < np.median(seen["dev"]) < 0.15


def test_qualities_of_a_preset_reach_the_truth(sides):
    truth = _truth(sides["synthetic"])
    found = {name: set() for name in FAMILIES}
    for name, quality, origin in zip(truth["family"], truth["quality"], truth["origin"], strict=True):
        if origin != "perturbed_copy":
            found[name].add(quality)
    assert found["follow"] == found["red_light"] == {"H"}
    assert found["crossing"] == {"F", "H"}
    assert found["roundabout"] == {"G"}
    assert found["dart_out"] == {"irreducible"}
    assert set(_truth(sides["dev"])["quality"]) == {"F", "irreducible"}


def test_a_preset_says_how_many_real_scenes_unless_the_configuration_does():
    sizes = {name: len(plan_side(WorldConfig(preset=name), "real")) for name in PRESETS}
    assert sizes == dict.fromkeys(PRESETS, 700) | {"null": 30}
    assert len(plan_side(WorldConfig(preset="null", num_real=34), "real")) == 34


def test_all_sides_of_a_preset_hold_its_families():
    config = replace(SMALL, preset="null")
    families = [set(plan_side(config, side).family_N) for side in SIDES]
    assert len(families[0]) == 3
    assert all(found == families[0] for found in families)
    assert len(plan_side(config, "dev")) == 3 * config.num_dev_per_family


def test_counts_split_by_largest_remainder():
    assert counts({"a": 1, "b": 1, "c": 1}, 7) == {"a": 3, "b": 2, "c": 2}
    assert counts({"a": 99, "b": 1}, 10) == {"a": 10, "b": 0}


def test_generate_yields_rows_of_the_schema():
    table = generate("merge", 5, seed=2, quality="G")
    check_schema(table.schema, "generate")
    assert table.schema.equals(SCENE_SCHEMA)
    assert table.num_rows == 5


@pytest.mark.parametrize(
    ("family", "quality", "name"), [("flying", "F", "family"), ("merge", "X", "quality")]
)
def test_an_unknown_family_or_quality_is_refused(family, quality, name):
    with pytest.raises(ConfigError, match=f"^{name}: must be one of"):
        generate(family, 1, seed=0, quality=quality)


@pytest.mark.parametrize("change", [{"num_real": 0}, {"num_synthetic": -3}, {"seed": -1}])
def test_bad_counts_are_refused_before_anything_is_written(change, tmp_path):
    with pytest.raises(ConfigError, match=r"world\."):
        make_pool(replace(SMALL, **change), "real", tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
