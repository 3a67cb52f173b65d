"""What the job scripts do: read arguments, run one piece of work, say where everything lies, return an exit code."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from autoscale_ray.config_file import read_arguments
from autoscale_ray.distributed.driver import StoppedError
from autoscale_ray.distributed.session import embed_on_ray, run_on_ray, with_absolute_paths
from autoscale_ray.errors import AutoScaleError, exit_code, path_error
from autoscale_ray.inputs import open_inputs
from autoscale_ray.reporting.tables import cluster_table
from autoscale_ray.run_folder import work_dir


def run_autoscale(arguments: Sequence[str]) -> int:
    """Run the data loop and the final comparison."""
    return _report(lambda console: _run(arguments, console))


def embed_pools(arguments: Sequence[str]) -> int:
    """Train the encoder, embed and cluster the pools."""
    return _report(lambda console: _embed(arguments, console))


def prepare_pools(arguments: Sequence[str]) -> int:
    """Open or draw the pools and build their caches."""
    return _report(lambda console: _prepare(arguments, console))


def sweep_budgets(arguments: Sequence[str]) -> int:
    """Run a sweep over budgets or any other field."""
    # Imported here: Ray Tune takes seconds that the other jobs do not need.
    from autoscale_ray.distributed.sweep import sweep

    return _report(lambda console: f"finished: everything lies in {sweep(arguments, console)}")


def _run(arguments: Sequence[str], console: Console) -> str:
    config = with_absolute_paths(read_arguments(arguments))
    run_on_ray(config, console)
    return f"everything lies in {config.placement.run_dir}"


def _embed(arguments: Sequence[str], console: Console) -> str:
    config = with_absolute_paths(read_arguments(arguments))
    try:
        console.print(cluster_table(embed_on_ray(config, console)))
    except StoppedError as stopped:
        return str(stopped)
    return f"embedded: everything lies in {config.placement.run_dir}"


def _prepare(arguments: Sequence[str], console: Console) -> str:
    config = with_absolute_paths(read_arguments(arguments))
    inputs = open_inputs(config, work_dir(config) / "pools")
    for side, pool in inputs.pools.items():
        console.print(f"{side}: {len(pool.cached)} scenes in {pool.path}")
    return f"prepared: pools lie in {', '.join(str(pool.path) for pool in inputs.pools.values())}"


def _report(work: Callable[[Console], str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a job must not end at a ± that its log does not know
    console = Console()
    try:
        console.print(work(console), soft_wrap=True)
    except AutoScaleError as error:
        print(f"failed: {error}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:
        told = path_error(error)
        if told is None:
            raise
        print(f"failed: {told}", file=sys.stderr)
        return exit_code(told)
    return 0
