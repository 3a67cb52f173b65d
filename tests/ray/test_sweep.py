"""A sweep of two trials: each a whole loop on Ray, embeddings computed once, restored after it was done."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from rich.console import Console

from autoscale_ray.distributed.driver import find_driver
from autoscale_ray.distributed.sweep import sweep
from tests.ray.small_run import SMALL, with_shared_pools

pytestmark = pytest.mark.slow  # minutes each, and not yet shown to pass on an idle machine


@pytest.mark.timeout(900)
def test_two_trials_share_embeddings_and_leave_a_table(cluster, reference, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    with_shared_pools(folder / "shared", reference)
    arguments = [*SMALL, f"placement.run_dir={folder}", "sweep.loop.budget=20,60"]
    assert sweep(arguments, Console(quiet=True)) == folder
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["loop.budget"] for row in rows] == ["20", "60"]
    assert all(0 <= float(row["objective"]) <= 1 and not row["error"] for row in rows)
    ended = {row["loop.budget"]: int(row["round"]) for row in rows}
    assert max(ended.values()) == 2
    trials = sorted((folder / "trials").iterdir())
    assert len(trials) == 2
    for trial in trials:
        assert find_driver(str(trial)) is None, "a driver ends with its trial"
        for record in (folder / "shared" / "stages").iterdir():
            assert (trial / "stages" / record.name).samefile(record), "embedded and clustered once"
    before = (folder / "sweep.csv").read_bytes()
    sweep(arguments, Console(quiet=True))
    assert (folder / "sweep.csv").read_bytes() == before, "a finished sweep is restored, not run again"
    assert (folder / "sweep.png").is_file()
