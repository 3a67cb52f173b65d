"""Run the loop on recorded traffic with a simulated pool: a run-through on real input that claims no gain.

Real scenes: NGSIM US-101 and two recording groups of Lankershim Boulevard; dev and test: one other group each;
synthetic pool: SUMO scenarios. All are CommonRoad files under one data folder:

    python -m jobs.demo_real --data DATA --out demo-real
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import tyro
from rich.console import Console

from autoscale_ray.config_file import load_config
from autoscale_ray.errors import AutoScaleError, PoolError
from autoscale_ray.run_folder import check_local
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.pool import ScenePool, open_pool
from autoscale_ray.scenes.split import split_by_log
from autoscale_ray.session import run_local

RECORDED = "real/commonroad_ngsim/scenarios.zip"
SIMULATED = "synthetic/commonroad_sumo/scenarios.zip"
GROUPS = "INDEX_commonroad.csv"
HIGHWAY, ARTERIAL = "US101", "Lanker"
CHOICES = (
    "clusters.num_coarse=4",
    "clusters.min_dev_scenes=20",
    "loop.num_rounds=4",
    "loop.budget=1000",
    "loop.final_seeds=2",
)
"""Few clusters: the dev recordings hold a few hundred overlapping windows."""


def main(
    data: Path, out: Path = Path("demo-real"), overrides: tyro.conf.Positional[tuple[str, ...]] = ()
) -> None:
    """Ingest, split by recording, and run the loop.

    Args:
        data: Folder with the recordings and simulations.
        out: Folder for everything the run writes.
        overrides: Further [section.field=value ...].
    """
    console = Console()
    pools = out / "pools"
    if not (pools / "test" / "manifest.json").is_file():
        groups = known_groups(data / GROUPS)
        _ingest(console, data / RECORDED, pools / "recorded", "real", groups)
        _ingest(console, data / SIMULATED, pools / "synthetic", "synthetic", groups)
        recorded = open_pool(pools / "recorded")
        sides = sides_of_logs(recorded)
        split_by_log(recorded, sides, pools)
    paths = [f"data.{side}={pools / side}" for side in ("real", "synthetic", "dev", "test")]
    run_local(load_config(None, [*CHOICES, *paths, f"placement.run_dir={out}", *overrides]), console)
    console.print(
        "This run-through claims no gain: compare the differences above with their standard errors."
    )


def sides_of_logs(pool: ScenePool) -> dict[str, str]:
    """Give the highway and two arterial groups to training, one arterial group each to dev and test."""
    sources, logs = pool.sources.tolist(), pool.log_ids.tolist()
    arterial = sorted({log for log, source in zip(logs, sources, strict=True) if ARTERIAL in source})
    if len(arterial) < 4:
        raise PoolError(
            str(pool.path), "needs four separate recording groups of the arterial road", len(arterial)
        )
    sides = {log: "real" for log, source in zip(logs, sources, strict=True) if HIGHWAY in source}
    return sides | {arterial[0]: "real", arterial[1]: "real", arterial[2]: "dev", arterial[3]: "test"}


def _ingest(console: Console, source: Path, out: Path, domain: str, groups: dict[str, str]) -> None:
    if (out / "manifest.json").is_file():
        return
    with console.status(f"reading {source}") as status:
        manifest = ingest(
            "commonroad",
            source,
            out,
            domain,
            known_groups=groups,
            num_processes=2,
            progress=lambda done, total: status.update(f"reading {source}: {done} of {total} parts"),
        )
    console.print(f"{source}: {manifest.num_scenes} scenes")


def known_groups(index: Path) -> dict[str, str]:
    """Return which files were cut from one recording, where the data folder tells."""
    if not index.is_file():
        return {}
    with index.open(newline="", encoding="utf-8") as handle:
        return {row["file"]: row["overlap_group"] for row in csv.DictReader(handle)}


if __name__ == "__main__":
    try:
        check_local(sys.argv[1:])
        tyro.cli(main, prog="python -m jobs.demo_real")
    except AutoScaleError as error:
        print(f"demo_real: {error}", file=sys.stderr)
        raise SystemExit(2) from None
