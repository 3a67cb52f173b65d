"""From raw measures to sub-scores and final scores: progress normalisation, weights, human filter.

Shape legend: P proposals of one group, S scenes, columns in the order of `COLUMNS_V2` and `COLUMNS_V1`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoscale_ray.evaluation.metrics import Measures, Rules

MIN_PROGRESS_M = 5.0

MULTIPLIERS_V2 = (
    "no_at_fault_collisions",
    "drivable_area_compliance",
    "driving_direction_compliance",
    "traffic_light_compliance",
)
WEIGHTS_V2 = {
    "ego_progress": 5.0,
    "time_to_collision_within_bound": 5.0,
    "lane_keeping": 2.0,
    "history_comfort": 2.0,
}
EXTENDED_COMFORT_WEIGHT = 2.0
COLUMNS_V2 = (*MULTIPLIERS_V2, *WEIGHTS_V2)
MULTIPLIERS_V1 = MULTIPLIERS_V2[:2]
WEIGHTS_V1 = {"ego_progress": 5.0, "time_to_collision_within_bound": 5.0, "comfort": 2.0}
COLUMNS_V1 = (*MULTIPLIERS_V2[:3], *WEIGHTS_V1)


def multiplier(measures: Measures, rules: Rules) -> Tensor:
    """Return the product of the multiplicative sub-scores (v1: NC DAC; v2: NC DAC DDC TLC)."""
    product = measures.no_at_fault_collisions * measures.drivable_area
    if rules.version == "v1":
        return product
    return product * measures.driving_direction * measures.traffic_light


def normalised_progress(progress_m: Tensor, product: Tensor, longest_m: Tensor, rules: Rules) -> Tensor:
    """Normalise raw progress by the longest permitted one.

    v2: clip(raw / N, 0, 1) where N > 5 m, else 1. v1: raw m / N where N > 5 m, else 1, but 0 where m = 0
    (docs/scoring.md, Ego progress).

    Args:
        progress_m: Raw progress.
        product: Multiplier m.
        longest_m: N = max over the group of raw * m.
        rules: RULES_V1 or RULES_V2.

    Returns:
        Ego progress in [0, 1].
    """
    far = longest_m > MIN_PROGRESS_M
    if rules.version == "v1":
        return torch.where(
            far, progress_m * product / torch.where(far, longest_m, 1.0), (product != 0.0).to(product.dtype)
        )
    return torch.where(
        far, (progress_m / torch.where(far, longest_m, 1.0)).clamp(0.0, 1.0), torch.ones_like(product)
    )


def sub_scores(measures: Measures, ego_progress: Tensor, rules: Rules) -> dict[str, Tensor]:
    """Name the sub-scores of one version, in column order."""
    values = {
        "no_at_fault_collisions": measures.no_at_fault_collisions,
        "drivable_area_compliance": measures.drivable_area,
        "driving_direction_compliance": measures.driving_direction,
        "traffic_light_compliance": measures.traffic_light,
        "ego_progress": ego_progress,
        "time_to_collision_within_bound": measures.time_to_collision,
        "lane_keeping": measures.lane_keeping,
        "history_comfort": measures.comfort,
        "comfort": measures.comfort,
    }
    return {name: values[name] for name in (COLUMNS_V1 if rules.version == "v1" else COLUMNS_V2)}


def weighted_score(
    columns: Mapping[str, Tensor], rules: Rules, extended_comfort: Tensor | None = None
) -> Tensor:
    """Combine sub-scores into a final score.

    v1: NC DAC (5 EP + 5 TTC + 2 C) / 12. v2: NC DAC DDC TLC (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16, or without EC
    over 14 (docs/scoring.md, Aggregation).

    Args:
        columns: Sub-scores by name.
        rules: RULES_V1 or RULES_V2.
        extended_comfort: EC, or None to leave it out.

    Returns:
        Scores in [0, 1].
    """
    weights = WEIGHTS_V1 if rules.version == "v1" else WEIGHTS_V2
    terms = [weight * columns[name] for name, weight in weights.items()]
    total = sum(weights.values())
    if extended_comfort is not None:
        terms.append(EXTENDED_COMFORT_WEIGHT * extended_comfort)
        total += EXTENDED_COMFORT_WEIGHT
    product = torch.ones_like(terms[0])
    for name in MULTIPLIERS_V1 if rules.version == "v1" else MULTIPLIERS_V2:
        product = product * columns[name]
    return product * (sum(terms[1:], terms[0]) / total)


def group_scores(measures: Measures, rules: Rules) -> Tensor:
    """Score proposals that are normalised with one another, without EC (PDM-Closed's own choice).

    Args:
        measures: Raw measures of P proposals of one scene.
        rules: RULES_V1 or RULES_V2.

    Returns:
        (P,) scores.
    """
    product = multiplier(measures, rules)
    longest_m = (measures.progress_m * product).amax().expand_as(product)
    progress = normalised_progress(measures.progress_m, product, longest_m, rules)
    return weighted_score(sub_scores(measures, progress, rules), rules)
