"""What the stages of a run tell whoever watches them, and what bears on their results."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from autoscale_ray import tasks
from autoscale_ray.config_file import load_config
from autoscale_ray.errors import ConfigError
from autoscale_ray.inputs import open_inputs
from autoscale_ray.local import LocalStages
from autoscale_ray.preflight import check_ready
from autoscale_ray.session import open_run, play
from tests.unit.test_session import TINY


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_search_that_ends_early_is_over_before_the_arms_are_trained(tmp_path):
    """The log of a run names the round of a stage; those of the comparison used to count as of a round to come."""
    config = load_config(None, [*TINY, "ascent.method=uniform", f"placement.run_dir={tmp_path / 'run'}"])
    inputs, store = open_run(config)
    seen: list[tuple[str, bool]] = []
    stages = LocalStages(
        config, inputs, store, watch=lambda name: nullcontext(seen.append((name, stages.is_searching)))
    )
    play(stages, lambda summary: None)
    trained = [searching for name, searching in seen if name == "train"]
    assert trained == [True] + [False] * (len(config.loop.baselines) + 1)


@pytest.mark.parametrize("method", ["deficit", "spsa", "response"])
def test_an_early_stop_is_for_methods_whose_curves_it_asks(method):
    config = load_config(None, ["loop.stop_early=true", f"ascent.method={method}"])
    if method == "response":
        check_ready(config)
    else:
        with pytest.raises(ConfigError, match=r"ascent\.method: must be one of response, fused with loop"):
            check_ready(config)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_the_encoder_is_the_same_whatever_threads_torch_has(num_shards, tmp_path):
    more = [f"representation.num_shards={num_shards}", "representation.batch_size=128"]
    config = load_config(None, [*TINY, *more])
    inputs = open_inputs(config, tmp_path / "world")
    before, made = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            folder = tmp_path / f"{num_threads}"
            folder.mkdir()
            tasks.train_encoder(config, inputs, folder)
            assert torch.get_num_threads() == num_threads
            made.append(files_of(folder))
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]
