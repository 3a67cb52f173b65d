"""The command `autoscale`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from autoscale_ray import __version__
from autoscale_ray.cli_data import ingest, pool_info, pool_plot, pool_split, simulate_sumo, tree_of, world
from autoscale_ray.config import RunConfig
from autoscale_ray.config_file import override_of, read_arguments
from autoscale_ray.errors import AutoScaleError, ConfigError, exit_code, path_error
from autoscale_ray.files import is_writable
from autoscale_ray.run_folder import check_local

EXIT_INTERRUPTED = 130
EXIT_NONE_SCORED = 3


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
    Console().print(
        f"{run_dir}: stops after the round in hand; the `autoscale run` that started it goes on",
        soft_wrap=True,
    )


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

    Works in this process; on a cluster: jobs/embed_pools.py.

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
    logs: Path | None = None,
    two_stage: Path | None = None,
    num_processes: int = 1,
) -> None:
    """Score planned trajectories by PDMS (v1) and EPDMS (v2), all sub-scores: on a pool, or on NAVSIM's own files.

    Ends with exit code 3 when not one of them could be scored.

    Args:
        trajectories: .npz or .parquet with scene_id and poses in the scene frame, P x 8 x 3 (2 Hz) or
            P x 40 x 3 (10 Hz), P may be left out, or a NAVSIM submission .pkl; with NAVSIM's files scene_id is the
            token.
        pool: Folder of the pool.
        out: Parquet file to write; a summary goes beside it as .json.
        metric_cache: Folder of NAVSIM metric caches; each gives the version it was made for.
        navhard: Folder navhard_two_stage with its synthetic scenes (EPDMS), with --maps.
        maps: Folder with nuPlan maps.
        logs: With --navhard: folder with the logs of NAVSIM's split test, which hold the original scenes;
            navsim_logs/test beside the folder navhard_two_stage where it is not given.
        two_stage: With NAVSIM's files: the split YAML whose mapping gives the two-stage score, for example
            navhard_two_stage.yaml.
        num_processes: Parts of 128 scenes of a pool, or metric caches, scored side by side.
    """
    if sum(source is not None for source in (pool, metric_cache, navhard)) != 1:
        raise ConfigError("score", "needs one of a pool, --metric-cache and --navhard")
    if two_stage is not None and pool is not None:
        raise ConfigError("score", "--two-stage needs --metric-cache or --navhard")
    if (navhard is None) != (maps is None):
        raise ConfigError("score", "--navhard and --maps need each other")
    if logs is not None and navhard is None:
        raise ConfigError("score", "--logs needs --navhard")
    _check_out(out, trajectories, (pool, metric_cache, navhard, logs))  # told now, not after hours
    if num_processes < 1:
        raise ConfigError("--num-processes", "must be >= 1", num_processes)
    if navhard is not None and num_processes != 1:
        raise ConfigError("--num-processes", "is for a pool or --metric-cache: --navhard takes one process")
    from autoscale_ray.evaluation.score_file import score_file

    console = Console()
    with console.status("scoring"):
        scorer = _scorer(pool, metric_cache, navhard, maps, logs, num_processes)
        counts = score_file(trajectories, scorer, out, two_stage)
    scored, invalid = counts.pop("scored"), counts.pop("invalid")
    console.print(
        f"{out}: {scored} rows scored (trajectory by version), {invalid} reported invalid with a reason"
    )
    for title, values in counts.items():
        console.print(tree_of(title, values))
    if not scored:
        raise SystemExit(EXIT_NONE_SCORED)


def _check_out(out: Path, trajectories: Path, sources: Sequence[Path | None]) -> None:
    """Refuse a place where a score table cannot be written, or that would overwrite or lie in what is read."""
    if out.suffix != ".parquet" or out.is_dir() or not out.parent.is_dir() or not is_writable(out.parent):
        raise ConfigError(
            "--out", "must be a file in an existing folder to write to that ends in .parquet", str(out)
        )
    if out.with_suffix(".json").is_dir():
        raise ConfigError(
            "--out", "must leave room for the summary beside it, a file", str(out.with_suffix(".json"))
        )
    if out.resolve() == trajectories.resolve():
        raise ConfigError("--out", "must not be the file of trajectories", str(out))
    for source in sources:
        if source is not None and out.resolve().is_relative_to(source.resolve()):
            raise ConfigError("--out", "must not lie in the folder that is read", str(out))


def _scorer(
    pool: Path | None,
    metric_cache: Path | None,
    navhard: Path | None,
    maps: Path | None,
    logs: Path | None,
    num_processes: int,
) -> Callable[..., Any]:
    """Return what scores trajectories on the one kind of scenes that is given."""
    if navhard is not None and maps is not None:
        from autoscale_ray.evaluation.score_navhard import score_navhard

        return partial(score_navhard, root=navhard, maps=maps, logs=logs)
    if metric_cache is not None:
        from autoscale_ray.evaluation.score_cache import score_caches

        return partial(score_caches, path=metric_cache, num_processes=num_processes)
    from autoscale_ray.evaluation.score_rows import score_rows

    assert pool is not None
    return partial(score_rows, pool=pool, num_processes=num_processes)


def _config(arguments: Sequence[str], out: str | None) -> RunConfig:
    return read_arguments(arguments, _run_dir(out))


def _run_dir(out: str | None) -> list[str]:
    """Return the override that `--out` stands for."""
    return [] if out is None else [override_of("placement.run_dir", out)]


def _check_text(arguments: Sequence[str]) -> None:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # bytes of a file name in another encoding
            raise ConfigError(ascii(argument), "arguments must be UTF-8 text") from None


def _options_last(given: Sequence[str]) -> list[str]:
    """Put file and overrides before the options, also those behind one: the parser takes them in one place alone."""

    def is_option(pair: tuple[str, str]) -> bool:
        before, word = pair
        return word.startswith("-") or before in WITH_VALUE

    return [given[0], *(word for _, word in sorted(pairwise(given), key=is_option))]


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
WITH_OVERRIDES = ("run", "embed", "sweep")
"""Commands that take a configuration file and overrides."""
WITH_VALUE = ("--out", "--backend")
"""Their options that are followed by a value."""
ON_RUNS = (*WITH_OVERRIDES, "report", "status", "stop")
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
        if given and given[0] in WITH_OVERRIDES:
            given = _options_last(given)
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
        told = path_error(error)
        if told is None:
            raise  # no path of the user's: ours to explain, with its traceback
        print(f"autoscale: {told}", file=sys.stderr)
        raise SystemExit(exit_code(told)) from None
    except KeyboardInterrupt:
        print("autoscale: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
