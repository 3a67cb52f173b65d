"""The full score of the expert's drives, to check that winning by kinematic terms wins by EPDMS too."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from autoscale_ray.evaluation.epdms import epdms
from autoscale_ray.evaluation.from_pool import row_values, scoring_scene
from autoscale_ray.scenes.schema import CURRENT_FRAME, NUM_FRAMES, NUM_PLAN_FRAMES

PLAN = slice(CURRENT_FRAME + 1, CURRENT_FRAME + 1 + NUM_PLAN_FRAMES)


def score_experts(table: pa.Table) -> dict[str, np.ndarray]:
    """Score the logged drive of every scene by EPDMS, without the filter that would forgive its own mistakes.

    Args:
        table: Rows of `SCENE_SCHEMA`.

    Returns:
        ``epdms`` and the sub-scores by NAVSIM's names, each (N,) in [0, 1].
    """
    rows = [row_values(table, number) for number in range(len(table))]
    plans = np.stack([np.asarray(row["ego_states"]).reshape(NUM_FRAMES, -1)[PLAN, :3] for row in rows])
    result = epdms([scoring_scene(row) for row in rows], plans[:, None].astype(np.float64), backend="torch")
    scores = {"epdms": result.raw_score, **result.raw}
    return {name: np.asarray(metric.value)[:, 0] for name, metric in scores.items()}
