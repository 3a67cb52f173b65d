"""Score trajectories against NAVSIM's metric caches: what `autoscale score --metric-cache` does."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation.from_metric_cache import prepared_from_cache
from autoscale_ray.evaluation.scene import Floats
from autoscale_ray.evaluation.scene_score import (
    SceneScore,
    Unscored,
    pairs_in_time,
    score_scene,
    with_comfort,
)
from autoscale_ray.evaluation.score_file import check_waypoints
from autoscale_ray.scenes.readers.metric_cache import (
    MetricCache,
    cache_names,
    open_reader,
    read_metric_cache,
)
from autoscale_ray.scenes.safe_pickle import PickleReader


def score_caches(
    wanted: Mapping[str, np.ndarray], path: Path, num_processes: int = 1
) -> tuple[list[SceneScore], list[Unscored]]:
    """Score trajectories by token, each by the version of the score that its cache was made for.

    A cache that is refused is reported for its trajectories, and the rest is scored. Each reading process holds one
    cache at a time.

    Args:
        wanted: Relative waypoints by token; see `read_trajectories`.
        path: Folder, zip archive or one file.
        num_processes: Caches read side by side, >= 1; reading costs far more than scoring.

    Returns:
        What was scored, and the rest.

    Raises:
        InvalidInputError: No caches at all.
    """
    names = cache_names(path)
    readers: SimpleQueue[PickleReader] = SimpleQueue()

    def read_and_score(token: str) -> SceneScore | Unscored:
        if token not in names:
            return Unscored(token=token, reason=f"{token}: trajectory: must have a metric cache")
        reader = readers.get()
        try:
            cache = read_metric_cache(reader, path, names[token], token)
            return _score(cache, check_waypoints(token, wanted[token]))
        except InvalidInputError as error:
            return Unscored(token=token, reason=str(error))
        finally:
            readers.put(reader)

    with ExitStack() as stack:
        for _ in range(max(1, num_processes)):
            readers.put(stack.enter_context(open_reader()))
        threads = stack.enter_context(ThreadPoolExecutor(max(1, num_processes)))
        found = list(threads.map(read_and_score, wanted))
    scored = [item for item in found if isinstance(item, SceneScore)]
    unscored = [item for item in found if isinstance(item, Unscored)]
    return with_comfort(scored, pairs_in_time(scored)), unscored


def _score(cache: MetricCache, waypoints: Floats) -> SceneScore:
    return score_scene(
        prepared_from_cache(cache),
        waypoints,
        cache.version,
        log_name=cache.log_name,
        is_synthetic=cache.is_synthetic,
        start_us=cache.start_us,
        pose=cache.ego_state[:3],
    )
