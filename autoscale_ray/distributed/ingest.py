"""Ingest on a Ray cluster: the parts of a source are Ray Data tasks; each leaves its files on storage that all share.

No scene passes through the object store, and the pool is the one that a local ingest makes, byte for byte.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from autoscale_ray.config import RayConfig
from autoscale_ray.distributed.causes import own_error
from autoscale_ray.distributed.resources import connect
from autoscale_ray.errors import SourceReadError
from autoscale_ray.scenes.ingest import PartJob, ingest, run_part
from autoscale_ray.scenes.manifest import PoolManifest

PART_TIMEOUT_S = 6 * 3600.0
"""How long no part of a source may come to its end before the ingest does. Some files hold hours of traffic, and Ray
Data counts parts that ended, not parts at work."""


def ingest_on_ray(
    format: str,
    path: Path | str,
    out: Path | str,
    domain: str,
    *,
    files: Mapping[str, Path | str] | None = None,
    config: RayConfig | None = None,
    **options: Any,
) -> PoolManifest:
    """Read a source into a new pool with the tasks of a Ray cluster; see `scenes.ingest.ingest`.

    Args:
        format: Key of `READERS`.
        path: Source, on storage that every node sees under the same path.
        out: Folder of the new pool, on such storage too.
        domain: ``real`` or ``synthetic``.
        files: Files beside the source, by name.
        config: How the cluster is reached.
        options: Further arguments of `scenes.ingest.ingest`.

    Raises:
        AutoScaleError: As `scenes.ingest.ingest`; what is finished is kept, and the same call goes on there.
    """
    connect(config or RayConfig())
    beside = {name: Path(file).absolute() for name, file in (files or {}).items()}
    source, target = Path(path).absolute(), Path(out).absolute()
    return ingest(format, source, target, domain, files=beside, run_parts=run_tasks, **options)


def run_tasks(jobs: Sequence[PartJob]) -> Iterator[object]:
    """Run every job as a task of its own; yield as they finish."""
    if not jobs:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else `own_error` finds its words alone
    context.execution_no_progress_timeout_s = PART_TIMEOUT_S
    rows = [{"number": number, "job": pickle.dumps(job)} for number, job in enumerate(jobs)]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        cast(Any, _run_job), batch_format="pyarrow", batch_size=1, num_cpus=1
    )
    finished: list[int] = []
    try:
        for row in done.iter_rows():
            finished.append(row["number"])
            yield row["number"]
    except ExecutionTimeoutError as error:
        problem = f"no part was finished in {PART_TIMEOUT_S:g} s; what is finished is kept, the same call goes on there"
        raise SourceReadError(jobs[0].path, problem) from error
    except RayError as error:
        problem = f"a reading task failed: {' '.join(str(error).split())[:300]}"
        raise (own_error(error) or SourceReadError(jobs[0].path, problem)) from error
    assert sorted(finished) == list(range(len(jobs))), "every part is read once"


def _run_job(rows: pa.Table) -> pa.Table:
    import torch

    torch.set_num_threads(1)
    for job in rows["job"].to_pylist():
        run_part(pickle.loads(job))  # of `run_tasks`, through Ray alone: never bytes of a source
    return rows.select(["number"])
