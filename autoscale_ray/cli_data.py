"""The commands of `autoscale` that make scene pools and look at them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.tree import Tree
from tyro.conf import Positional

from autoscale_ray.config import PresetName
from autoscale_ray.config_file import load_config
from autoscale_ray.errors import ConfigError
from autoscale_ray.files import all_or_none

MAX_LISTED = 20
"""Entries of one table that `pool info` prints: a pool may have thousands of logs."""
EXIT_READER_FAULT = 3
MAX_SHARE = 1e6
"""Of a side of a split; only ratios count, and far larger numbers would not add up."""
Domain = Literal["real", "synthetic"]


def world(
    out: Path | None = None,
    preset: PresetName = "harm_low_deficit",
    seed: int = 0,
    plot: Path | None = None,
) -> None:
    """Make the four pools of the built-in driving world, or a picture of every family.

    Args:
        out: Folder that receives the pools real, synthetic, dev and test.
        preset: Where the synthetic pool is faithful, gapped or harmful; docs/world.md.
        seed: Seed of real, synthetic and dev; the test scenes have world.test_seed.
        plot: Folder that receives families.png, one sheet.
    """
    from autoscale_ray.records import SIDES
    from autoscale_ray.scenes.pool_writer import check_unused
    from autoscale_ray.world.pictures import plot_families
    from autoscale_ray.world.pools import make_pool

    console = Console()
    if out is None and plot is None:
        raise ConfigError(
            "world", "needs --out FOLDER for the pools, --plot FOLDER for the pictures, or both"
        )
    config = load_config(None, [f"world.preset={preset}", f"world.seed={seed}"]).world
    if out is not None:
        for side in SIDES:  # told now, not after three pools
            check_unused(out / side)
    if plot is not None:
        console.print(f"drawn: {plot_families(plot)}")
    if out is None:
        return
    with all_or_none() as made:
        for side in SIDES:
            with console.status(f"drawing {side}"):
                manifest = make_pool(config, side, out / side)
            made.append(out / side)
            console.print(f"{out / side}: {manifest.num_scenes} scenes")


def ingest(
    format: Positional[str],
    path: Positional[Path],
    out: Path,
    domain: Domain,
    num_processes: int = 1,
    maps: Path | None = None,
    filter: Path | None = None,
    rewards: Path | None = None,
    vocabulary: Path | None = None,
    max_quarantined_share: float = 0.02,
    backend: Literal["local", "ray"] = "local",
) -> None:
    """Make a scene pool of recordings or simulations in another format.

    Ends with exit code 3 when the pool was made but files were lost to a fault of their reader.

    Args:
        format: Name of the reader: navsim, simscale, navhard, commonroad, sumo, scenarionet, av2-sensor,
            av2-forecasting, kitti, interaction or waymo.
        path: File, folder or zip to read.
        out: Folder of the new pool; must not exist or be empty.
        domain: Whether the scenes count as real or synthetic.
        num_processes: Parts of 8 files read side by side (backend local only); 8 files or fewer take one process.
        maps: Folder with nuPlan maps (navsim, simscale, navhard).
        filter: NAVSIM scene filter, YAML (navsim, simscale).
        rewards: Reward file, or folder with one for each token (simscale).
        vocabulary: Trajectories that the rewards score, .npy (simscale).
        max_quarantined_share: No pool is made where more than this share of scenes and files is quarantined.
        backend: Processes of this machine, or the tasks of a Ray cluster.
    """
    from autoscale_ray.scenes.ingest import ingest as ingest_here
    from autoscale_ray.scenes.ingest import num_reader_faults

    if backend == "ray" and num_processes != 1:
        raise ConfigError(
            "--num-processes", "is for --backend local; on Ray the cluster's CPUs read side by side"
        )
    ingest_files = partial(ingest_here, num_processes=num_processes)
    if backend == "ray":
        from autoscale_ray.distributed.ingest import ingest_on_ray as ingest_files

    beside = {"maps": maps, "filter": filter, "rewards": rewards, "vocabulary": vocabulary}
    console = Console()
    with console.status(f"reading {path}") as status:
        manifest = ingest_files(
            format,
            path,
            out,
            domain,
            files={name: file for name, file in beside.items() if file is not None},
            max_quarantined_share=max_quarantined_share,
            progress=lambda done, total: status.update(f"reading {path}: {done} of {total} parts"),
        )
    refused = f"{manifest.num_quarantined} refused with a reason"
    console.print(f"{out}: {manifest.num_scenes} scenes, {refused}; details with `autoscale pool info {out}`")
    if faults := num_reader_faults(out):
        console.print(f"{faults} files were lost to a fault of the reader; quarantine.parquet names them")
        raise SystemExit(EXIT_READER_FAULT)


def simulate_sumo(
    out: Path,
    networks: tuple[str, ...] = ("grid", "spider", "rand", "roundabout"),
    num_runs: int = 4,
    duration_s: float = 600.0,
    departures_per_minute: tuple[float, float] = (15.0, 60.0),
    sigma: tuple[float, float] = (0.2, 0.8),
    violation_share: tuple[float, float] = (0.0, 0.15),
    seed: int = 0,
    keep: Path | None = None,
    num_processes: int = 1,
) -> None:
    """Simulate traffic with SUMO (extra `sumo`) and make a synthetic pool of it; equal options give equal scenes.

    Args:
        out: Folder of the new pool; must not exist or be empty.
        networks: Kinds grid, spider, rand, roundabout, or net.xml files; run after run takes the next one.
        num_runs: Simulations, each with its own network, demand and drivers.
        duration_s: Simulated seconds of a run.
        departures_per_minute: Range of the demand of a run.
        sigma: Range of driver imperfection, 0 to 1.
        violation_share: Range of the share of drivers with minor violations.
        seed: Seed of everything.
        keep: Folder that keeps SUMO's own files.
        num_processes: Parts of 8 runs read side by side; 8 runs or fewer take one process.
    """
    from autoscale_ray.scenes.sumo_simulation import SumoOptions, simulate

    options = SumoOptions(
        networks=networks, num_runs=num_runs, duration_s=duration_s, departures_per_minute=departures_per_minute,
        sigma=sigma, violation_share=violation_share, seed=seed,
    )  # fmt: skip
    console = Console()
    with console.status("simulating") as status:
        manifest, counts = simulate(
            out, options, keep=keep, num_processes=num_processes, progress=status.update
        )
    for run in counts:
        told = f"{run.num_vehicles} vehicles, {run.num_collisions} collisions, {run.num_teleports} teleports"
        console.print(f"{run.name}: {told}")
    console.print(f"{out}: {manifest.num_scenes} scenes, {manifest.num_quarantined} refused with a reason")


def pool_info(pool: Positional[Path]) -> None:
    """Show what a pool holds: scenes by source, log and domain, and quarantined scenes by rule.

    Args:
        pool: Folder of the pool.
    """
    from autoscale_ray.scenes.pool_info import pool_info as read_info

    Console().print(tree_of(f"{pool}", dataclasses.asdict(read_info(pool))))


def pool_split(
    pool: Positional[Path],
    out: Path,
    real: float = 0.7,
    dev: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    synthetic: Path | None = None,
) -> None:
    """Split a pool of recordings into the sides real, dev and test by log: no recording stands on two of them.

    Args:
        pool: Folder of the pool; it is left as it is.
        out: Receives one pool a side.
        real: Share of the scenes to train on.
        dev: Share of the scenes that choose the mixture; 0 makes no such side, where you have one.
        test: Share of the scenes that judge it in the end; 0 makes no such side.
        seed: Which logs go where, >= 0.
        synthetic: Folder of a synthetic pool; what is not of a log of dev or test is copied to OUT/synthetic.
    """
    from autoscale_ray.scenes.pool import open_pool
    from autoscale_ray.scenes.split import split_pools

    shares = {"real": real, "dev": dev, "test": test}
    for side, share in shares.items():
        if not 0 <= share <= MAX_SHARE:
            raise ConfigError(f"--{side}", f"must be a share from 0 to {MAX_SHARE:g}", share)
    if not real or not dev + test:
        raise ConfigError("pool split", "needs a share above 0 for real, and for dev or test")
    if seed < 0:
        raise ConfigError("--seed", "must be >= 0", seed)
    clips = None if synthetic is None else open_pool(synthetic)
    num_clips = 0 if clips is None else len(clips)
    wanted = {side: share for side, share in shares.items() if share}
    made = split_pools(open_pool(pool), wanted, seed, out, clips)
    for side, manifest in made.items():
        left_out = f", {num_clips - manifest.num_scenes} left out" if side == "synthetic" else ""
        told = f"{manifest.num_scenes} scenes of {len(manifest.counts['log'])} logs{left_out}"
        Console().print(f"{out / side}: {told}", soft_wrap=True)


def pool_plot(pool: Positional[Path], out: Path, num_scenes: int = 24, seed: int = 0) -> None:
    """Draw a contact sheet of random scenes of a pool.

    Args:
        pool: Folder of the pool.
        out: PNG file.
        num_scenes: Scenes on the sheet, >= 1; all of a smaller pool.
        seed: Which scenes are drawn, >= 0.
    """
    from autoscale_ray.reporting.scene_plot import plot_pool

    if out.suffix.lower() != ".png" or out.is_dir():
        raise ConfigError("--out", "must be a file that ends in .png", str(out))
    if num_scenes < 1 or seed < 0:
        raise ConfigError("pool plot", "--num-scenes must be >= 1 and --seed >= 0", (num_scenes, seed))
    plot_pool(pool, out, num_scenes=num_scenes, seed=seed)
    Console().print(f"drawn: {out}")


def tree_of(title: str, values: Mapping[str, Any]) -> Tree:
    """Return counts by name as a tree for the terminal."""
    tree = Tree(title)
    for name, value in values.items():
        if isinstance(value, Mapping):
            branch = tree.add(f"{name}: {len(value)}")
            for key, item in itertools.islice(value.items(), MAX_LISTED):
                branch.add(f"{key}: {item}")
            if len(value) > MAX_LISTED:
                branch.add(f"and {len(value) - MAX_LISTED} more")
        else:
            tree.add(f"{name}: {value}")
    return tree
