"""SUMO is really run; where eclipse-sumo is not installed, only the messages about that are tested."""

import importlib.util
import sys

import numpy as np
import pytest

from autoscale_ray.cli import main
from autoscale_ray.errors import InvalidInputError, MissingExtraError, PoolError
from autoscale_ray.scenes import sumo_simulation
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.sumo_simulation import NETWORKS, SumoOptions, simulate

has_sumo = importlib.util.find_spec("sumo") is not None
needs_sumo = pytest.mark.skipif(not has_sumo, reason="eclipse-sumo is not installed (extra sumo)")
SHORT = {"num_runs": 1, "duration_s": 40.0}


@needs_sumo
@pytest.mark.parametrize("network", NETWORKS)
def test_every_kind_of_network_gives_traffic_and_scenes(tmp_path, network):
    _, counts = simulate(tmp_path / "pool", SumoOptions(networks=(network,), **SHORT), keep=tmp_path / "kept")
    assert counts[0].num_vehicles >= 5
    assert counts[0].num_teleports == 0
    pool = open_pool(tmp_path / "pool")
    assert len(pool) >= 10
    assert len(pool) >= 10 * pool.manifest.num_quarantined
    assert pool.manifest.counts["domain"] == {"synthetic": len(pool)}
    batch = pool.batch(np.arange(len(pool)))
    assert len(batch.polygon_layer_Q) > 0
    assert "x" in (tmp_path / "kept" / f"{counts[0].name}.net.xml").read_text()


@needs_sumo
def test_equal_options_give_equal_scenes_and_another_seed_others(tmp_path):
    hashes = [
        simulate(tmp_path / f"{number}", SumoOptions(networks=("grid",), seed=seed, **SHORT))[0].content_hash
        for number, seed in enumerate((3, 3, 4))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@needs_sumo
def test_a_folder_that_keeps_another_run_gives_its_scenes_to_no_pool(tmp_path):
    options = SumoOptions(networks=("grid",), seed=3, **SHORT)
    first, _ = simulate(tmp_path / "first", options, keep=tmp_path / "kept")
    again, _ = simulate(tmp_path / "again", options, keep=tmp_path / "kept")
    assert first.content_hash == again.content_hash
    with pytest.raises(
        InvalidInputError, match=r"keep: must not hold .* of other runs .*grid-3-0\.fcd\.xml\.gz"
    ):
        simulate(tmp_path / "other", SumoOptions(networks=("grid",), seed=4, **SHORT), keep=tmp_path / "kept")
    with pytest.raises(PoolError, match="already exists"):
        simulate(tmp_path / "first", options)


@needs_sumo
def test_demand_changes_how_many_drive_and_violations_who_drives_how(tmp_path):
    calm = SumoOptions(networks=("grid",), departures_per_minute=(10, 10), violation_share=(0, 0), **SHORT)
    busy = SumoOptions(networks=("grid",), departures_per_minute=(60, 60), violation_share=(1, 1), **SHORT)
    counts = [
        simulate(tmp_path / f"pool{number}", options, keep=tmp_path / f"kept{number}")[1][0]
        for number, options in enumerate((calm, busy))
    ]
    assert counts[1].num_vehicles > 3 * counts[0].num_vehicles
    routes = [(tmp_path / f"kept{n}" / f"{run.name}.rou.xml").read_text() for n, run in enumerate(counts)]
    assert "jmIgnoreFoeProb" not in routes[0]
    assert routes[1].count("jmIgnoreFoeProb") == routes[1].count("<vType")


@needs_sumo
def test_a_given_network_is_used_by_the_command(tmp_path, capsys):
    sumo_simulation.NETWORKS["grid"](tmp_path / "my.town.net.xml", 1, np.random.default_rng(0))
    command = [
        "simulate",
        "sumo",
        "--out",
        str(tmp_path / "pool"),
        "--networks",
        str(tmp_path / "my.town.net.xml"),
    ]
    main([*command, "--num-runs", "2", "--duration-s", "60", "--departures-per-minute", "60", "60"])
    assert "my.town-0-0: " in capsys.readouterr().out
    assert set(open_pool(tmp_path / "pool").manifest.counts["source"]) == {
        "sumo/my.town-0-0",
        "sumo/my.town-0-1",
    }


@needs_sumo
def test_a_hostile_or_broken_network_is_refused_in_one_line(tmp_path):
    net = tmp_path / "bad.net.xml"
    for content, message in (
        ("<!DOCTYPE net [<!ENTITY a 'b'>]><net/>", "DTD"),
        ("<net/>", "at least two roads"),
        ("<html/>", "must be a SUMO net"),
        (
            "<net>" + "<edge id='{}'><lane id='{}_0' speed='9' length='9'/></edge>" * 2 + "</net>",
            "sumo: must run",
        ),
    ):
        net.write_text(content)
        with pytest.raises(InvalidInputError, match=message) as caught:
            simulate(tmp_path / "pool", SumoOptions(networks=(str(net),), **SHORT))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "pool").exists()


@needs_sumo
def test_a_program_that_cannot_run_is_named_in_one_line(tmp_path, monkeypatch):
    broken = tmp_path / "sumo" / "bin"
    broken.mkdir(parents=True)
    (broken.parent / "__init__.py").touch()
    for name in ("sumo", "netgenerate"):
        (broken / name).write_text("no program")
    monkeypatch.delitem(sys.modules, "sumo", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InvalidInputError, match="netgenerate: must be a program that starts"):
        simulate(tmp_path / "pool", SumoOptions(networks=("grid",), **SHORT))
    with pytest.raises(InvalidInputError, match=r"sumo: must end within 0 s|sumo: must be a program"):
        sumo_simulation.run_program("sumo", {}, timeout_s=0.0)


def test_without_sumo_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[sumo\]' in a clone"):
        simulate(tmp_path / "pool")
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "sumo", "--out", str(tmp_path / "pool")])
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_runs": 0}, "num_runs: must be >= 1"),
        ({"duration_s": 1.0}, "duration_s"),
        ({"sigma": (0.5, 1.5)}, "sigma: must be a range within 0 to 1"),
        ({"violation_share": (0.5, 0.2)}, "violation_share"),
        ({"networks": ("moon",)}, "grid, spider, rand, roundabout or a net.xml"),
        ({"networks": ()}, "at least one"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, change, message):
    with pytest.raises(InvalidInputError, match=message):
        simulate(tmp_path / "pool", SumoOptions(**change))
