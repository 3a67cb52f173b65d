"""Embedding on Ray: no scene is lost and none is embedded twice, whoever is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from autoscale_ray import tasks
from autoscale_ray.config import RayConfig
from autoscale_ray.distributed.board import TaskBoard
from autoscale_ray.distributed.stages import RayStages
from autoscale_ray.errors import PoolError
from autoscale_ray.inputs import open_inputs
from autoscale_ray.representation.model import embed, load
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.session import open_run
from tests.ray.conftest import processes_below
from tests.ray.small_run import config_of, wait_for, with_cached_stages

CHUNK = 8
"""Scenes a part, so that there are parts enough to be killed between."""
PROGRAM = """
import sys
from pathlib import Path
from autoscale_ray.distributed import embed
from autoscale_ray.distributed.resources import connect
from autoscale_ray.inputs import open_inputs
from tests.ray.small_run import config_of
embed.GRAPH_CHUNK = int(sys.argv[1])
run, encoder, parts, out = map(Path, sys.argv[2:])
config = config_of(run)
connect(config.placement.ray)
pools = dict(open_inputs(config, run / "pools").pools)
embed.embed_pools(encoder, pools, parts, run / "stacks", out, config.placement.ray)
"""


def embedders(head_pid: int) -> list[psutil.Process]:
    return processes_below(head_pid, "RangeEmbedder")


@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore:`use_.* is deprecated:DeprecationWarning")  # Ray Data warns of itself
def test_an_embedder_and_then_its_caller_killed_lose_no_scene_and_embed_none_twice(
    cluster, reference, tmp_path, monkeypatch
) -> None:
    from autoscale_ray.distributed import embed as on_ray

    monkeypatch.setattr(on_ray, "GRAPH_CHUNK", CHUNK)
    (encoder,) = (reference / "views").glob("encoder-*")
    parts, out = tmp_path / "parts", tmp_path / "out"
    pools = dict(open_inputs(config_of(reference), reference / "pools").pools)
    num_parts = sum(1 for side, pool in pools.items() for _ in on_ray.row_ranges(side, pool, parts))

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in parts.glob("[!.]*.parquet")}

    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(CHUNK), reference, encoder, parts, out])
    wait_for(lambda: finished() or program.poll() is not None)
    assert program.poll() is None, "the program ended before it was killed"
    (embedder,) = embedders(cluster["pid"])
    embedder.kill()
    kept = [finished()]
    wait_for(lambda: len(finished()) > len(kept[0]))
    program.send_signal(signal.SIGKILL)
    program.wait(30)
    wait_for(lambda: not embedders(cluster["pid"]))
    kept.append(finished())
    assert 0 < len(kept[0]) < len(kept[1]) < num_parts, "both were killed midway"

    out.mkdir()
    on_ray.embed_pools(encoder, pools, parts, tmp_path / "stacks", out, RayConfig())
    after = finished()
    assert len(after) == num_parts
    for before in kept:
        assert before.items() <= after.items(), "a finished part is not embedded again"
    model = load(encoder)
    for side, pool in pools.items():
        ids_N, z_ND = tasks.read_embeddings(out / tasks.table_file(side))
        assert ids_N.tolist() == pool.scene_ids.tolist()
        assert np.array_equal(z_ND, embed(model, pool, batch_size=CHUNK))


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore:`use_.* is deprecated:DeprecationWarning")
def test_an_embedder_that_stands_still_ends_with_its_stacks_and_is_named(
    cluster, reference, tmp_path, monkeypatch
) -> None:
    """P8: reading blocks for ever in every embedder, the first and those that Ray starts after it."""
    from autoscale_ray.distributed import embed as on_ray

    monkeypatch.setattr(on_ray, "NO_PROGRESS_TIMEOUT_S", 30)
    (encoder,) = (reference / "views").glob("encoder-*")
    pool, stacks = open_inputs(config_of(reference), reference / "pools").pools["real"], tmp_path / "stacks"
    shutil.copytree(pool.path, tmp_path / "pool")
    (sizes,) = (tmp_path / "pool").glob("cache/*/sizes.json")
    sizes.unlink()
    os.mkfifo(sizes)  # nobody ever writes to it
    ranges = list(on_ray.row_ranges("real", open_pool(tmp_path / "pool"), tmp_path))
    with pytest.raises(on_ray.EmbeddingFailedError, match="no range of scenes was embedded in 32 s"):
        on_ray.run_ranges(encoder, ranges, stacks, RayConfig(stall_timeout_s=2, start_timeout_s=2))
    told = [path.read_text() for path in stacks.glob("*.txt")]
    assert any("read_text" in text and "_embed" in text for text in told), told
    wait_for(lambda: not embedders(cluster["pid"]))


@pytest.mark.timeout(100)
@pytest.mark.filterwarnings("ignore:`use_.* is deprecated:DeprecationWarning")
def test_what_an_embedder_runs_into_is_one_line(cluster, reference, tmp_path) -> None:
    """It used to be Ray Data's own error with a traceback, from which the cause was lost on its way."""
    from autoscale_ray.distributed import embed as on_ray

    (encoder,) = (reference / "views").glob("encoder-*")
    missing = {"pool": str(tmp_path / "pool"), "start": 0, "stop": 1, "part": str(tmp_path / "part")}
    with pytest.raises(PoolError, match=r"^[^\n]*pool: must be the folder of a scene pool"):
        on_ray.run_ranges(encoder, [missing], tmp_path / "stacks", RayConfig())


@pytest.mark.timeout(200)
def test_parts_of_embeddings_stay_until_the_whole_is_published(reference, tmp_path) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    (run_dir / "parts" / "mark").mkdir(parents=True)
    config = config_of(run_dir)
    inputs, store = open_run(config)
    stages = RayStages(config, inputs, store, TaskBoard())
    stages.work.close()  # as after a failure
    assert (run_dir / "parts" / "mark").is_dir()
    stages.embed()
    assert not (run_dir / "parts").exists()
