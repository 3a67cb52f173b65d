"""What a driver shows arrives where people look: Prometheus and TensorBoard."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoscale_ray.distributed.observe import GAUGES, Observer
from tests.ray.small_run import SUMMARY

EXPORT_TIMEOUT_S = 90


@pytest.mark.timeout(180)
def test_metrics_are_exported_by_their_names_with_their_labels(cluster, tmp_path: Path) -> None:
    observer = ray.remote(Observer).options(num_cpus=0).remote("a-run", tmp_path)
    ray.get(observer.show.remote(SUMMARY))
    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
    address = ray.nodes()[0]["NodeManagerAddress"]
    give_up = time.monotonic() + EXPORT_TIMEOUT_S
    missing = set(GAUGES)
    while missing and time.monotonic() < give_up:
        pages = [
            urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10).read().decode()
            for port in ports
        ]
        text = "\n".join(pages)
        missing = {name for name in GAUGES if f"\nray_{name}{{" not in text}
        time.sleep(0.5)
    ray.kill(observer)
    assert not missing
    line = next(
        line
        for line in text.splitlines()
        if line.startswith("ray_autoscale_cluster_weight{") and "c1" in line
    )
    assert 'run="a-run"' in line
    assert float(line.rsplit(" ", 1)[1]) == 0.75


@pytest.mark.timeout(120)
def test_scalars_are_written_at_their_round(cluster, tmp_path: Path) -> None:
    observer = ray.remote(Observer).options(num_cpus=0).remote("a-run", tmp_path)
    ray.get(observer.show.remote(SUMMARY))
    ray.kill(observer)
    written = EventAccumulator(str(tmp_path)).Reload()
    (point,) = written.Scalars("cluster_weight/c1")
    assert (point.step, point.value) == (3, 0.75)
    assert "cluster_score/c1" not in written.Tags()["scalars"]
