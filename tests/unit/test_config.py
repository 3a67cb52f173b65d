import dataclasses

import pytest

from autoscale_ray.config import RunConfig, derive_seed, identity
from autoscale_ray.config_file import dump_config, load_config
from autoscale_ray.errors import ConfigError


def test_file_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("loop: {budget: 40, num_rounds: 2}\nseed: 3\n")
    config = load_config(path, ["loop.num_rounds=8", "loop.baselines=[vanilla]"])
    assert (config.seed, config.loop.budget, config.loop.num_rounds) == (3, 40, 8)
    assert config.loop.baselines == ("vanilla",)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("loop.num_round=3", ["unknown key loop.num_round", "loop.num_rounds"]),
        ("loop.budget=0", ["loop.budget", "greater than or equal to 1", "0"]),
        ("loop.budget=-4", ["loop.budget", "-4"]),
        ("loop.budget=many", ["loop.budget", "integer", "many"]),
        ("loop=3", ["loop must be a section", "3"]),
        ("retrieval.random_share=1.5", ["retrieval.random_share", "1.5"]),
        ("planner.learning_rate=.nan", ["planner.learning_rate", "nan"]),
        ("loop.baselines=[best]", ["loop.baselines", "best"]),
        ("planner.hidden_size=66", ["planner.hidden_size", "multiple of 4", "66"]),
        ("planner.batch_size=6", ["planner.batch_size", "multiple of 4", "6"]),
        ("planner.anchor_offsets_m=[]", ["planner.anchor_offsets_m", "at least 1"]),
        ("planner.anchor_offsets_m=[1e300]", ["planner.anchor_offsets_m", "1e300"]),
        ("planner.anchor_accelerations_mps2=[.nan]", ["planner.anchor_accelerations_mps2.0", "nan"]),
        ("representation.hidden_size=6", ["representation.hidden_size", "multiple of 4"]),
        ("representation.embedding_size=1", ["representation.embedding_size", "2", "1"]),
        ("representation.embedding_size=99999999999", ["representation.embedding_size", "16384"]),
        ("placement.num_threads=99999999999", ["placement.num_threads", "1024"]),
        (
            "placement.ray.gpus_per_scorer=1.5",
            ["placement.ray.gpus_per_scorer", "whole number above 1", "1.5"],
        ),
        ("placement.ray.gpus_per_worker=.inf", ["placement.ray.gpus_per_worker", "inf"]),
        ("ascent.scene_sd=.inf", ["ascent.scene_sd", "finite", "inf"]),
        ("ascent.scene_sd=0", ["ascent.scene_sd", "greater than 0", "0"]),
        ("ascent.perturbation=.nan", ["ascent.perturbation", "nan"]),
        ("ascent.perturbation=11", ["ascent.perturbation", "10", "11"]),
        ("ascent.perturbation_decay=-0.1", ["ascent.perturbation_decay", "-0.1"]),
        ("ascent.floor_final=1.5", ["ascent.floor_final", "1.5"]),
        ("ascent.null_prior=-0.1", ["ascent.null_prior", "-0.1"]),
        ("ascent.trust_radius=-1", ["ascent.trust_radius", "-1"]),
        ("placement.ray.min_trainers=2", ["placement.ray.min_trainers", "num_trainers", "2"]),
        (
            "representation.loss={decoder: 0, neighbours: 0}",
            ["overrides: representation.loss: must have a term above 0"],
        ),
        (
            "representation.distance={heading: 0, speed: 0, speed_change: 0, agents: 0, interaction: 0,"
            " lanes: 0, controls: 0}",
            ["overrides: representation.distance: must have a weight above 0"],
        ),
        ("seed=yes", ["seed", "true or false", "True"]),
        ("planner.learning_rate=on", ["planner.learning_rate", "true or false"]),
        ("world.num_real=99999999999999999999", ["world.num_real", "100000000"]),
        ("world.num_synthetic=9999999999", ["world.num_synthetic", "100000000"]),
        ("loop.baselines=[union, vanilla, union]", ["loop.baselines", "once", "union"]),
        ("loop.budget" + ".x" * 2000 + "=1", ["overrides", "names deep", "loop.budget.x"]),
        ("nonsense", ["section.field=value"]),
        ("loop.budget=[", ["YAML"]),
        ("seed=2026-13-40", ["YAML", "2026-13-40"]),
    ],
)
def test_bad_values_name_path_rule_and_value(override, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: must be a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "twice.yaml").write_text("loop: {budget: 5}\nseed: 1\nloop: {num_rounds: 1}\n")
    with pytest.raises(
        ConfigError, match=r"twice\.yaml: must be YAML text: loop is given twice, again in line 3"
    ):
        load_config(tmp_path / "twice.yaml")
    for text in ("a: [1\n", "a: 2026-13-40\n", "a: " + "[" * 2000):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"broken\.yaml: must be YAML"):
            load_config(tmp_path / "broken.yaml")


def test_dump_reads_back(tmp_path):
    config = load_config(None, ["loop.budget=17", "world.preset=null"])
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_identity_ignores_placement_and_how_far_to_go():
    config = RunConfig()
    moved = dataclasses.replace(
        config,
        placement=dataclasses.replace(config.placement, run_dir="elsewhere"),
        loop=dataclasses.replace(config.loop, num_rounds=99, final_seeds=9),
    )
    assert identity(moved) == identity(config)
    changed = dataclasses.replace(config, loop=dataclasses.replace(config.loop, budget=1))
    assert identity(changed) != identity(config)


def test_seed_streams_differ():
    seeds = {derive_seed(0, "train", "round 1", str(k)) for k in range(50)}
    seeds |= {derive_seed(0, "train", "round 2", str(k)) for k in range(50)}
    seeds |= {derive_seed(1, "train", "round 1", str(k)) for k in range(50)}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)
