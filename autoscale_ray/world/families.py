"""The scenario families by name, with their numbers of layouts and whether they weigh as safety."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autoscale_ray.world import junction_families, road_families
from autoscale_ray.world.draws import Draw
from autoscale_ray.world.situation import Situation

SAFETY_WEIGHT = 3.0
"""Weight of a safety family's scenes in dev and test; the others have 1."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of driving situation."""

    build: Callable[[Draw, int], Situation]
    num_variants: int
    safety: bool = False
    irreducible: bool = False
    """Part of what happens cannot be foreseen from what is seen."""


FAMILIES: dict[str, Family] = {
    "cruise": Family(road_families.cruise, 4),
    "follow": Family(road_families.follow, 4),
    "queue": Family(road_families.queue, 4),
    "curve": Family(road_families.curve, 4),
    "curve_follow": Family(road_families.curve_follow, 4),
    "overtake": Family(road_families.overtake, 2),
    "red_light": Family(junction_families.red_light, 2),
    "recovery": Family(road_families.recovery, 4),
    "cut_in": Family(road_families.cut_in, 3, safety=True),
    "merge": Family(road_families.merging, 1, safety=True),
    "crossing": Family(junction_families.crossing, 2, safety=True),
    "left_turn": Family(junction_families.left_turn, 2, safety=True),
    "pedestrian": Family(road_families.pedestrian, 2, safety=True),
    "cyclist": Family(road_families.cyclist, 2, safety=True),
    "obstacle": Family(road_families.obstacle, 2, safety=True),
    "roundabout": Family(junction_families.roundabout_entry, 2, safety=True),
    "dart_out": Family(road_families.dart_out, 2, safety=True, irreducible=True),
}
