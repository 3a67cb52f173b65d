"""What a machine that runs everything at once need not hold twice."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import psutil
import pytest

from autoscale_ray.config_file import load_config
from autoscale_ray.distributed.memory import release
from autoscale_ray.distributed.resources import LOCAL_ENVIRONMENT, local_cluster

pytestmark = pytest.mark.timeout(60)
MIB = 2**20


@pytest.mark.parametrize(
    ("who", "modules", "without"),
    [
        ("follows a run", "autoscale_ray.cli, autoscale_ray.distributed.session", "torch ray.train ray.data"),
        ("scores", "autoscale_ray.distributed.evaluate", "pandas ray.train ray.data"),
    ],
)
def test_a_process_holds_no_library_that_it_does_not_use(who, modules, without) -> None:
    program = f"import sys, {modules}\nprint([name for name in {without.split()} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]", who


def test_freed_memory_between_what_is_kept_goes_back() -> None:
    """Without being asked the C library gives back only what lies above the last piece in use."""
    pieces = [np.ones(8_000, np.uint8) for _ in range(30_000)]
    kept = pieces[::50]
    del pieces
    before = psutil.Process().memory_info().rss
    release()
    assert before - psutil.Process().memory_info().rss > 100 * MIB
    assert all(piece.all() for piece in kept)


def test_a_local_cluster_is_made_for_one_machine_where_the_user_says_nothing(monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {"MALLOC_ARENA_MAX": "8"})
    local_cluster(load_config(None, []).placement.ray)
    assert os.environ == LOCAL_ENVIRONMENT | {"MALLOC_ARENA_MAX": "8"}
    assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
