"""The command `autoscale`."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.tree import Tree
from tyro.conf import Positional

from autoscale_ray import __version__
from autoscale_ray.config import PresetName, RunConfig, load_config, override_of
from autoscale_ray.errors import EXIT_BAD_INPUT, AutoScaleError, ConfigError, exit_code
from autoscale_ray.run_folder import check_local

MAX_LISTED = 20
"""Entries of one table that `pool info` prints: a pool may have thousands of logs."""
EXIT_READER_FAULT = 3
EXIT_INTERRUPTED = 130
Domain = Literal["real", "synthetic"]


def run(
    arguments: Positional[tuple[str, ...]] = (),
    out: str | None = None,
    backend: Literal["ray", "local"] = "ray",
) -> None:
    """Run the data loop, or go on where an earlier start of the same run stopped.

    Arguments are an optional YAML file and any number of overrides such as `loop.num_rounds=8`. Without a
    file the defaults run on the built-in driving world.

    Args:
        arguments: [run.yaml] [section.field=value ...]
        out: Folder, or URL in a bucket, for everything the run writes (placement.run_dir).
        backend: Ray (the cluster at RAY_ADDRESS, or one started on this machine), or this process alone.
    """
    config = _config(arguments, out)
    if backend == "ray":
        from autoscale_ray.distributed.session import run_on_ray

        run_on_ray(config, Console())
        return
    from autoscale_ray.session import run_local

    run_local(config, Console())


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
        seed: Seed of the training pools.
        plot: Folder that receives a picture of every scenario family.
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
    for side in SIDES:
        with console.status(f"drawing {side}"):
            manifest = make_pool(config, side, out / side)
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
        num_processes: Files read side by side.
        maps: Folder with nuPlan maps (navsim, simscale, navhard).
        filter: NAVSIM scene filter, YAML (navsim, simscale).
        rewards: Reward file, or folder with one for each token (simscale).
        vocabulary: Trajectories that the rewards score, .npy (simscale).
        max_quarantined_share: No pool is made where more than this share of scenes and files is quarantined.
        backend: Processes of this machine, or the tasks of a Ray cluster.
    """
    from autoscale_ray.scenes.ingest import ingest as ingest_here
    from autoscale_ray.scenes.ingest import num_reader_faults

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
        num_processes: Runs read side by side.
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

    Console().print(_tree(f"{pool}", dataclasses.asdict(read_info(pool))))


def pool_split(
    pool: Positional[Path],
    out: Path,
    real: float = 0.7,
    dev: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> None:
    """Split a pool of recordings into the sides real, dev and test by log: no recording stands on two of them.

    Args:
        pool: Folder of the pool; it is left as it is.
        out: Receives one pool a side.
        real: Share of the scenes to train on.
        dev: Share of the scenes that choose the mixture.
        test: Share of the scenes that judge it in the end.
        seed: Which logs go where, >= 0.
    """
    from autoscale_ray.scenes.pool import open_pool
    from autoscale_ray.scenes.split import deal_logs, split_by_log

    shares = {"real": real, "dev": dev, "test": test}
    for side, share in shares.items():
        if not 0 < share < float("inf"):
            raise ConfigError(f"--{side}", "must be a share above 0", share)
    if seed < 0:
        raise ConfigError("--seed", "must be >= 0", seed)
    scenes = open_pool(pool)
    made = split_by_log(scenes, deal_logs(scenes, shares, seed), out)
    for side in shares:
        manifest = made[side]
        Console().print(f"{out / side}: {manifest.num_scenes} scenes of {len(manifest.counts['log'])} logs")


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


def report(run_dir: Positional[str]) -> None:
    """Draw plots and the HTML report of a run again, finished or not.

    Args:
        run_dir: Folder of the run, or its URL on the machine of its driver.
    """
    from autoscale_ray.run_folder import local_folder
    from autoscale_ray.session import render

    Console().print(f"report: {render(local_folder(run_dir))}")


def status(run_dir: Positional[str]) -> None:
    """Show how far a run is: published rounds and scores, the last event, and its driver where one can be reached.

    Reads the run folder alone, so it works without a cluster. The driver is looked for on the cluster that
    RAY_ADDRESS names, else on the one that the run was started on.

    Args:
        run_dir: Folder or URL of the run.
    """
    from autoscale_ray.distributed.status import status_lines

    for line in status_lines(run_dir):
        Console().print(line, soft_wrap=True, highlight=False, markup=False)


def stop(run_dir: Positional[str]) -> None:
    """Stop a run on Ray after the round in hand; `autoscale run` with the same arguments goes on.

    Args:
        run_dir: Folder or URL of the run.
    """
    from autoscale_ray.distributed.status import stop_run

    stop_run(run_dir)
    Console().print(f"{run_dir}: stops after the round in hand; the same command goes on", soft_wrap=True)


def sweep(arguments: Positional[tuple[str, ...]] = (), out: str | None = None) -> None:
    """Run one whole loop for every value of the swept fields; embeddings and clusters are computed once.

    Write `sweep.` before any field and give it several values: `sweep.loop.budget=350,700,1400`. Poor trials
    stop early by the scores of their rounds; a sweep that was killed goes on where it was when the same command
    is given again. docs/sweeps.md says more.

    Args:
        arguments: [run.yaml] [section.field=value ...] sweep.section.field=value,value,... With Optuna also
            ranges: sweep.section.field=low..high sweep.search=optuna sweep.num_trials=20
        out: Folder for the table, the curve and one run folder per trial (placement.run_dir).
    """
    from autoscale_ray.distributed.sweep import sweep as run_sweep

    console = Console()
    folder = run_sweep([*arguments, *_run_dir(out)], console)
    console.print(f"finished: table {folder / 'sweep.csv'}, everything else beside it", soft_wrap=True)


def embed(arguments: Positional[tuple[str, ...]] = (), out: str | None = None, plot: bool = False) -> None:
    """Embed and cluster the pools of a run, without the loop; `run` goes on from there.

    Args:
        arguments: [run.yaml] [section.field=value ...]
        out: Folder, or URL in a bucket, for everything the run writes (placement.run_dir).
        plot: Draw the embedding map with the medoid of every cluster, and a sheet of nearest scenes.
    """
    from autoscale_ray.session import embed_local

    embed_local(_config(arguments, out), Console(), plot)


def score(
    trajectories: Positional[Path],
    pool: Positional[Path | None] = None,
    *,
    out: Path,
    metric_cache: Path | None = None,
    navhard: Path | None = None,
    maps: Path | None = None,
    two_stage: Path | None = None,
    num_processes: int = 1,
) -> None:
    """Score planned trajectories by PDMS (v1) and EPDMS (v2), all sub-scores: on a pool, or on NAVSIM's own files.

    Args:
        trajectories: .npz or .parquet with scene_id and poses in the scene frame, P x 8 x 3 (2 Hz) or
            P x 40 x 3 (10 Hz), or a NAVSIM submission .pkl; with NAVSIM's files scene_id is the token.
        pool: Folder of the pool.
        out: Parquet file to write.
        metric_cache: Folder of NAVSIM metric caches; each gives the version it was made for.
        navhard: Folder navhard_two_stage with its logs and synthetic scenes (EPDMS), with --maps.
        maps: Folder with nuPlan maps.
        two_stage: With NAVSIM's files: the split YAML whose mapping gives the two-stage score, for example
            navhard_two_stage.yaml.
        num_processes: Metric caches read side by side.
    """
    if sum(source is not None for source in (pool, metric_cache, navhard)) != 1:
        raise ConfigError("score", "needs one of a pool, --metric-cache and --navhard")
    if two_stage is not None and pool is not None:
        raise ConfigError("score", "--two-stage needs --metric-cache or --navhard")
    if (navhard is None) != (maps is None):
        raise ConfigError("score", "--navhard and --maps need each other")
    if out.suffix != ".parquet" or out.is_dir() or not out.parent.is_dir():  # told now, not after hours
        raise ConfigError("--out", "must be a file in an existing folder that ends in .parquet", str(out))
    if out.resolve() == trajectories.resolve():
        raise ConfigError("--out", "must not be the file of trajectories", str(out))
    console = Console()
    with console.status("scoring"):
        counts = _score(trajectories, pool, metric_cache or navhard, maps, two_stage, out, num_processes)
    scored, invalid = counts.pop("scored"), counts.pop("invalid")
    console.print(f"{out}: {scored} trajectories scored, {invalid} reported invalid with a reason")
    for title, values in counts.items():
        console.print(_tree(title, values))


def _score(
    trajectories: Path,
    pool: Path | None,
    navsim: Path | None,
    maps: Path | None,
    two_stage: Path | None,
    out: Path,
    num_processes: int,
) -> dict[str, Any]:
    if maps is not None and navsim is not None:
        from autoscale_ray.evaluation.score_navhard import score_navhard_file

        return score_navhard_file(trajectories, navsim, maps, out, two_stage)
    if navsim is not None:
        from autoscale_ray.evaluation.score_cache import score_cache_file

        return score_cache_file(trajectories, navsim, out, two_stage, num_processes=num_processes)
    from autoscale_ray.evaluation.score_pool import score_trajectory_file

    assert pool is not None
    return dict(score_trajectory_file(trajectories, pool, out))


def _config(arguments: Sequence[str], out: str | None) -> RunConfig:
    files = [item for item in arguments if "=" not in item]
    overrides = [item for item in arguments if "=" in item]
    if len(files) > 1:
        raise ConfigError(files[1], "only one configuration file can be given")
    return load_config(files[0] if files else None, [*overrides, *_run_dir(out)])


def _run_dir(out: str | None) -> list[str]:
    """Return the override that `--out` stands for."""
    return [] if out is None else [override_of("placement.run_dir", out)]


def _check_text(arguments: Sequence[str]) -> None:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # bytes of a file name in another encoding
            raise ConfigError(ascii(argument), "arguments must be UTF-8 text") from None


def _tree(title: str, values: Mapping[str, Any]) -> Tree:
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


def pool() -> None:
    """Look at a scene pool or split it: `pool info` counts its scenes, `pool plot` draws some, `pool split` deals out
    its logs.
    """
    main(["pool", "--help"])


def simulate() -> None:
    """Make a synthetic pool with a traffic simulator: `simulate sumo` (extra `sumo`)."""
    main(["simulate", "--help"])


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "world": world,
    "ingest": ingest,
    "simulate": simulate,
    "pool": pool,
    "embed": embed,
    "score": score,
    "report": report,
    "status": status,
    "stop": stop,
    "sweep": sweep,
}


GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "pool": {"info": pool_info, "plot": pool_plot, "split": pool_split},
    "simulate": {"sumo": simulate_sumo},
}
"""Commands of two words."""
ON_RUNS = ("run", "embed", "sweep", "report", "status", "stop")
"""Commands that read what they are given as a run folder, which may be a URL."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what goes wrong ends with one line on standard error and exit code 2 for bad input,
    1 for a run that failed, 130 for Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a run must not end at a ± that the terminal does not know
    if given == ["--version"]:
        print(f"autoscale {__version__}")
        return
    commands, prog = COMMANDS, "autoscale"
    on_runs = bool(given) and given[0] in ON_RUNS
    if len(given) > 1 and given[0] in GROUPS:
        commands, prog = GROUPS[given[0]], f"autoscale {given.pop(0)}"
    try:
        _check_text(given)
        if not on_runs:
            check_local(given)
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog=prog,
            description="AutoScale (driving data mixture): choose synthetic driving scenes by closed-loop feedback.",
            args=given or ["--help"],
        )
    except AutoScaleError as error:
        print(f"autoscale: {error}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # no path of the user's: ours to explain, with its traceback
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"autoscale: {place}{error.strerror}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print("autoscale: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
